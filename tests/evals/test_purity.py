"""eval=purity: the row of a key, and the class that the row stands for, found by hand."""

import json

import numpy as np
import purity_worker
import pytest
import torch
from processes import ranks
from purity_worker import Toy, measured

from caco.data.sets.choosing import choose
from caco.data.sets.sources import labels_of
from caco.errors import UserError
from caco.evals.purity import Purity


def test_a_row_stands_for_the_class_of_the_training_image_whose_key_is_nearest(store_of):
    store = store_of(train=60, test=30)
    method = Toy(rows=8)
    found = measured(store, method)
    # Computed by hand, one row and one image at a time.
    train, test = store.splits.train, store.splits.test
    keys = {
        split: torch.nn.functional.normalize(store.outputs(method.encoder, source, store.views).double(), dim=1)
        for split, source in (("train", train), ("test", test))
    }
    rows = torch.nn.functional.normalize(method.bank.rows.weight.double(), dim=1)
    class_of_row = [int(labels_of(train)[int((keys["train"] @ row).argmax())]) for row in rows]
    anchors = choose(None, 17, len(test), seed=0, balanced=False)
    label_of = labels_of(test)
    right = [class_of_row[int((rows @ keys["test"][a]).argmax())] == label_of[a] for a in anchors]
    chance = [np.mean([label == one for one in class_of_row]) for label in label_of[anchors]]
    assert found == {
        "purity_images-17/positives": pytest.approx(100 * np.mean(right)),
        "purity_images-17/chance": pytest.approx(100 * np.mean(chance)),
    }
    assert found["purity_images-17/positives"] not in (0, 100), (
        "the purity must not be 0 or 100, or the comparison would mean nothing"
    )
    assert found["purity_images-17/chance"] != pytest.approx(100 / 3), (
        "chance must not be that of even classes, or the comparison would mean nothing"
    )
    assert int(method.bank.rows.uses.sum()) == 0, "measuring purity must not count as use of rows"


def test_two_ranks_with_half_of_the_rows_each_find_what_one_does(tmp_path):
    expected = purity_worker.of_two(rows=8)
    codes, outputs = ranks(2, purity_worker.evaluate, str(tmp_path / "out"))
    assert codes == [0, 0], outputs
    assert json.loads((tmp_path / "out0").read_text()) == expected and json.loads((tmp_path / "out1").read_text()) == {}


def test_without_a_bank_or_without_a_training_it_is_refused():
    with pytest.raises(
        UserError, match="^eval.purity: needs the method that trains the backbone, but only a backbone was given"
    ):
        purity_worker.evaluation().require(Toy(rows=8).backbone)
    method = Toy(rows=8)
    method.bank = None
    with pytest.raises(UserError, match="this method has none; leave it out"):
        Purity().attach(method)
