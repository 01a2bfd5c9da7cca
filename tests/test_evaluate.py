"""`python -m caco.evaluate` on the command line: what it evaluates, where results go, what it refuses once it looks at
weights and images, and that it resumes. What is wrong with the command line itself: tests/config/test_pretrained.py.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from processes import caco_evaluate, ranks
from tiny import compose, train

from caco import evaluate
from caco.config import pretrained
from caco.config.composition import instantiate
from caco.engine import assembly
from caco.evals.evaluation import Evaluation
from caco.runs.checkpoint import load
from caco.runs.files import read_json
from caco.tracking.ledger import read_rows

TRAINING = ["max_steps=6", "epochs=1", "eval=[]", "bank.size=64", "checkpoint.every_steps=3"]
QUICK = ["eval=[knn,probe,linear]", "eval.knn.fraction=1", "eval.linear.epochs=1", "eval.linear.batch=256", "batch=200"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    train(run_dir, *TRAINING)
    # The command line of caco.train writes this file before it trains.
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(compose(*TRAINING), resolve=True))
    return run_dir


@pytest.fixture
def run_dir(tmp_path, finished) -> Path:
    """A finished run of six steps with checkpoints after steps three and six."""
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


@pytest.fixture
def here(monkeypatch, tmp_path):
    """main() in this process, in an empty directory: `here("run=...")` returns the exit code."""

    def main(*arguments: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["caco-evaluate", *arguments])
        try:
            evaluate.main()
        except SystemExit as end:
            return end.code
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("caco.runs.directory._locks", {})
    return main


def evals(run_dir: Path) -> list[dict]:
    rows = [row for row in read_rows(run_dir / "ledger.jsonl")[0] if row["kind"] == "eval"]
    return [{k: v for k, v in row.items() if k not in ("kind", "time")} for row in rows]


def test_results_go_into_ledger_summary_and_files_beside_those_of_baselines(here, run_dir, capsys):
    before = read_rows(run_dir / "ledger.jsonl")[0]
    summary = read_json(run_dir / "summary.json")
    assert here(f"run={run_dir}", "eval=[knn,linear]", *QUICK[1:], "baselines=true") == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["trained", "untrained", "pixels"] and table[1].split()[0] == "knn20_top1"
    after = read_json(run_dir / "summary.json")
    names = ["knn20_top1", "linear_epochs-1_batch-256_top1", "linear_epochs-1_batch-256_top5"]
    assert after.keys() - summary.keys() == {
        prefix + name for prefix in ("", "untrained/", "pixels/") for name in names
    }
    assert {k: after[k] for k in summary} == summary
    rows = read_rows(run_dir / "ledger.jsonl")[0]
    assert rows[: len(before)] == before and {row["step"] for row in rows[len(before) :]} == {6}
    assert {k: v for row in evals(run_dir) for k, v in row.items() if k in after and k != "steps"} == {
        k: v for k, v in after.items() if k not in summary
    }
    assert json.loads((run_dir / "tracking.json").read_text())["status"] == "FINISHED"
    kept = [read_json(path) for path in (run_dir / "evaluations").glob("*.json")]
    assert len(kept) == 6 and all(one["step"] == 6 and one["made_from"]["precision"] == "fp32" for one in kept)


def test_the_numbers_are_those_of_the_checkpoints_backbone_the_first_weights_and_the_pixels(here, run_dir):
    assert here(f"run={run_dir}", "eval=[knn]", "baselines=true") == 0
    cfg = compose(*TRAINING)
    splits, views = instantiate(cfg.data), instantiate(cfg.augmentation)
    untrained, trained = assembly.build_method(cfg).backbone, assembly.build_method(cfg).backbone
    method = assembly.build_method(cfg)
    method.load_state_dict(load(run_dir / "checkpoints" / "step_000000006.pt")["method"])
    trained.load_state_dict(method.backbone.state_dict())
    # Equal up to one image of 397, because other batches are rounded differently, which may change a vote.
    for prefix, backbone in (("", trained), ("untrained/", untrained), ("pixels/", torch.nn.Flatten())):
        knn = {"knn": instantiate(compose("eval=[knn]").eval.knn)}
        expected = Evaluation(knn, splits, views, batch=200, device="cpu", precision="fp32", seed=0).run(
            backbone, "end"
        )
        assert read_json(run_dir / "summary.json")[f"{prefix}knn20_20pct_top1"] == pytest.approx(
            expected["knn20_20pct_top1"], abs=0.26
        ), prefix


@pytest.fixture(scope="module")
def monitored(tmp_path_factory) -> Path:
    """Like `finished`, with the paper's monitor (k-NN over 20 % of each class) evaluated during training."""
    run_dir = tmp_path_factory.mktemp("runs") / "monitored"
    overrides = [*TRAINING, "eval=[knn]"]
    train(run_dir, *overrides)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(compose(*overrides), resolve=True))
    return run_dir


