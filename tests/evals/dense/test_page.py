"""docs/dense.md: every command that it prints is accepted, the calibrations run from end to end on toy sets, and the
page's numbers are those of caco.plan.
"""

import re
import shlex
import sys

import pytest
import torch
import torchvision
from omegaconf import OmegaConf
from tiny import compose, train

from caco import evaluate, plan
from caco.config import pretrained
from caco.runs.files import read_json
from experiments.toy_sets import whole

# For every published recipe, the smallest sizes that run.
SMALL = {
    "segment": ["train=train", "images=2", "steps=1", "crop=65", "channels=16"],
    "detect": [
        "images=2", "steps=1", "warmup_steps=0", "short_sides=[64]", "test_side=64", "longest=96", "anchors=[8,16,24]",
        "proposal_samples=16", "region_samples=8", "region_cells=4", "precise_batches=1",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def commands(repo_root) -> list[list[str]]:
    """The words after `python -m` of each command on the page."""
    blocks = re.findall(r"```console\n(.*?)```", (repo_root / "docs/dense.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line.partition("#")[0])[line.split().index("-m") + 1 :] for line in lines]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with the toy sets, and with weights of a ResNet-18 in torchvision's and MoCo's formats under the names
    that the page uses.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("caco.runs.directory._locks", {})
    whole.draw(tmp_path / "toys")
    torch.manual_seed(0)
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, "resnet50-0676ba61.pth")
    moco = {f"module.encoder_q.{name}": tensor for name, tensor in state.items() if not name.startswith("fc.")}
    heads = {f"module.encoder_q.fc.{i}.{part}": torch.zeros(8) for i in (0, 2) for part in ("weight", "bias")}
    torch.save(
        {"epoch": 200, "arch": "resnet50", "state_dict": moco | heads | {"module.queue": torch.zeros(8, 32)}},
        "moco_v2_200ep_pretrain.pth.tar",
    )
    return tmp_path


def calibrations(commands) -> list[list[str]]:
    return [
        words[1:]
        for words in commands
        if words[0] == "caco.evaluate" and any(word.startswith("weights=") for word in words)
    ]


def test_the_page_has_a_calibration_of_segmentation_by_labels_and_by_moco_and_one_of_detection(commands):
    kinds = [{word.partition("=")[0]: word.partition("=")[2] for word in words} for words in calibrations(commands)]
    assert [(kind["format"], kind["eval"]) for kind in kinds] == [
        ("torchvision", "[segment]"), ("moco", "[segment]"), ("moco", "[detect]"),
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(3))
def test_each_calibration_runs_on_toy_sets(commands, files, number, monkeypatch, capsys):
    """The commands are as printed, except for ResNet-18 instead of ResNet-50 and a recipe of a few steps; the network
    has the weights of the file.
    """
    words = calibrations(commands)[number]
    (evaluator,) = re.findall(r"eval=\[(\w+)\]", " ".join(words))
    words = [word.replace("PATH", "toys").replace("backbone=resnet50", "backbone=resnet18") for word in words]
    words += [f"eval.{evaluator}.{setting}" for setting in SMALL[evaluator]] + ["tracking=ledger", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["caco-evaluate", *words])
    evaluate.main()
    folder = next(word.partition("=")[2] for word in words if word.startswith("to="))
    summary = read_json(files / folder / "summary.json")
    wanted = "voc2012_miou" if evaluator == "segment" else "voc2007_ap50"
    (name,) = (name for name in summary if name.endswith(wanted))
    assert 0 <= summary[name] <= 100 and f"{name} " in (said := capsys.readouterr()).out
    assert re.search(r"training on 12 images, \d+ steps of 2 images", said.err)


@pytest.mark.long
def test_every_other_command_can_be_typed(commands, files, monkeypatch, capsys):
    run = files / "tiny"
    train(run, "max_steps=1", "epochs=1", "eval=[]", "bank.size=64")
    (run / "config.yaml").write_text(
        OmegaConf.to_yaml(compose("max_steps=1", "epochs=1", "eval=[]", "bank.size=64"), resolve=True)
    )
    kinds = []
    for program, *words in commands:
        kinds.append(program)
        if program == "caco.evaluate":
            cfg = pretrained.compose(
                "evaluate", [word.replace("RUN", str(run)).replace("PATH", "toys") for word in words]
            )
            assert all(node.root == "toys" for node in cfg.eval.values())
        elif program == "experiments.toy_sets":
            assert words == ["TOYS"], "tests/experiments/test_adco_page.py runs this command"
    assert set(kinds) == {"caco.evaluate", "caco.plan", "experiments.toy_sets"}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_page_s_arithmetic_is_that_of_its_plan_command(commands, repo_root):
    """This checks images, GFLOP and hours in both tables."""
    (words,) = (words for program, *words in commands if program == "caco.plan")
    lines = plan._main(words).splitlines()
    page = (repo_root / "docs/dense.md").read_text()
    rows = re.findall(r"^\| `(\w+)`, (\w+) \| ([\d,]+)[^|]*\| ([\d,]+) \| ([\d.]+)", page, re.MULTILINE)
    assert len(rows) == 9
    for evaluator, part, images, gflop, hours in rows:
        end = {"training": "to train on", "testing": "to test on", "features": "to take features of"}[part]
        protocol = {"segment": "segment_fcn16:", "dense_linear": "dense_linear:", "detect": "detect_voc_c4:",
        "detect_coco": "detect_coco_c4_1x:",
                    "detect_coco_fpn": "detect_coco_fpn_1x:"}[evaluator]  # fmt: skip
        (line,) = (line for line in lines if line.startswith(protocol) and f"{end}: " in line)
        found = re.search(r": ([\d,]+) of ([\d.]+) GFLOP, an estimated ([\d.e-]+) hours at 60 TFLOP/s$", line)
        assert found[1] == images and float(found[2]) == pytest.approx(float(gflop.replace(",", "")), rel=0.01), line
        assert float(found[3]) == pytest.approx(float(hours), rel=0.05), line
