"""In runs on images with the numbers that their files store (data.channels=N), the network's first layer follows the
number of channels. Such a run notes the mean and deviation that it measured, is evaluated and exported with them, and
resumes to the same bits. Settings that need red, green and blue are refused before anything is read.
"""

import json
import signal

import numpy as np
import pytest
import torch
from interrupted import train_killed
from PIL import Image
from processes import Process, caco_train
from recorded import assert_same, final, record
from tiny import TINY

import caco
from caco.config.composition import compose, job_config
from caco.config.validation import check
from caco.data.sets.folders import folder
from caco.engine.channels import backbone_of
from caco.errors import UserError
from caco.runs.identity import identity


def test_the_setting_is_no_part_of_the_identity_of_a_run_of_photographs():
    names = identity(job_config(compose(["data=folder", "data.root=/nowhere"])))
    assert not {"data.channels", "data.mean", "data.std"} & names.keys()
    assert identity(job_config(compose(["data=folder", "data.root=/nowhere", "data.channels=4"])))["data.channels"] == 4


BASE = ["data=folder", "data.root=/nowhere", "data.channels=4", "tracking=ledger"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["augmentation.views.first.gray_p=0.2"],
            r"augmentation.views.first.gray_p: images of 4 channels have no hue, saturation or grey",
        ),
        (
            ["augmentation.views.first.jitter=[0.4,0.4,0.2,0.1]"],
            "augmentation.views.first.jitter: images of 4 channels have no hue",
        ),
        (
            ["augmentation.mean=[0.5,0.5,0.5]"],
            "augmentation.mean: applies to photographs only; with data.channels=4 set data.mean",
        ),
        (["augmentation=infomin", "method=infomin"], "~augmentation.views.both.then"),
        (["augmentation=cmc", "method=cmc"], "augmentation.colours: expected rgb with data.channels=4"),
        (["eval=[transfer]", "eval.transfer.root=/nowhere"], "eval.transfer: this evaluator reads its own photographs"),
        (["backbone.in_channels=4"], "in_channels"),
    ],
)
def test_what_needs_red_green_and_blue_is_refused_before_anything_is_read(overrides, expected):
    cfg = None
    with pytest.raises(Exception, match=expected):  # noqa: B017 - Hydra's own error for an unknown key
        cfg = compose([*BASE, *overrides])
        check(job_config(cfg), overrides=[*BASE, *overrides], choices=dict(cfg.hydra.runtime.choices))


def test_what_stays_of_a_recipe_is_not_refused():
    overrides = [
        *BASE,
        "augmentation.views.first.gray_p=0",
        "augmentation.views.first.jitter=[0.4,0.4,0,0]",
        "~augmentation.views.second",
    ]
    cfg = compose(overrides)
    check(job_config(cfg), overrides=overrides, choices=dict(cfg.hydra.runtime.choices))


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "name",
    [
        "resnet18_cifar",
        "small_resnet",
        *(pytest.param(name, marks=LONG) for name in ("resnet18", "vit_small", "mocov3_vit_small", "resnet50_preact")),
    ],
)
def test_the_first_layer_follows(name):
    node = job_config(compose([f"backbone={name}"])).backbone
    with torch.device("meta"):
        network = backbone_of(node, 7)
        first = next(module for module in network.modules() if isinstance(module, torch.nn.Conv2d))
        assert first.in_channels == 7
        assert network.eval()(torch.empty(2, 7, 224, 224)).shape == (2, network.num_features)


def torchvision_resnet():
    from torchvision.models import resnet18

    network = resnet18(num_classes=1)
    network.fc, network.num_features = torch.nn.Identity(), 512
    return network


def test_the_first_layer_of_a_network_of_ones_own_follows_too():
    network = backbone_of({"_target_": f"{__name__}.torchvision_resnet"}, 2)
    assert network.conv1.in_channels == 2 and network(torch.zeros(2, 2, 32, 32)).shape == (2, 512)


RUN = [
    *(item for item in TINY if not item.startswith(("data=", "augmentation=", "batch=", "eval="))),
    "data=folder", "data.channels=5", "augmentation=cifar", "augmentation.size=16", "batch=10", "bank.size=20",
    "eval=[knn,probe]", "eval.knn.k=2",
]  # fmt: skip


