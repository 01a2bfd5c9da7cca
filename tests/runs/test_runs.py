"""The identity of a run, and its directory."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from omegaconf import OmegaConf

from caco.config.composition import compose
from caco.errors import UserError
from caco.launch.labels import SWEEP, label, sweep_label
from caco.runs import renamed
from caco.runs.directory import open_run, write_config
from caco.runs.files import read_json
from caco.runs.identity import differences, flat, identity, run_hash, short_name
from caco.tracking.ledger import read_rows
from caco.tracking.store import own_uri

CFG = {
    "name": "caco",
    "batch": 64,
    "epochs": 10,
    "seed": 0,
    "log_every_steps": 10,
    "eval_every_epochs": 1,
    "checkpoint": {"every_epochs": 1, "milestone_epochs": []},
    "bank": {"size": 1024, "lr": 3.0},
    "data": {"_target_": "caco.data.sets.folders.folder", "root": "/images", "limit": None},
    "loader": {"_target_": "caco.data.loaders.torch_loader.TorchLoader", "num_workers": 2, "prefetch": 4},
    "tracking": {"_target_": "caco.tracking.ledger.LedgerTracker"},
    "views": [{"blur": 0.5}],
}


def changed(key: str, value) -> dict:
    cfg = OmegaConf.create(CFG)
    OmegaConf.update(cfg, key, value)
    container = OmegaConf.to_container(cfg)
    assert isinstance(container, dict)
    return container


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.root", "/elsewhere"),
        ("loader.num_workers", 0),
        ("loader.prefetch", 1),
        ("loader._target_", "caco.data.loaders.ffcv_loader.FFCVLoader"),
        ("log_every_steps", 1),
        ("eval_every_epochs", 5),
        ("checkpoint.every_epochs", 2),
        ("checkpoint.milestone_epochs", [5]),
        ("tracking._target_", "caco.tracking.mlflow.MLflowTracker"),
        ("name", "other"),
    ],
)
def test_paths_workers_cadence_tracking_and_name_leave_the_identity_alone(key, value):
    assert run_hash(changed(key, value)) == run_hash(CFG)


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", 1),
        ("epochs", 11),
        ("batch", 128),
        ("bank.size", 2048),
        ("bank.lr", 0.3),
        ("bank", None),
        ("data.limit", 100),
        ("data._target_", "caco.data.sets.folders.imagenet"),
        ("loader.corrupt", "skip"),
        ("views", []),
        ("views", [{"blur": 0.5}, {"blur": 0.5}]),
    ],
)
def test_what_can_change_a_number_changes_the_identity(key, value):
    assert run_hash(changed(key, value)) != run_hash(CFG)


def test_the_hash_does_not_depend_on_order_or_on_how_a_number_is_written():
    assert run_hash(dict(reversed(CFG.items()))) == run_hash(CFG)
    assert run_hash(changed("bank.lr", 3)) == run_hash(CFG)
    assert run_hash(changed("bank.lr", True)) != run_hash(changed("bank.lr", 1))


def test_the_hash_is_ten_hexadecimal_digits_that_do_not_change_from_version_to_version():
    assert run_hash({"batch": 64, "bank": {"lr": 0.5}}) == "5c56178e50"


def test_neutral_keys_are_keys_that_exist():
    """A key that was renamed, but not in this list, would silently become part of the identity."""
    known = set(flat(compose(["tracking=ledger"]))) | set(flat(compose(["data=folder"])))
    for key in ("data.root", "data.labelled_root", "data.in_memory_mb", "loader.num_workers", "loader.prefetch"):
        assert key in known and key not in identity(compose(["data=folder"]))


def test_flat_names_leaves_by_path():
    assert flat({"a": {"b": [1, {"c": 2}]}, "d": [], "e": None}) == {"a.b.0": 1, "a.b.1.c": 2, "d": [], "e": None}


def test_flat_resolves_and_leaves_out_hydras_own_part():
    leaves = flat(compose(["batch=64"]))
    assert leaves["optimizer.batch"] == 64
    assert not any(key.startswith("hydra") for key in leaves)


@pytest.mark.parametrize(
    "overrides, name",
    [
        ([], "default"),
        (["pn=positive", "bank=12M"], "bank-12M_pn-positive"),
        (["bank=12M", "pn=positive"], "bank-12M_pn-positive"),
        (["data.root=/images", "loader.num_workers=8", "tracking=ledger", "launcher=slurm"], "default"),
        (["eval=[knn,probe]"], "eval-knn-probe"),
        (["+a.b='x y/../z'"], "a.b-x-y-..-z"),
        (["bank.lr=3.0e-1"], "bank.lr-3.0e-1"),
    ],
)
def test_short_names_say_what_differs_and_are_safe_in_a_path(overrides, name):
    assert short_name(overrides) == name


def test_short_names_are_short():
    assert len(short_name([f"key{number}=value" for number in range(100)])) <= 160


def test_a_run_is_labelled_by_what_was_typed_and_in_a_sweep_by_what_tells_it_apart(monkeypatch):
    monkeypatch.delenv(SWEEP, raising=False)
    cfg = compose(["preset=smoke", "pn=none", "loader.num_workers=1", "seed=1"])
    alone = label(cfg.hydra)
    assert (alone.name, alone.sweep) == ("preset=smoke pn=none seed=1", None)
    assert (alone.choices["pn"], alone.choices["bank"], alone.choices["method"]) == ("none", "tiny", "caco_small")
    assert label(compose([]).hydra).name == "default"
    command = ["preset=smoke", "pn=none,both", "loader.num_workers=1", "seed=1,2"]
    monkeypatch.setenv(SWEEP, sweep_label(command, ["pn", "seed"], 4))
    within = label(cfg.hydra)
    assert (within.name, within.sweep["jobs"], within.sweep["title"]) == (
        "pn=none seed=1",
        4,
        "preset=smoke pn=none,both seed=1,2",
    )
    again = json.loads(sweep_label([*reversed(command), "launcher=slurm", "hydra/sweeper=optuna"], ["seed", "pn"], 1))
    assert again["name"] == within.sweep["name"], (
        "the same sweep must keep its name in another order, from another folder and half done"
    )


def test_the_same_command_gets_the_same_directory_and_another_gets_another():
    def directory(*overrides):
        return compose(list(overrides)).hydra.run.dir

    assert directory("bank=12M", "batch=4096") == directory("batch=4096", "bank=12M", "data.root=/images")
    assert directory("bank=12M", "batch=4096").startswith("runs/caco/bank-12M_batch-4096-")
    assert directory("seed=1") != directory("seed=2")
    assert directory("name=sizes", "bank=12M").startswith("runs/sizes/bank-12M-")


def test_a_job_of_a_sweep_gets_the_directory_that_it_has_alone():
    cfg = compose(["bank=12M", "seed=3"])
    assert f"{cfg.hydra.sweep.dir}/{cfg.hydra.sweep.subdir}" == cfg.hydra.run.dir


def test_a_directory_can_be_named_by_hand():
    assert compose(["hydra.run.dir=/somewhere/mine"]).hydra.run.dir == "/somewhere/mine"


def test_open_run_records_configuration_and_environment(tmp_path):
    cfg = compose(["preset=demo"])
    open_run(tmp_path / "run", cfg)
    recorded = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert flat(recorded) == flat(cfg)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {"git_sha", "python", "torch", "command"} <= environment.keys()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "config.yaml", "environment.json"]


def test_a_run_that_is_done_keeps_the_record_of_where_it_ran(tmp_path):
    open_run(tmp_path, CFG)
    for name in ("environment.json", "summary.json"):
        (tmp_path / name).write_text("{}")
    open_run(tmp_path, CFG)
    assert (tmp_path / "environment.json").read_text() == "{}"


def test_the_same_run_opens_again_elsewhere_with_more_workers(tmp_path):
    open_run(tmp_path, CFG)
    open_run(tmp_path, changed("loader.num_workers", 16))
    assert OmegaConf.load(tmp_path / "config.yaml").loader.num_workers == 2, (
        "the record must not change yet, because the images may turn out to be others"
    )
    write_config(tmp_path, changed("loader.num_workers", 16))  # as training does when it resumes
    assert OmegaConf.load(tmp_path / "config.yaml").loader.num_workers == 16


def test_another_run_is_refused_with_the_difference_and_leaves_the_first_alone(tmp_path):
    open_run(tmp_path, CFG)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match="holds another run") as caught:
        open_run(tmp_path, changed("bank.size", 2048) | {"seed": 7})
    assert "bank.size: there 1024, here 2048" in str(caught.value)
    assert "seed: there 0, here 7" in str(caught.value)
    assert "batch" not in str(caught.value)
    assert (tmp_path / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    "content", [b"", b"\n", bytes(64), b"\xff\xfe", b"batch: [", b"- 1", b"5", b"batch: ${nothing}"]
)
def test_a_record_that_is_damaged_is_named_by_all_that_read_it(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    for read in (renamed.read_config, renamed.Names.of, own_uri, lambda run_dir: open_run(run_dir, CFG)):
        with pytest.raises(UserError, match=r"config\.yaml is damaged \(.*\): take it from a copy of the run"):
            read(tmp_path)
    assert (tmp_path / "config.yaml").read_bytes() == content


@pytest.mark.parametrize("content", ["", "[1]", "null", "7", '{"a"'])
def test_a_small_file_that_is_damaged_is_named(tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"summary\.json is damaged \(.*\): remove it, or take it from a copy"):
        read_json(tmp_path / "summary.json")
    (tmp_path / "ledger.jsonl").write_text(f"{content or 7}\n")
    with pytest.raises(UserError, match=r"ledger\.jsonl: expected one JSON object a line"):
        read_rows(tmp_path / "ledger.jsonl")


def test_differences_tell_absent_from_null():
    assert differences({"a": None}, {"a": 1, "b": None}) == ["a: there None, here 1", "b: there (absent), here None"]


HOLD = """
    import sys, time
    from caco.runs.directory import open_run
    open_run(sys.argv[1], {"seed": 0})
    if len(sys.argv) > 2:  # a child that outlives its parent, as a loader worker may
        import os
        if os.fork() == 0:
            os.close(1)
            time.sleep(600)
            os._exit(0)
    print("held", flush=True)
    time.sleep(600)  # it is killed before
"""


def hold(run_dir, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(run_dir), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_two_processes_cannot_train_in_one_directory(tmp_path):
    process = hold(tmp_path)
    try:
        with pytest.raises(ValueError, match=f"in use: process {process.pid} on "):
            open_run(tmp_path, {"seed": 0})
    finally:
        process.kill()
        process.communicate()
    open_run(tmp_path, {"seed": 0})


def test_a_killed_run_frees_its_directory_even_if_a_child_lives_on(tmp_path):
    process = hold(tmp_path, "with a child")
    process.kill()
    process.wait()
    try:
        open_run(tmp_path, {"seed": 0})
    finally:
        os.killpg(process.pid, 9)
        process.stdout.close()
