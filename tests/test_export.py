"""Exported weights can be loaded again: by caco, timm and torchvision, and with the names that detectron2 expects."""

import pickle
import re
import resource

import pytest
import safetensors.torch
import timm
import torch
import torchvision

from caco import errors, export
from caco.config.composition import compose, instantiate
from caco.nn.backbones import mocov3_vit, small_resnet, timm_backbone
from caco.nn.weights import load_backbone
from caco.runs.identity import plain

ABOUT = {
    "weights": "runs/x/checkpoints/step_000000006.pt",
    "run": "x",
    "step": 6,
    "summary": {"knn20_top1": 12.345, "loss": 3.0, "data": "digits/train"},
    "augmentation": {"size": 64, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "plain_crop": 0.9},
}
RESNET = {"_target_": "caco.nn.backbones.timm_backbone", "name": "resnet18", "cifar_stem": False}


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    backbone = timm_backbone(name="resnet18").eval()
    with torch.no_grad():  # statistics that differ from those of a new network
        for name, buffer in backbone.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return backbone


@pytest.fixture(scope="module")
def exported(resnet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    files = export.export(resnet, RESNET, ["safetensors", "timm", "torchvision", "detectron2"], folder, ABOUT)
    names = ["README.md", "config.json", "detectron2.pkl", "model.safetensors", "torchvision.pth"]
    assert sorted(file.name for file in files) == sorted(path.name for path in folder.iterdir()) == names
    return folder


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def features(network, images):
    with torch.inference_mode():
        return network.eval()(images)


def test_caco_reads_its_own_export(resnet, exported):
    other = timm_backbone(name="resnet18")
    load_backbone(exported / "model.safetensors", "timm", other)
    assert all(
        torch.equal(a, b) for a, b in zip(resnet.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_timm_makes_the_same_network_from_the_folder_and_knows_its_images(resnet, exported, images):
    model = timm.create_model(f"local-dir:{exported}", pretrained=True)
    assert torch.equal(features(model, images), features(resnet, images))
    data = timm.data.resolve_model_data_config(model)
    assert [list(data[key]) for key in ("input_size", "mean", "std")] == [[3, 64, 64], [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]]
    assert data["crop_pct"] == 0.9


def test_torchvision_takes_all_but_its_classifier(resnet, exported, images):
    model = torchvision.models.resnet18()
    missing, unexpected = model.load_state_dict(
        torch.load(exported / "torchvision.pth", weights_only=True), strict=False
    )
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    model.fc = torch.nn.Identity()
    torch.testing.assert_close(features(model, images), features(resnet, images))


def test_detectron2s_names_and_back(resnet, exported):
    content = pickle.loads((exported / "detectron2.pkl").read_bytes())
    assert content["matching_heuristics"] is True and content["__author__"] == "caco"
    names = content["model"].keys()
    # The names of its ResNets, as detectron2.modeling.backbone.resnet builds them.
    assert {
        "stem.conv1.weight",
        "stem.conv1.norm.running_mean",
        "res2.0.conv1.weight",
        "res2.0.conv1.norm.weight",
    } <= names
    assert {"res3.0.shortcut.weight", "res3.0.shortcut.norm.bias", "res5.1.conv2.norm.running_var"} <= names
    assert not [name for name in names if "layer" in name or "bn" in name or "downsample" in name or "tracked" in name]
    back = {}
    for name, array in content["model"].items():
        stage, _, rest = name.partition(".")
        prefix = "" if stage == "stem" else f"layer{int(stage[3]) - 1}."
        rest = rest.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
        for number in "123":
            rest = rest.replace(f"conv{number}.norm.", f"bn{number}.")
        back[prefix + rest] = torch.from_numpy(array)
    own = {name: value for name, value in resnet.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)


def test_the_card_says_where_it_comes_from_what_it_gave_and_how_to_load_it(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    for said in (
        "resnet18, pre-trained without labels",
        "run `x`, step 6",
        "| knn20_top1 | 12.35 |",
        "digits/train",
        "local-dir:",
    ):
        assert said in card, said
    assert "MODEL.PIXEL_MEAN [102.0, 127.5, 153.0]" in card and "| loss" not in card


def test_each_line_of_python_in_the_card_loads_the_weights_as_printed(resnet, exported, images, monkeypatch):
    monkeypatch.chdir(exported)
    (block,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    lines = [line.replace("FOLDER", str(exported)) for line in block.splitlines() if not line.startswith("#")]
    tensors, model, fits = (eval(line) for line in lines)
    assert tensors.keys() == resnet.state_dict().keys() and fits.missing_keys == ["fc.weight", "fc.bias"]
    assert torch.equal(features(model, images), features(resnet, images)), "the loaded weights must be the trained ones"
    assert 'timm.create_model("local-dir:FOLDER", pretrained=True)' in export.HELP


@pytest.mark.parametrize("own", [{}, {"patch_size": 8, "register_tokens": 2, "pool": "mean", "variant": "dino"}])
def test_a_vit_comes_back_through_timm(tmp_path, own):
    node = plain(compose(["backbone=vit_small"]))["backbone"] | {
        "name": "vit_tiny_patch16_224",
        "image_size": 32,
        **own,
    }
    vit = instantiate(node).eval()
    export.export(vit, node, ["timm"], tmp_path, ABOUT)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(
        features(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), images), features(vit, images)
    )


def test_timm_makes_mocov3_s_vit_with_its_own_number_of_heads():
    node = {
        "_target_": "caco.nn.backbones.mocov3_vit",
        "name": "vit_tiny_patch16_224",
        "num_heads": 12,
        "image_size": 32,
    }
    vit = mocov3_vit(name="vit_tiny_patch16_224", image_size=32)
    config = export.timm_config(vit, node, ABOUT)
    again = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    again.load_state_dict(vit.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert again.blocks[0].attn.num_heads == 12
    assert torch.allclose(again.eval()(images), vit.eval()(images), atol=1e-6)


def test_a_network_that_a_layout_does_not_know_is_refused_before_anything_is_written(tmp_path):
    node = {"_target_": "caco.nn.backbones.small_resnet", "width": 8}
    for layout, expected in (
        ("timm", "timm has no model"),
        ("torchvision", "expects a ResNet"),
        ("detectron2", "expects a ResNet"),
    ):
        with pytest.raises(ValueError, match=expected):
            export.export(small_resnet(width=8), node, ["safetensors", layout], tmp_path / "to", ABOUT)
    with pytest.raises(ValueError, match="timm has no model"):
        export.export(
            timm_backbone(name="resnet18", cifar_stem=True),
            {**RESNET, "cifar_stem": True},
            ["timm"],
            tmp_path / "to",
            ABOUT,
        )
    with pytest.raises(ValueError, match="stem or norms"):
        normed = timm_backbone(name="resnet18", layer_norm=True)
        export.export(normed, {**RESNET, "layer_norm": True}, ["timm"], tmp_path / "to", ABOUT)
    assert not (tmp_path / "to").exists()


def test_a_folder_never_holds_layouts_of_two_networks(resnet, tmp_path):
    """The same layouts may be exported again. Files of other layouts are never left beside the new ones."""
    export.export(resnet, RESNET, ["safetensors", "detectron2"], tmp_path, ABOUT)
    export.export(resnet, RESNET, ["safetensors", "detectron2"], tmp_path, ABOUT)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(errors.UserError, match=r"holds detectron2\.pkl of an earlier .*all layouts in one command"):
        export.export(timm_backbone(name="resnet18"), RESNET, ["safetensors"], tmp_path, ABOUT)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_a_killed_export_was_writing_is_removed_at_once_and_files_of_others_stay(resnet, tmp_path):
    for name in (".README.md.4711", ".config.json.4711", ".model.safetensors.partial", ".notes.4711"):
        (tmp_path / name).touch()
    export.export(resnet, RESNET, ["safetensors"], tmp_path, ABOUT)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "model.safetensors", ".notes.4711"}


@pytest.mark.parametrize("layout", ["safetensors", "torchvision", "detectron2"])
def test_a_disk_that_is_full_is_said_and_leaves_the_files_that_were_there(resnet, tmp_path, layout):
    file = tmp_path / export.FILES[layout][0]
    file.write_text("of before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # a larger file fails as on a full disk
    try:
        with pytest.raises(OSError) as error:
            export.export(resnet, RESNET, [layout], tmp_path, ABOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert errors.is_for_user(error.value), error.value
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "of before"


def test_a_network_of_images_in_another_colour_space_says_so(resnet, tmp_path):
    about = {**ABOUT, "augmentation": {**ABOUT["augmentation"], "colours": "lab"}}
    with pytest.raises(
        ValueError, match="takes images in lab, which only safetensors can record; got safetensors, timm"
    ):
        export.export(resnet, RESNET, ["safetensors", "timm"], tmp_path / "to", about)
    assert not (tmp_path / "to").exists()
    export.export(resnet, RESNET, ["safetensors"], tmp_path / "to", about)
    assert r"Images: L*a*b* (scikit-image's rgb2lab), 64 px" in (tmp_path / "to" / "README.md").read_text()


def test_a_runs_backbone_is_exported_from_the_command_line(tmp_path, monkeypatch, capsys):
    from omegaconf import OmegaConf
    from tiny import compose as tiny
    from tiny import train

    from caco.runs.checkpoint import load

    settings = ["max_steps=2", "epochs=1", "eval=[]", "bank.size=64"]
    train(tmp_path / "run", *settings)
    (tmp_path / "run" / "config.yaml").write_text(OmegaConf.to_yaml(tiny(*settings), resolve=True))
    monkeypatch.setattr("sys.argv", ["caco-export", f"run={tmp_path / 'run'}", f"to={tmp_path / 'to'}"])
    export.main()
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "to" / name) for name in ("model.safetensors", "README.md")
    ]
    written = safetensors.torch.load_file(tmp_path / "to" / "model.safetensors")
    trained = load(tmp_path / "run" / "checkpoints" / "step_000000002.pt")["method"]
    assert all(torch.equal(value, trained[f"encoder.backbone.{name}"]) for name, value in written.items())

    for arguments, expected in (
        ([f"run={tmp_path / 'run'}"], "to: expected the folder to write to"),
        (
            [f"run={tmp_path / 'run'}", "to=x", "layouts=[onnx]"],
            "layouts: expected some of safetensors, timm, torchvision, detectron2",
        ),
    ):
        monkeypatch.setattr("sys.argv", ["caco-export", *arguments])
        with pytest.raises(SystemExit) as end:
            export.main()
        assert end.value.code == 2 and expected in capsys.readouterr().err
