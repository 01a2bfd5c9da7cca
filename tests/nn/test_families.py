"""Released checkpoints of other families are recognised by their keys and read completely or refused; every tensor is
accounted for, and no code in them is run.
"""

import argparse
import sys
import types
from pathlib import Path

import families
import numpy as np
import pytest
import timm
import torch
import torchvision
from families import below
from released import assert_holds, copy_of, noise, resnet, saved
from timm.models.resnet import Bottleneck, ResNet

from caco.errors import UserError
from caco.nn.formats import FAMILIES, FORMATS, reading
from caco.nn.weights import initialise, load_backbone

VIT = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 0}


def vit(**options):
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, **options})


# (function that makes a file, format, name in messages, network whose backbone is used, tensors that are left out)
MOMENTUM, LABELS = "bank's momentum", "classifier trained with labels"
CASES = [
    ("moco_v1", "moco", "MoCo v1 or PCL v1", "online", {}),
    ("moco_v2", "moco", "MoCo v2 or PCL v2", "online", {}),
    ("moco_v2", "pcl", "MoCo v2 or PCL v2", "online", {}),
    ("adco", "adco", "AdCo", "online", {MOMENTUM: 1}),
    ("caco", "caco", "CaCo", "online", {MOMENTUM: 1}),
    ("mocov3", "mocov3", "MoCo v3", "online", {}),
    ("simsiam", "simsiam", "SimSiam", "online", {}),
    ("swav", "swav", "SwAV or DeepCluster v2", "online", {"prototypes": 1}),
    ("swav_training", "swav", "SwAV or DeepCluster v2", "online", {"prototypes": 1}),
    ("deepcluster", "swav", "SwAV or DeepCluster v2", "online", {"prototypes": 3}),
    ("dino_full", "dino", "DINO", "twin", {"head": 16, "loss": 1}),
    ("barlow_full", "barlow", "Barlow Twins", "online", {"normalisation of the embeddings": 3}),
    ("vicreg_full", "vicreg", "VICReg", "online", {}),
    ("pycontrast", "pycontrast", "PyContrast", "online", {"head": 6, "bank": 1}),
    ("cmc_moco", "pycontrast", "InstDisc or MoCo of CMC's authors", "online", {"embedding": 4, "bank": 1}),
    ("instdisc", "instdisc", "one network", "online", {"classifier": 2}),
    ("sela_training", "sela", "SeLa, in training", "online", {"pseudo-labels": 6}),
    ("sela_released", "sela", "one network", "online", {"classifier": 2}),
    ("vissl", "vissl", "VISSL", "online", {"head": 5}),
    ("vissl_converted", "vissl", "VISSL", "online", {}),
    ("simclr2", "simclr", "SimCLR v2", "online", {LABELS: 2}),
    ("lightly_byol", "lightly", "lightly", "online", {LABELS: 2}),
    ("lightly_dino", "lightly", "lightly, DINO", "twin", {"head": 4, "loss": 1}),
    ("lightly_moco_example", "lightly", "lightly", "online", {}),
    ("solo_moco", "solo", "solo-learn", "online", {LABELS: 2, "bank": 2}),
    ("solo_barlow_old", "solo", "solo-learn", "online", {LABELS: 2}),
    ("stable_pretraining", "stable_pretraining", "stable-pretraining", "online", {"numbers": 1, LABELS: 1}),
    ("mmselfsup", "mmselfsup", "MMSelfSup", "online", {"head": 6}),
    ("bare", "barlow", "one network", "online", {}),
    ("bare", "byol", "one network", "online", {}),
    ("torchvision_training", "torchvision", "one network", "online", {}),
    ("timm_training", "timm", "one network", "online", {}),
]


