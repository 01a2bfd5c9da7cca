"""The configuration that a command line of caco.evaluate composes to: the recorded parts of a run are taken, and what
is wrong is refused before torch is imported.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny import compose

from caco.config import pretrained
from caco.errors import UserError


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """What composing needs of a finished run: its configuration, and that there is a checkpoint."""
    (tmp_path / "tiny" / "checkpoints").mkdir(parents=True)
    (tmp_path / "tiny" / "checkpoints" / "step_000000006.pt").write_bytes(b"a checkpoint")
    (tmp_path / "tiny" / "config.yaml").write_text(OmegaConf.to_yaml(compose("eval=[]"), resolve=True))
    return tmp_path / "tiny"


def test_the_parts_that_the_run_recorded_are_taken_unless_chosen_anew(run_dir):
    cfg = pretrained.compose("evaluate", [f"run={run_dir}"])
    assert (cfg.backbone.width, cfg.precision, cfg.loader.num_workers, cfg.data.size, cfg.batch) == (
        8,
        "fp32",
        0,
        16,
        64,
    )
    assert list(cfg.eval) == ["knn", "linear"]
    cfg = pretrained.compose(
        "evaluate", [f"run={run_dir}", "data=folder", "data.root=/images", "precision=bf16", "seed=3"]
    )
    assert "size" not in cfg.data and cfg.data.root == "/images" and (cfg.precision, cfg.seed) == ("bf16", 3)


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ([], "expected run=RUN or weights=FILE, got neither"),
        (["run={run}", "weights={file}", "format=caco"], "expected run=RUN or weights=FILE, got both"),
        (["run=nowhere"], "run: expected a run's directory, a checkpoint file or an MLflow run id, got nowhere"),
        (["run={run}/checkpoints"], "with a config.yaml, got {run}/checkpoints, which has none"),
        (["run={run}/config.yaml"], "expected a checkpoint file inside its run's directory"),
        (["run={run}", "eval=[knn,linaer]"], "eval=linaer: no such option; did you mean linear"),
        (["run={run}", "eval=[]"], "eval: expected at least one evaluator"),
        (["run={run}", "eval.linear.epoch=3"], "eval.linear.epoch: no such key; did you mean epochs?"),
        (["run={run}", "eval.linear.batch=many"], "eval.linear.batch: expected int from 2, got 'many' (str)"),
        (["run={run}", "bach=3"], "bach: no such key; did you mean batch or cache?"),
        (["run={run}", "batch=0"], "batch: expected at least 1 image, got 0"),
        (["run={run}", "overlap=ignore"], "overlap: expected refuse or allow, got 'ignore'"),
        (["run={run}", "seed=0,1"], "expected one value for each key, got several"),
        (["weights={file}", "format=caco"], "backbone: must be given, as backbone=..."),
        (
            ["weights={file}", "format=moca", "backbone=resnet18", "data=digits"],
            "or one of caco, adco, moco, torchvision, ",
        ),
        (["run={run}", "epochs=3"], "epochs: no such key"),
    ],
)
def test_a_mistake_is_refused_with_what_was_expected(run_dir, overrides, expected):
    filled = [item.format(run=run_dir, file=run_dir / "checkpoints" / "step_000000006.pt") for item in overrides]
    with pytest.raises(UserError) as refusal:
        pretrained.compose("evaluate", filled or ["device=cpu"])
    if not overrides:
        expected = "backbone: must be given"  # the first setting that is missing
    assert expected.format(run=run_dir) in str(refusal.value)


def test_refusals_and_help_come_without_torch(run_dir):
    code = f"""
        import sys
        from caco import evaluate, export
        from caco.config import pretrained
        for overrides in (["run=nowhere"], ["run={run_dir}", "eval=[linaer]"], ["run={run_dir}", "eval.knn.k=x"]):
            try:
                pretrained.compose("evaluate", overrides)
            except pretrained.UserError:
                continue
            sys.exit("accepted")
        sys.argv = ["caco-evaluate", "--help"]
        evaluate.main()
        sys.argv = ["caco-evaluate", "run={run_dir}", "--cfg", "job"]
        evaluate.main()
        imported = sorted({{"torch", "timm", "mlflow", "sklearn"}} & set(sys.modules))
        sys.exit(f"imported {{imported}}" if imported else 0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "finetune, geometry, knn" in " ".join(done.stdout.split()) and "weights_digest: null" in done.stdout
