"""timm models that cannot make features from a run's images are refused before weights are drawn, with advice."""

import pytest
import timm
import torch
from omegaconf import DictConfig, OmegaConf
from tiny import compose

from caco.engine.assembly import build_encoder, build_method
from caco.errors import UserError
from caco.nn.backbones import refuse_unfit, timm_backbone, why_unfit

TIMM = "caco.nn.backbones.timm_backbone"


@pytest.mark.parametrize(
    ("name", "width"), [("mobilenetv3_small_050", 1024), ("vgg11", 4096), ("lcnet_035", 1280), ("resnet18", 512)]
)
def test_the_width_is_that_of_the_features_whichever_layer_gives_them(name, width):
    with torch.device("meta"), torch.inference_mode():
        backbone = timm_backbone(name=name)
        assert list(backbone(torch.empty(2, 3, 64, 64)).shape) == [2, width] and backbone.num_features == width


def on(name: str) -> DictConfig:
    cfg = compose("augmentation.size=32")
    merged = OmegaConf.merge(
        OmegaConf.masked_copy(cfg, [key for key in cfg if key != "backbone"]),
        {"backbone": {"_target_": TIMM, "name": name}},
    )
    assert isinstance(merged, DictConfig)
    return merged


def test_a_method_stands_on_a_model_with_a_layer_behind_its_pooling():
    cfg = on("mobilenetv3_small_050")
    method = build_method(cfg).eval()
    assert method.encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 8)


def test_what_is_made_for_other_sizes_says_which_setting_helps():
    with pytest.raises(
        UserError,
        match=(
            r"vit_small_patch14_dinov2 gives no features .* of 224 x 224 pixels: .* With backbone\.image_size=224 it"
            r" does"
        ),
    ):
        refuse_unfit([224], name="vit_small_patch14_dinov2")
    refuse_unfit([224], name="vit_small_patch14_dinov2", image_size=224)
    with pytest.raises(
        UserError,
        match=r"224 x 224, or 224|It is made for 224 x 224: augmentation\.size=224, or another of timm's models",
    ):
        refuse_unfit([96], name="hiera_tiny_224")


def test_what_gives_no_one_feature_an_image_names_its_nearest_that_do(monkeypatch):
    class Tokens(torch.nn.Module):
        num_features = 8

        def forward(self, images):
            return images.new_empty(len(images), 49, 8)

    made = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **options: Tokens() if name == "resnet18" else made(name, **options)
    )
    why_unfit.__globals__["_why_unfit"].cache_clear()
    try:
        message = (
            r"resnet18 gives no features .*: it gives \[2, 49, 8\] for two images\."
            r" Similar models that fit: resnet\w+, \w+, \w+$"
        )
        with pytest.raises(UserError, match=message):
            refuse_unfit([32], name="resnet18")
    finally:
        why_unfit.__globals__["_why_unfit"].cache_clear()


def test_a_run_is_refused_before_a_weight_is_drawn(monkeypatch):
    cfg = on("vit_tiny_patch16_224")
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=r"of 32 x 32 pixels: AssertionError: .* With backbone\.image_size=32 it does"):
        build_encoder(cfg)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_setting_that_a_model_does_not_take_is_one_sentence():
    with pytest.raises(UserError, match="backbone: timm makes no vgg11 with num_classes=0, drop_path_rate=0.1: "):
        timm_backbone(name="vgg11", drop_path_rate=0.1)