@pytest.mark.parametrize("kind, format, says, whose, left", CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_a_backbone_is_read_whole_by_the_keys_or_by_the_name_and_all_else_is_counted(
    tmp_path, kind, format, says, whose, left
):
    net = noise(ResNet(Bottleneck, (1, 1, 1, 1), channels=(4, 4, 8, 8), num_classes=0).state_dict())
    torch.manual_seed(1)
    content = getattr(families, kind)(net)
    path = saved(tmp_path / "file.pth", content, _use_new_zipfile_serialization=kind != "moco_v1")
    found = reading(content)
    assert (found.family, found.left | ({"classifier": left["classifier"]} if "classifier" in left else {})) == (
        says,
        left,
    )
    for said in (None, format):
        backbone = ResNet(Bottleneck, (1, 1, 1, 1), channels=(4, 4, 8, 8), num_classes=0)
        told = load_backbone(path, said, backbone)
        if whose == "online":
            assert_holds(backbone, net)
        else:
            assert all(
                torch.equal(x, found.named[f"twin.encoder.backbone.{name}"])
                for name, x in backbone.state_dict().items()
            )
            load_backbone(path, f"{format}:online", backbone)
            assert_holds(backbone, net)
        assert f"are {says} by their keys: {len(net)} of the backbone's {len(net)} tensors" in told
        assert not left or told.endswith("left out: " + ", ".join(f"{count} ({what})" for what, count in left.items()))


@pytest.mark.parametrize(
    "kind", ["moco_v2", "mocov3", "lightly_byol", "solo_moco", "pycontrast", "timm_training", "torchvision_training"]
)
def test_the_twins_backbone_is_taken_where_it_is_asked_for_and_only_where_there_is_one(tmp_path, kind):
    net, backbone = noise(resnet().state_dict()), resnet()
    torch.manual_seed(1)
    path = saved(tmp_path / "file.pth", getattr(families, kind)(net))
    format = {"moco_v2": "moco", "lightly_byol": "lightly", "solo_moco": "solo"}.get(
        kind, kind.removesuffix("_training")
    )
    load_backbone(path, f"{format}:twin", backbone)
    assert not torch.equal(backbone.conv1.weight, net["conv1.weight"])
    with pytest.raises(
        UserError, match="expects a file with a momentum twin or an average of the weights; this file of one network"
    ):
        load_backbone(saved(tmp_path / "bare.pth", net), "timm:twin", backbone)


# Names that are not torchvision's.


def test_vits_of_dino_mocov3_and_their_heads_of_attention(tmp_path):
    wide = {"embed_dim": 384, "depth": 1}
    for kind, format, heads in (("dino_full", "dino", 6), ("mocov3_vit", "mocov3", 12)):
        backbone = vit(**wide, num_heads=heads)
        net = noise(backbone.state_dict())
        path = saved(tmp_path / f"{kind}.pth", getattr(families, kind)(net))
        load_backbone(path, f"{format}:online", backbone)
        assert_holds(backbone, net)
        for said in (None, format):
            with pytest.raises(
                UserError,
                match=f"{format}'s ViT-S has {heads} attention heads, this backbone {18 - heads}; take backbone=",
            ):
                load_backbone(path, said, vit(**wide, num_heads=18 - heads))


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_by_the_names_that_timm_gives_it(tmp_path, registers):
    """The expected result is timm's own conversion."""
    options = {"patch_size": 4, "init_values": 1e-5, "reg_tokens": registers, "no_embed_class": bool(registers)}
    backbone = vit(**options)
    theirs = noise(backbone.state_dict()) | {"mask_token": torch.randn(1, 48)}
    if registers:
        theirs["register_tokens"] = theirs.pop("reg_token")
        theirs["pos_embed"] = torch.cat([torch.randn(1, 1, 48), theirs["pos_embed"]], 1)
    expected = timm.models.vision_transformer.checkpoint_filter_fn(dict(theirs), vit(**options))
    load_backbone(saved(tmp_path / "dinov2.pth", theirs), None, backbone)
    assert_holds(backbone, {name: expected[name] for name in backbone.state_dict()})
    chunked = {f"backbone.{name.replace('blocks.', 'blocks.0.')}": x for name, x in theirs.items()} | {
        "dino_head.last_layer.weight": torch.randn(3)
    }
    again = vit(**options)
    load_backbone(saved(tmp_path / "teacher.pth", {"teacher": chunked}), "dinov2", again)
    assert_holds(again, backbone.state_dict())


def test_transformers_names_of_a_resnet_and_of_a_vit(tmp_path):
    net, state = noise(resnet().state_dict()), {}
    for name, value in net.items():  # the table of docs/weights.md in the other direction
        part = name.split(".")
        if len(part) == 2:
            at = {"conv1": "embedder.embedder.convolution", "bn1": "embedder.embedder.normalization"}[part[0]]
        else:
            at = f"encoder.stages.{int(part[0][-1]) - 1}.layers.{part[1]}."
            if part[2] == "downsample":
                at += {"0": "shortcut.convolution", "1": "shortcut.normalization"}[part[3]]
            else:
                at += f"layer.{int(part[2][-1]) - 1}." + {"conv": "convolution", "bn": "normalization"}[part[2][:-1]]
        state[f"{at}.{part[-1]}"] = value
    backbone = resnet()
    load_backbone(
        saved(tmp_path / "resnet.pth", below("resnet.", state) | {"classifier.1.weight": torch.randn(3, 4)}),
        None,
        backbone,
    )
    assert_holds(backbone, net)

    backbone = vit()
    net, state = noise(backbone.state_dict()), {}
    names = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }  # fmt: skip
    for name, value in net.items():
        if name.startswith("blocks."):
            _, number, inner = name.split(".", 2)
            inner, _, part = inner.rpartition(".")
            if inner == "attn.qkv":
                for one, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    state[f"encoder.layer.{number}.attention.attention.{one}.{part}"] = piece
            else:
                state[f"encoder.layer.{number}.{names[inner]}.{part}"] = value
        elif name.startswith("norm."):
            state[f"layer{name}"] = value
        else:
            new = {"cls_token": "cls_token", "pos_embed": "position_embeddings"}.get(name)
            state["embeddings." + (new or name.replace("patch_embed.proj", "patch_embeddings.projection"))] = value
    load_backbone(
        saved(
            tmp_path / "vit.pth",
            state | {"pooler.dense.weight": torch.randn(4, 4), "pooler.dense.bias": torch.randn(4)},
        ),
        "transformers",
        backbone,
    )
    assert_holds(backbone, net)