@pytest.fixture
def knn_run(tmp_path, monitored) -> Path:
    return Path(shutil.copytree(monitored, tmp_path / "monitored"))


def test_the_same_protocol_gives_training_s_number_by_training_s_name_and_another_one_by_its_own(here, knn_run):
    before, rows = read_json(knn_run / "summary.json"), evals(knn_run)
    assert here(f"run={knn_run}", "eval=[knn]") == 0
    assert (read_json(knn_run / "summary.json"), evals(knn_run)) == (before, rows)
    (kept,) = (knn_run / "evaluations").glob("knn-*.json")
    assert read_json(kept)["results"] == {"knn20_20pct_top1": before["knn20_20pct_top1"]}
    assert here(f"run={knn_run}", "eval=[knn_all]") == 0
    after = read_json(knn_run / "summary.json")
    assert after == {**before, "knn20_top1": after["knn20_top1"]} and evals(knn_run)[:-1] == rows


def test_another_number_of_the_same_name_never_replaces_training_s(here, knn_run, capsys):
    before, rows = read_json(knn_run / "summary.json"), evals(knn_run)
    for _ in range(2):  # first computed, then answered from its file
        assert here(f"run={knn_run}", "eval=[knn]", "seed=1") == 0
        assert (read_json(knn_run / "summary.json"), evals(knn_run)) == (before, rows)
        (kept,) = (knn_run / "evaluations").glob("knn-*.json")
        (number,) = read_json(kept)["results"].values()
        assert number != before["knn20_20pct_top1"], "the numbers must differ, or the test would show nothing"
        out, err = capsys.readouterr()
        assert out.split() == ["knn20_20pct_top1", f"{number:.6g}"]
        assert (
            err == f"caco: knn20_20pct_top1: training measured {before['knn20_20pct_top1']:.6g}, which is kept; the"
            f" {number:.6g} of this evaluation is in {kept} only\n"
        )


def test_of_two_evaluations_of_one_name_the_newer_counts(here, knn_run):
    numbers = []
    for seed in (0, 1):
        assert here(f"run={knn_run}", "eval=[knn]", "eval.knn.fraction=0.05", f"seed={seed}") == 0
        numbers.append(read_json(knn_run / "summary.json")["knn20_5pct_top1"])
    assert numbers[0] != numbers[1] and [row["knn20_5pct_top1"] for row in evals(knn_run)[-2:]] == numbers


def test_nothing_is_done_twice_and_a_cut_command_goes_on(here, run_dir, monkeypatch, capsys):
    done = []
    original = Evaluation.each

    def each(self, backbone, names, *rest):
        for name, values in original(self, backbone, names, *rest):
            done.append(name)
            yield name, values
            if len(done) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(Evaluation, "each", each)
    assert here(f"run={run_dir}", *QUICK) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert here(f"run={run_dir}", *QUICK) == 0
    assert here(f"run={run_dir}", *QUICK) == 0
    assert done == ["knn", "probe", "linear"]
    assert [set(row) - {"step"} for row in evals(run_dir)] == [
        {"knn20_top1"},
        {"probe_top1"},
        {"linear_epochs-1_batch-256_top1", "linear_epochs-1_batch-256_top5"},
    ]
    assert capsys.readouterr().out.count("knn20_top1") == 2, "each command must print all results"
    assert here(f"run={run_dir}", *QUICK, "eval.knn.k=5") == 0
    assert done[3:] == ["knn"], "another setting must be evaluated again"


