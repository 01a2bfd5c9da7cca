"""Every option of the groups for networks, optimisers and views can be built and does its job."""

import pytest
import torch
from PIL import Image
from tiny import compose

from caco.config import composition
from caco.config.composition import CONF, instantiate
from caco.engine.assembly import build_method
from caco.methods.base import ParameterGroup
from caco.schedules import RunShape


def options(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("name", options("backbone"))
def test_backbones_turn_images_into_features(name):
    composition.register()
    cfg = composition.compose([f"backbone={name}"])
    backbone = instantiate(cfg.backbone).eval()
    size = cfg.backbone.get("image_size") or 32
    with torch.inference_mode():
        features = backbone(torch.zeros(2, 3, size, size))
    assert features.shape == (2, backbone.num_features)


@pytest.mark.parametrize("name", options("projector"))
def test_projectors_turn_features_into_embeddings_of_their_width(name):
    cfg = compose(f"projector={name}", "projector.hidden_dim=32")
    head = instantiate(cfg.projector, in_dim=24)
    assert head(torch.randn(4, 24)).shape == (4, cfg.projector.dim)


@pytest.mark.parametrize("name", options("optimizer"))
def test_optimisers_move_every_parameter(name):
    cfg = compose(f"optimizer={name}")
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    before = [p.detach().clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    instantiate(cfg.optimizer, groups=[ParameterGroup(list(module.parameters()))]).step()
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("name", options("augmentation"))
def test_augmentations_make_views_of_the_sizes_they_say(name):
    views = instantiate(compose(f"augmentation={name}").augmentation)
    image = Image.linear_gradient("L").resize((48, 40)).convert("RGB")
    assert views.num_views == len(views.sizes) >= (0 if views.patches else 1)
    assert all(views.view(image, v, [0.5] * 39).shape == (3, size, size) for v, size in enumerate(views.sizes))


def test_the_last_row_of_table_6_is_what_the_command_line_says():
    """The command is `python -m caco.train bank=12M batch=4096`."""
    composition.register()
    cfg = composition.job_config(composition.compose(["bank=12M", "batch=4096"]))
    assert (cfg.bank.size, cfg.batch, cfg.epochs, cfg.backbone.name) == (98304, 4096, 200, "resnet50")
    assert (cfg.bank.pull, cfg.bank.push, cfg.bank.lr, cfg.method.temperature) == (1.0, 1.0, 3.0, 0.08)
    cfg.bank.size = 64  # the full number of rows is tested elsewhere
    method = build_method(cfg)
    assert sum(p.numel() for p in method.backbone.parameters()) == 23_508_032
    assert set(method.bank.rates(RunShape(20, 1, 4096))[10:]) == {3.0}
    assert instantiate(cfg.optimizer, groups=method.parameter_groups()).param_groups[0]["lr"] == pytest.approx(4.8)