# Files saved by the packages themselves.


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # warnings of lightly itself
@pytest.mark.parametrize("kind", ["byol", "dino", "moco"])
def test_what_lightlys_own_modules_save(tmp_path, kind):
    heads = pytest.importorskip("lightly.models.modules.heads")
    resnet18 = torchvision.models.resnet18()
    expected = {name: x for name, x in noise(resnet18.state_dict()).items() if not name.startswith("fc.")}
    resnet18.load_state_dict(expected, strict=False)
    module = torch.nn.Module()
    children = torch.nn.Sequential(*list(resnet18.children())[:-1])
    if kind == "byol":
        module.backbone, module.projection_head = children, heads.BYOLProjectionHead(512, 64, 16)
        module.prediction_head = heads.BYOLPredictionHead(16, 64, 16)
        module.backbone_momentum, module.projection_head_momentum = (
            torchvision_children(),
            heads.BYOLProjectionHead(512, 64, 16),
        )
    elif kind == "moco":
        module.backbone, module.projection_head = children, heads.MoCoProjectionHead(512, 64, 16)
        module.backbone_momentum, module.projection_head_momentum = (
            torchvision_children(),
            heads.MoCoProjectionHead(512, 64, 16),
        )
    else:
        module.student_backbone, module.student_head = torchvision_children(), heads.DINOProjectionHead(512, 64, 16, 32)
        module.teacher_backbone, module.teacher_head = children, heads.DINOProjectionHead(512, 64, 16, 32)
    content = {**families.LIGHTNING, "state_dict": module.state_dict()}
    backbone = timm.create_model("resnet18", num_classes=0)
    load_backbone(saved(tmp_path / "lightly.ckpt", content), "lightly:twin" if kind == "dino" else None, backbone)
    assert_holds(backbone, expected)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # warnings of solo-learn itself