def test_a_result_whose_row_was_lost_is_written_again_without_work(here, run_dir, monkeypatch):
    assert here(f"run={run_dir}", "eval=[knn]") == 0
    expected = evals(run_dir)
    ledger = run_dir / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    monkeypatch.setattr(
        Evaluation, "each", lambda self, backbone, names: iter([] if not names else pytest.fail("worked"))
    )
    assert here(f"run={run_dir}", "eval=[knn]") == 0
    assert evals(run_dir) == expected


def test_an_earlier_checkpoint_is_not_the_runs_final_result(here, run_dir):
    summary = read_json(run_dir / "summary.json")
    assert here(f"run={run_dir}/checkpoints/step_000000003.pt", "eval=[knn]") == 0
    assert read_json(run_dir / "summary.json") == summary
    assert [row["step"] for row in evals(run_dir)] == [3]


def test_other_data_than_the_runs_are_named(here, run_dir):
    assert here(f"run={run_dir}", "eval=[knn]", "data.seed=1") == 0
    assert "digits/knn20_20pct_top1" in read_json(run_dir / "summary.json") and "knn20_20pct_top1" not in read_json(
        run_dir / "summary.json"
    )


def test_an_mlflow_run_id_finds_the_directory_below_runs(here, run_dir, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    moved = Path(shutil.move(run_dir, tmp_path / "runs" / "it"))
    (moved / "mlflow.json").write_text(json.dumps({"run_id": "0123456789abcdef" * 2}))
    assert pretrained.locate("0123456789abcdef" * 2).run_dir == Path("runs/it")
    assert here("run=" + "f" * 32) == 2
    assert "no run below" in capsys.readouterr().err


def test_without_mlflow_a_run_that_was_tracked_there_is_evaluated_into_its_ledger(here, run_dir, monkeypatch, capsys):
    recorded = OmegaConf.load(run_dir / "config.yaml")
    recorded.tracking = {
        "_target_": "caco.tracking.mlflow.MLflowTracker",
        "uri": "http://nowhere:1",
        "experiment": "caco",
    }
    OmegaConf.save(recorded, run_dir / "config.yaml")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert here(f"run={run_dir}", "eval=[knn]") == 0
    told = f"MLflow is not installed: the ledger keeps everything, and `python -m caco.tracking.sync {run_dir.name}`"
    assert told in capsys.readouterr().err
    assert "knn20_20pct_top1" in evals(run_dir)[-1]
    assert here(f"run={run_dir}", "eval=[knn]", "tracking=mlflow") == 2
    assert "tracking=mlflow: MLflow is not installed; to install it: " in capsys.readouterr().err


def test_weights_from_elsewhere_get_a_folder_of_their_own(here, run_dir, tmp_path):
    weights = run_dir / "checkpoints" / "step_000000006.pt"
    command = [
        "format=caco",
        "backbone=small_resnet",
        "backbone.width=8",
        "data=digits",
        "augmentation=digits",
        "eval=[knn]",
    ]
    command += ["tracking=ledger", "precision=fp32", "loader.num_workers=0"]
    assert here(f"weights={weights}", *command) == 0
    [folder] = (tmp_path / "evaluations").iterdir()
    assert folder.name.startswith("step_000000006-")
    assert here(f"run={run_dir}", "eval=[knn]") == 0
    assert (
        read_json(folder / "summary.json")["knn20_20pct_top1"]
        == read_json(run_dir / "summary.json")["knn20_20pct_top1"]
    )
    assert here(f"weights={weights}", *command, "to=mine") == 0
    assert read_json(tmp_path / "mine" / "summary.json") == read_json(folder / "summary.json")


def test_a_checkpoint_of_another_architecture_is_refused_with_its_keys(here, run_dir, capsys):
    assert here(f"run={run_dir}", "eval=[knn]", "backbone=resnet18") == 2
    assert "another architecture than the backbone's; keys:" in capsys.readouterr().err


def test_evaluators_that_need_labels_say_so(here, run_dir, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "bare").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16)).save(tmp_path / "bare" / f"{i}.png")
    assert here(f"run={run_dir}", "eval=[linear]", "data=folder", f"data.root={tmp_path / 'bare'}") == 2
    assert "eval.linear: linear evaluation needs labelled train and test images" in capsys.readouterr().err


