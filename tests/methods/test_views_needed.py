"""Methods declare which views they need, and a run whose recipe or images do not provide them is refused."""

import pytest
import toys
from tiny import COLOURED, compose

from caco.config import composition, signatures, validation, views_needed
from caco.engine.training import run_training
from caco.errors import UserError
from caco.methods.base import Needs


class LightnessAgainstColour(toys.Toy):
    """A small version of CMC: the lightness and the colours of a view are two inputs."""

    needs = Needs(whole_batch=True, lightness_first=True)

    def forward(self, batch, now):
        view = batch.views[0]
        lightness, colours = view.clone(), view.clone()
        lightness[:, 1:], colours[:, :1] = 0, 0
        return super().forward(type(batch)([lightness, colours], batch.index, batch.label), now)


NAME = f"{__name__}.LightnessAgainstColour"


def configured(*overrides):
    cfg = compose("pn=none", "max_steps=2", "eval=[]", "batch=16", *overrides, bank=False)
    cfg.method = {"_target_": NAME}
    return cfg


def test_a_class_s_needs_are_read_without_importing_it():
    assert signatures.declared("caco.methods.infomin.InfoMin", "needs") == {"patches": "shuffled"}
    assert signatures.declared("caco.methods.nnclr.NNCLR", "needs") == {}, "the needs of the base class are none"
    assert signatures.declared(NAME, "needs") == {"whole_batch": True, "lightness_first": True}
    assert signatures.declared("caco.methods.terms.terms_of", "needs") is None


def test_views_in_rgb_are_refused_at_once_with_those_that_are_not():
    cfg = composition.compose(["preset=demo", "tracking=ledger"])
    cfg.method = {"_target_": NAME}
    cfg.bank = None
    with pytest.raises(UserError) as error:
        validation.check(cfg)
    told = str(error.value)
    assert "needs colours=lab, ydbdr, ycbcr; got rgb; choose one of cmc, cmc_cifar, cmc_randaugment, cmc_ydbdr" in told
    assert "Grey images, such as the digits" in told


def test_grey_images_are_refused_by_looking_at_them_and_coloured_ones_train(tmp_path):
    with pytest.raises(
        UserError, match="data: the first 64 images of digits/train are grey; this method contrasts lightness with"
    ):
        run_training(configured("augmentation=cmc_cifar", "augmentation.size=16"), tmp_path / "grey")
    summary = run_training(configured(*COLOURED, "augmentation=cmc_cifar"), tmp_path / "coloured")
    assert summary["steps"] == 2


def test_what_was_built_is_checked_where_a_configuration_says_too_little(tmp_path):
    with pytest.raises(UserError, match="needs colours=lab, ydbdr, ycbcr; got rgb"):
        run_training(configured(*COLOURED, "augmentation=cifar"), tmp_path)
    with pytest.raises(UserError, match=r"its view NAME is cut into patches, which this method does not take"):
        run_training(configured(*COLOURED, "augmentation=infomin_cifar", "+augmentation.colours=lab"), tmp_path)


@pytest.mark.parametrize(
    ("needs", "patches", "told"),
    [
        ({}, None, []),
        ({"patches": "shuffled", "num_patches": 9}, {"grid": 3, "shuffled": True}, []),
        ({"patches": "row by row"}, {"grid": 5}, []),
        (
            {"patches": "row by row"}, {"grid": 5, "shuffled": True},
            ["patches row by row; expected augmentation.views.x.patches.shuffled=false, got true"],
        ),
        ({"patches": "shuffled", "num_patches": 4}, {"grid": 3, "shuffled": True},
        ["4 patches of each image; got a grid of 3 x 3"]),
        ({}, {"grid": 3}, ["its view x is cut into patches, which this method does not take"]),
    ],
)  # fmt: skip
def test_each_need_that_is_not_met_is_one_line(needs, patches, told):
    found = views_needed.problems(needs, patches, "rgb", name="x")
    assert len(found) == len(told) and all(expected in line for expected, line in zip(told, found, strict=True))