@pytest.mark.parametrize("kind", ["BarlowTwins", "MoCoV2Plus"])
def test_what_solo_learns_own_modules_save(tmp_path, monkeypatch, kind):
    """This needs `pip install --no-deps solo-learn einops`. solo-learn imports pl_bolts, which does not work with
    today's Lightning, for a single class, a schedule that leaves nothing in a checkpoint.
    """
    for name in ("pl_bolts", "pl_bolts.optimizers", "pl_bolts.optimizers.lr_scheduler"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["pl_bolts.optimizers.lr_scheduler"].LinearWarmupCosineAnnealingLR = object
    methods = pytest.importorskip("solo.methods", exc_type=ImportError)
    settings = {
        "num_classes": 10, "max_epochs": 1, "batch_size": 4, "optimizer": "sgd", "lars": False, "lr": 0.1,
        "weight_decay": 0.0, "classifier_lr": 0.1, "exclude_bias_n_norm": False, "accumulate_grad_batches": 1,
        "extra_optimizer_args": {}, "scheduler": "none", "min_lr": 0.0, "warmup_start_lr": 0.0, "warmup_epochs": 0.0,
        "num_large_crops": 2, "num_small_crops": 0, "eta_lars": 0.001, "grad_clip_lars": False, "encoder": "resnet18",
        "backbone_args": {"cifar": False, "zero_init_residual": False}, "proj_hidden_dim": 64, "proj_output_dim": 16,
        "lamb": 0.005, "scale_loss": 0.02, "temperature": 0.2, "queue_size": 32, "base_tau_momentum": 0.99,
        "final_tau_momentum": 1.0, "momentum_classifier": None,
    }  # fmt: skip
    module = getattr(methods, kind)(**settings)
    module.encoder.load_state_dict(noise(module.encoder.state_dict()))
    content = {**families.LIGHTNING, "state_dict": module.state_dict()}
    backbone = timm.create_model("resnet18", num_classes=0)
    assert "solo-learn" in load_backbone(saved(tmp_path / "solo.ckpt", content), None, backbone)
    assert_holds(backbone, module.encoder.state_dict())


def torchvision_children():
    return torch.nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])


# A method that starts from them.


def test_a_method_takes_projector_predictor_and_twin_too(tmp_path):
    from caco.methods.mocov3 import MoCoV3
    from caco.nn.heads import Encoder, Projector

    head = {
        "hidden_dim": 16,
        "dim": 8,
        "layers": 2,
        "batch_norm": True,
        "bias": False,
        "last_batch_norm": True,
        "last_affine": False,
    }
    made = [
        MoCoV3(encoder=Encoder(backbone=resnet(), projector=Projector(in_dim=64, **head)), predictor_hidden_dim=16)
        for _ in range(2)
    ]
    source, method = made
    source.load_state_dict(noise(source.state_dict()))
    state = {}
    for name, value in source.state_dict().items():
        name = name.replace("twin.encoder.", "momentum_encoder.").replace("projector.", "fc.").replace("backbone.", "")
        state["module." + (f"base_{name}" if name.startswith("encoder.") else name)] = value
    told = initialise(method, saved(tmp_path / "mocov3.pth.tar", {"state_dict": state}), None)
    assert told.endswith("backbone, projector, predictor, twin"), told
    assert_holds(method, source.state_dict())


# Refusals.