def test_test_images_that_were_trained_on_are_refused_unless_told(here, run_dir, tmp_path, capsys):
    from PIL import Image

    for split, count in (("train", 30), ("test", 3)):
        for c in ("a", "b"):
            (tmp_path / "set" / split / c).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (i, 0, 200 * (c == "a"))).save(tmp_path / "set" / split / c / f"{i}.png")
    command = [f"run={run_dir}", "eval=[knn]", "eval.knn.fraction=1", "data=folder", f"data.root={tmp_path / 'set'}"]
    assert here(*command) == 2
    assert "6 of the 6 images of folder/test are images of folder/train too" in capsys.readouterr().err
    assert here(*command, "overlap=allow") == 0


def test_a_run_that_another_process_trains_is_left_alone(run_dir, tmp_path):
    hold = (
        "import sys, time; from caco.runs.directory import hold; from pathlib import Path;"
        f" hold(Path({str(run_dir)!r})); print(1, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        command = [sys.executable, "-m", "caco.evaluate", f"run={run_dir}", "eval=[knn]"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
        holder.kill()
    assert done.returncode == 2 and "is in use: process" in done.stderr and "Traceback" not in done.stderr


def test_two_ranks_train_the_classifiers_that_one_trains(here, run_dir):
    """The linear classifier makes five steps, which are convex; the whole network makes two at a rate of 0.014, so that
    rounding errors stay small.

    A float32 network of some twenty layers rounds statistics and gradients by about 1e-6 of their size. Another share
    of the images, or the gradients of one rank alone, would change them by hundredths.
    """
    command = [f"run={run_dir}", "eval=[linear,semi,knn]", "eval.linear.epochs=1"]
    command += ["eval.linear.batch=256", "eval.linear.larc=false", "eval.linear.lr=1", "eval.semi.fractions=[0.1]"]
    command += ["eval.semi.epochs=[1]", "eval.semi.batch=70", "batch=200", "device=cpu"]
    states = {}
    for world in (1, 2):
        arguments = [*command, f"to={run_dir.parent / str(world)}"]
        if world == 1:
            assert here(*arguments) == 0
        else:
            codes, outputs = ranks(world, caco_evaluate, *arguments)
            assert codes == [0] * world, outputs[0][1][-3000:]
        folder = run_dir.parent / str(world) / "evaluations" / "classifiers"
        states[world] = {
            path.parent.name.partition("_")[0]: load(path)["network"] for path in folder.glob("*/step_*.pt")
        }
    assert states[1].keys() == states[2].keys() == {"linear", "semi"}
    for name, state in states[1].items():
        assert {k.removeprefix("0.") for k in state} == {k.removeprefix("0.") for k in states[2][name]}
        for key, value in state.items():
            torch.testing.assert_close(
                value.float(), states[2][name][key].float(), rtol=1e-4, atol=1e-5, msg=f"{name} {key}"
            )


def test_linear_evaluation_at_the_end_of_training_gives_what_it_gives_afterwards(tmp_path, here, run_dir):
    linear = ["eval=[linear]", "eval.linear.epochs=1", "eval.linear.batch=256", "eval.linear.larc=false"]
    during = train(tmp_path / "during", *TRAINING, *linear)
    assert here(f"run={run_dir}", *linear, "batch=64") == 0
    name = "linear_epochs-1_batch-256_larc-no_top1"
    # Equal up to one image of 397, because other batches are rounded differently, which may change an image between two
    # classes.
    assert read_json(run_dir / "summary.json")[name] == pytest.approx(during[name], abs=0.26)
