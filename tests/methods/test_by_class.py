"""Positives that labels choose (pn=both_by_class): a study's measuring stick, not a method."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from caco.banks.learnable import LearnableBank
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.unfit import refuse_other_labels
from caco.errors import UserError
from caco.methods.base import Now
from caco.methods.sources import RowOfClass, Step

K, D, B, CLASSES = 40, 8, 512, 4


def unit(*shape, seed):
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def chosen(correct, *, views=1, step=0, seed=0):
    """The rows that the keys of B images with labels choose, [views, B]; the labels; the keys; the unit rows."""
    bank = LearnableBank(size=K, dim=D, seed=0, warmup_epochs=0)
    label_B = torch.arange(B) % CLASSES
    at = Step(torch.arange(B), Now(step, "training", step, False, step, 0, {}), label_B)
    k_BD = unit(B, D, seed=1).repeat(views, 1)
    [positive] = RowOfClass(classes=CLASSES, correct=correct, seed=seed).all_of(k_BD, bank, at)
    return positive.row_B.unflatten(0, (views, B)), label_B, k_BD[:B], F.normalize(bank.rows.weight.detach(), dim=1)


def test_the_positive_is_the_most_probable_row_of_the_images_own_class():
    [row_B], label_B, k_BD, m_KD = chosen(1.0)
    for k_D, label, row in zip(k_BD, label_B.tolist(), row_B.tolist(), strict=True):
        own = range(label, K, CLASSES)
        assert row == max(own, key=lambda r: (k_D @ m_KD[r]).item())


@pytest.mark.parametrize("correct", [0.0, 0.25, 0.6])
def test_it_is_of_the_own_class_as_often_as_asked_and_of_the_others_equally_often(correct):
    [row_B], label_B, _, _ = chosen(correct)
    distance = (row_B % CLASSES - label_B) % CLASSES
    shares = torch.bincount(distance, minlength=CLASSES) / B
    expected = torch.tensor([correct] + [(1 - correct) / (CLASSES - 1)] * (CLASSES - 1))
    spread = 4 * (expected * (1 - expected) / B).sqrt()
    assert (shares - expected).abs().le(spread).all(), shares


def test_the_draw_depends_on_seed_step_image_and_view_alone():
    one, other_view = chosen(0.5, views=2)[0]
    assert torch.equal(chosen(0.5)[0][0], one) and not torch.equal(one, other_view)
    for change in ({"step": 1}, {"seed": 1}):
        assert not torch.equal(chosen(0.5, **change)[0][0], one)


def test_images_without_fitting_labels_are_refused():
    images = np.zeros((3, 8, 8, 3), np.uint8)
    for labels, got in (
        (None, "images without labels"),
        (np.array([0, 4, 1]), "labels from 0 to 4"),
        (np.array([0, -1, 1]), "from -1 to 1"),
    ):
        with pytest.raises(UserError, match=f"a label from 0 to 3 for each training image, got .*{got}"):
            refuse_other_labels(ImagesInMemory(images, labels=labels, name="three"), CLASSES)
    refuse_other_labels(ImagesInMemory(images, labels=np.array([0, 3, 1]), name="three"), CLASSES)


def test_a_bank_with_fewer_rows_than_classes_is_refused():
    bank = LearnableBank(size=2, dim=D, seed=0, warmup_epochs=0)
    at = Step(torch.arange(1), Now(0, "training", 0, False, 0, 0, {}), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(UserError, match="at least one row for each of the 4 classes, got 2"):
        RowOfClass(classes=CLASSES, correct=1.0).all_of(unit(1, D, seed=1), bank, at)