class Anything:
    """Stands for any class of a package that is not installed."""


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"model": below("module.encoder1.", {"conv1.weight": torch.ones(32, 1, 7, 7)})},
        "two networks, of one and of two channels"),
        ({"state_dict": {"module.base_encoder.patch_embed.proj.3.weight": torch.ones(1)}}, "stem of convolutions"),
        ({"resnet": {"net.0.0.weight": torch.ones(1)}, "head": {}}, "selective kernels"),
        ({"type": "shard", "classy_state_dict": {}}, "a part of a checkpoint"),
        ({"model": {"stem.conv1.weight": torch.ones(1)}, "matching_heuristics": True}, "made for detectron2"),
        ({"model": {"module.0.conv1.weight": torch.ones(1), "module.1.weight": torch.ones(1)}}, "it is a classifier"),
        ({"net": {"module.conv1.weight": torch.ones(1)}, "lemniscate": {}}, "another stem"),
        ({"state_dict": below("momentum_backbone.", {"a": torch.ones(1)}) | below("backbone.",
        {"a": torch.ones(1)}) | {"other": torch.ones(1)}},
         "solo-learn, which has no place for 1 of them: other"),
        ({"blocks.0.ls1.gamma": torch.ones(1), "mask_token": torch.ones(1), "register_tokens": torch.ones(1)},
        "its tensors do not fit together"),
        (families.swav({"conv1.weight": torch.ones(128, 3, 7, 7)}), "another architecture than the backbone's"),
    ],
)  # fmt: skip
def test_what_gives_no_backbone_is_refused_in_words(tmp_path, content, expected):
    backbone = resnet()
    before = copy_of(backbone)
    with pytest.raises(UserError) as refusal:
        load_backbone(saved(tmp_path / "file.pth", content), None, backbone)
    assert expected in str(refusal.value)
    assert_holds(backbone, before)


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted({case[0] for case in CASES if case[3] == "online"}))
def test_one_tensor_less_than_the_whole_backbone_is_refused(tmp_path, kind):
    net = noise(resnet().state_dict())
    net.pop("layer3.0.conv2.weight")
    with pytest.raises(UserError, match=r"1 missing \(layer3.0.conv2.weight\)"):
        load_backbone(saved(tmp_path / "file.pth", getattr(families, kind)(net)), None, resnet())


def test_settings_and_numbers_beside_the_weights_are_read_without_being_made_and_classes_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(argparse.Namespace, "__init__", lambda *_, **__: pytest.fail("made"))
    net = noise(resnet().state_dict())
    beside = {"args": argparse.Namespace.__new__(argparse.Namespace), "lr": np.float32(0.1), "n": np.int64(3)}
    for zipped in (True, False):
        path = saved(tmp_path / "file.pth", {"state_dict": net, **beside}, _use_new_zipfile_serialization=zipped)
        load_backbone(path, None, resnet())
        path = saved(
            tmp_path / "bank.pth", {"state_dict": net, "lemniscate": Anything()}, _use_new_zipfile_serialization=zipped
        )
        with pytest.raises(UserError, match=r"nothing is ever run; it asks for test_families\.Anything"):
            load_backbone(path, None, resnet())


@pytest.mark.parametrize(
    "name, expected", [("byol.pkl", "runs code when it is read"), ("model.ckpt.index", "a checkpoint of TensorFlow's")]
)
def test_files_of_other_programs_are_named(tmp_path, name, expected):
    (tmp_path / name).write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match=expected):
        load_backbone(tmp_path / name, None, resnet())


def test_a_networks_tensors_are_as_many_as_in_the_published_layouts():
    """Compares with the state dicts of whole ResNet-50s, so that the synthetic files have the real names and no
    others.
    """
    with torch.device("meta"):
        names = [name for name in torchvision.models.resnet50().state_dict() if not name.startswith("fc.")]
    net = {name: torch.zeros(1) for name in names}
    counted = {
        "moco_v1": 642,
        "moco_v2": 646,
        "adco": 644,
        "caco": 662,
        "mocov3": 663,
        "simsiam": 343,
        "swav": 328,
        "deepcluster": 330,
    }
    for kind, count in counted.items():
        content = getattr(families, kind)(net)
        assert len(content.get("state_dict", content)) == count, kind
    assert [len(getattr(families, kind)(net)["model"]) for kind in ("barlow_full", "vicreg_full")] == [334, 333]


def test_the_page_of_weights_names_every_format_and_every_family():
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    assert not [name for name in FORMATS if f"`{name}`" not in page]
    assert not [family.says for family in FAMILIES if family.refuses is None and family.says not in page]