def test_a_run_notes_what_it_measured_and_is_evaluated_and_exported_with_it(spectra, tmp_path, capfd, monkeypatch):
    from caco import evaluate, export
    from caco.engine.training import run_training

    run_dir, overrides = tmp_path / "run", [*RUN, f"data.root={spectra}"]
    cfg = compose(overrides)
    check(job_config(cfg), overrides=overrides, choices=dict(cfg.hydra.runtime.choices))
    summary = run_training(job_config(cfg), run_dir)
    assert {"knn2_20pct_top1", "probe_top1"} <= summary.keys()
    noted = json.loads((run_dir / "channels.json").read_text())
    assert noted["channels"] == len(noted["mean"]) == len(noted["std"]) == 5
    said = capfd.readouterr().err
    assert "mean and standard deviation of each channel, measured on folder/train" in said
    assert "the recipe's saturation, hue, grey are left out of the views" in said

    for command, arguments in (
        (evaluate, ["eval=[knn_all]", "eval.knn.k=2", "baselines=true"]),
        (export, [f"to={tmp_path / 'out'}"]),
    ):
        monkeypatch.setattr("sys.argv", ["caco", f"run={run_dir}", *arguments])
        command.main()
    assert "measured on" not in capfd.readouterr().err  # the run's own values are used
    card = (tmp_path / "out" / "README.md").read_text()
    assert "5 channels as stored" in card and str(noted["mean"]) in card


@LONG
def test_a_run_on_grey_of_16_bits_killed_at_whatever_instants_goes_on_to_the_same_bits(tmp_path):
    draw = np.random.default_rng(0)
    for number in range(40):
        file = tmp_path / "images" / f"{number:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 65536, (16, 16), dtype=np.uint16)).save(file)
    command = [
        *(word for word in RUN if not word.startswith(("eval", "data.channels"))), "data.channels=1", "eval=[]",
        f"data.root={tmp_path / 'images'}", "epochs=3", "checkpoint.every_steps=2", "loader.num_workers=1",
    ]  # fmt: skip
    code, _, told = Process(caco_train, *command, f"hydra.run.dir={tmp_path}/whole").end()
    assert code == 0 and "mean and standard deviation of each channel, measured on" in told, told
    command.append(f"hydra.run.dir={tmp_path}/killed")
    for seconds in draw.uniform(0.001, 0.05, 4):
        code, _, told = Process(train_killed, seconds, *command).end()
        assert code == -signal.SIGPROF and not (tmp_path / "killed" / "summary.json").exists(), told
    code, _, told = Process(caco_train, *command).end()
    assert code == 0 and "measured on" not in told, told
    assert_same(final(tmp_path / "whole"), final(tmp_path / "killed"))
    assert record(tmp_path / "whole") == record(tmp_path / "killed")
    assert (tmp_path / "whole/channels.json").read_bytes() == (tmp_path / "killed/channels.json").read_bytes()


def test_weights_of_any_number_of_channels_are_exported_once_it_is_said_what_they_are(tmp_path, monkeypatch, capsys):
    import timm
    from safetensors.torch import load_file

    from caco import export

    network = timm.create_model("resnet18", num_classes=0, in_chans=2)
    torch.save(network.state_dict(), tmp_path / "two.pth")

    def exported(*words):
        monkeypatch.setattr("sys.argv", ["caco", *words, "layouts=[timm]", f"to={tmp_path / 'out'}"])
        try:
            export.main()
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    weights = [f"weights={tmp_path / 'two.pth'}", "backbone=resnet18"]
    said = ["data.channels=2", "data.mean=[0.3,0.1]", "data.std=[0.2,0.5]"]
    for words, expected in (
        (weights, "conv1.weight"),
        (
            [*weights, *said[:2]],
            "data: expected data.channels=N together with data.mean and data.std of N values each",
        ),
    ):
        code, told = exported(*words)
        assert code == 2 and expected in told, told
    assert not (tmp_path / "out").exists()
    assert exported(*weights, *said)[0] == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in network.state_dict().items())
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    about = timm.data.resolve_model_data_config(again)
    assert (again.conv1.in_channels, list(about["mean"]), list(about["std"])) == (2, [0.3, 0.1], [0.2, 0.5])

    data = {"data.channels": 2, "data.mean": [0.3, 0.1], "data.std": [0.2, 0.5]}
    loaded, preprocess = caco.load(weights=tmp_path / "two.pth", backbone="resnet18", **data)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in network.state_dict().items())
    pixels = preprocess(np.full((260, 260, 2), 0.5, np.float32))
    assert pixels.shape[0] == 2 and pixels.flatten(1).mean(1).tolist() == pytest.approx([1.0, 0.8], abs=1e-3)


def test_a_beton_is_refused_with_the_reason(spectra, tmp_path):
    from caco.write import write_splits

    with pytest.raises(UserError, match="a .beton file holds photographs as 8-bit RGB"):
        write_splits(folder(root=str(spectra), channels=5), tmp_path)


@LONG
def test_a_plan_counts_the_channels():
    from caco.plan import plan

    with_more, with_three = (
        plan(
            job_config(compose([*BASE[:2], "backbone=small_resnet", "batch=16", f"data.channels={count}"])), images=100
        )
        for count in (64, 3)
    )
    assert with_more["model_flops_per_step"] > with_three["model_flops_per_step"]
    assert with_more["activation_bytes"] > with_three["activation_bytes"]
