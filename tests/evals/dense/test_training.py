"""The training loop of the dense evaluators: it resumes to the same bits, gives the same result on unequal ranks and
with any number of workers, and scales the recipe as published.
"""

import re

import pixelwise
import pytest
import torch
from colours import coloured
from pixelwise import RECIPE, Brightness, store_of, trained
from processes import ranks
from torch import nn

from caco.data.sets.sources import UnreadableImage
from caco.errors import UserError
from caco.evals.dense import roots
from caco.evals.dense.recipe import Recipe
from caco.evals.dense.training import batches, one_by_one
from caco.runs.checkpoint import Checkpoints


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_half_the_images_are_half_the_rate_and_twice_the_steps_milestones_and_warm_up():
    published = Recipe(steps=24_000, images=16, rate=0.02, milestones=[18 / 24, 22 / 24], warmup_steps=100)
    rates = published.rates()
    assert (
        len(rates) == 24_000 and rates[0] == pytest.approx(2e-5) and rates[50] == pytest.approx(0.02 * (1 + 0.001) / 2)
    )
    assert [rates[step] for step in (100, 17_999)] == [0.02, 0.02]
    assert [rates[step] for step in (18_000, 21_999, 22_000)] == pytest.approx([2e-3, 2e-3, 2e-4])
    half = Recipe(steps=24_000, images=8, rate=0.02, milestones=[18 / 24, 22 / 24], warmup_steps=100)
    assert half.rates()[::2] == pytest.approx([rate / 2 for rate in rates])
    assert half.shown() == "48,000 steps of 8 images, rate 0.01"


def test_norms_without_decay_are_a_group_of_their_own():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.GroupNorm(2, 4), nn.Linear(4, 2)))
    without = Recipe(steps=1, images=1, rate=1.0, decay_norms=False).optimizer(network).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in without] == [(1e-4, 4), (0.0, 4)]
    assert {id(p) for p in without[1]["params"]} == {
        id(p) for layer in (network[1], network[2][0]) for p in layer.parameters()
    }
    (everything,) = Recipe(steps=1, images=1, rate=1.0).optimizer(network).param_groups
    assert len(everything["params"]) == 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1"),
        ({"images": 0}, "images: expected at least 1 a step"),
        ({"rate": -1.0}, "rate: expected a positive learning rate"),
        ({"milestones": [0.9, 0.5]}, "milestones: expected ascending shares of the steps between 0 and 1"),
        ({"milestones": [18_000]}, "milestones: expected ascending shares"),
        ({"steps": 0, "rate": 0.0}, "steps: .*; rate: "),
    ],
)
def test_a_recipe_says_all_that_is_wrong_with_it(changed, message):
    with pytest.raises(UserError, match=message):
        Recipe(**{"steps": 10, "images": 2, "rate": 0.1} | changed)


def test_what_is_seen_goes_through_all_images_before_any_comes_again_and_no_draw_twice():
    task = Brightness()
    trained(task=task)
    indices = [index for index, _ in task.asked]
    assert (
        len(indices) == 21
        and sorted(indices[:8]) == sorted(indices[8:16]) == list(range(8))
        and indices[:8] != indices[8:16]
    )
    assert len({seed for _, seed in task.asked}) == 21


def test_workers_change_nothing():
    assert same(trained(), trained(num_workers=2))


def test_two_ranks_with_unequal_images_equal_one_process(tmp_path):
    """Each step has three images of different shapes, one on one rank and two on the other; loss and BatchNorm's mean
    are over the pixels of all three.
    """
    codes, outputs = ranks(2, pixelwise.write_weights, str(tmp_path / "two.pt"))
    assert codes == [0, 0], outputs[0][1][-3000:]
    one, two = trained(), torch.load(tmp_path / "two.pt", weights_only=True)
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], rtol=0, atol=1e-12) for name in one)


def test_killed_between_two_checkpoints_it_goes_on_to_the_same_bits(tmp_path):
    class Killed(Exception):
        pass

    class Mortal(Brightness):
        def loss(self, network, examples):
            if len(self.asked) > 15:
                raise Killed
            return super().loss(network, examples)

    with pytest.raises(Killed):
        trained(tmp_path, task=Mortal())
    rest, said = Brightness(), []
    resumed = trained(tmp_path, task=rest, said=said)
    assert len(rest.asked) == 3 * 3, "the run resumes with three steps, because the last checkpoint was after four"
    assert "step 4 of 7" in said[0] and said[-1].startswith("it: trained for 7 steps, loss ")
    assert same(resumed, trained())
    done = Brightness()
    assert same(trained(tmp_path, task=done), resumed) and not done.asked, "a finished training must not be repeated"


def test_what_decides_the_weights_decides_the_checkpoint_and_how_often_it_is_saved_does_not(tmp_path):
    for settings in ({}, {"save_every_steps": 5}, {"made_from": {"a": 2}}, {"seed": 4}):
        trained(tmp_path, **settings)
    longer = Recipe(**{**vars(RECIPE), "steps": 8})
    trained(tmp_path, recipe=longer)
    folders = sorted((tmp_path / "classifiers").iterdir())
    assert len(folders) == 4
    assert sorted(Checkpoints(folder).load_newest()[0]["step"] for folder in folders) == [7, 7, 7, 8]


def test_more_ranks_than_images_a_step_and_ranks_that_see_other_checkpoints_are_refused(tmp_path, monkeypatch):
    trained(tmp_path, recipe=Recipe(**{**vars(RECIPE), "steps": 2}))
    with monkeypatch.context() as patch:
        patch.setattr("caco.distributed.all_objects", lambda mine: [mine, 0])
        with pytest.raises(
            UserError, match=r"it: the processes found checkpoints of steps \[0, 2\]; all must see .*classifiers"
        ):
            trained(tmp_path, recipe=Recipe(**{**vars(RECIPE), "steps": 2}))
    monkeypatch.setattr("caco.distributed.world", lambda: 4)
    with pytest.raises(UserError, match="images: expected at least one a step for each of the 4 processes, got 3"):
        trained(tmp_path)


def test_a_loss_that_is_not_finite_ends_it_and_is_not_saved(tmp_path):
    class Broken(Brightness):
        def loss(self, network, examples):
            return super().loss(network, examples) * float("nan")

    with pytest.raises(UserError, match="it: the loss became nan by step 2; a lower rate may help"):
        trained(tmp_path, task=Broken())
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_read_ends_it_by_name_or_the_next_one_stands_in_for_it_with_its_own_labels(
    num_workers, capsys
):
    class Damaged(Brightness):
        def example(self, index, seed):
            if index in (2, 3):
                raise UnreadableImage(f"photo_{index}.jpg: expected an image")
            return super().example(index, seed)

    class Exchanged(Brightness):
        def example(self, index, seed):
            return super().example(4 if index in (2, 3) else index, seed)

    with pytest.raises(UserError, match=r"photo_[23].jpg: expected an image"):
        trained(task=Damaged(), num_workers=num_workers)
    assert same(trained(task=Damaged(), num_workers=num_workers, corrupt="skip"), trained(task=Exchanged()))
    said = re.findall(
        r"caco: image ([23]) cannot be read; image 4 stands in for it \((\d) such so far\): image (\d) of bright\n",
        capsys.readouterr().err,
    )
    assert sorted(number for _, number, _ in said) == ["1", "2"] and sorted(index for index, _, _ in said) == ["2", "3"]
    assert all(index == named for index, _, named in said)


def test_no_image_that_can_be_read_is_said_and_does_not_go_on_for_ever():
    class Gone(Brightness):
        def example(self, index, seed):
            raise UnreadableImage("gone")

    with pytest.raises(UserError, match=r"in place of image \d of bright, got none among the 7 that follow it"):
        trained(task=Gone(), corrupt="skip")


def test_a_test_image_that_cannot_be_read_ends_it_or_is_left_out_by_name(capsys):
    def example(index):
        if index == 1:
            raise UnreadableImage("photo_1.jpg: expected an image")
        return index

    with pytest.raises(UserError, match="photo_1.jpg: expected an image"):
        list(one_by_one(example, coloured(3, "three"), store_of(), name="it"))
    assert list(one_by_one(example, coloured(3, "three"), store_of(corrupt="skip"), name="it")) == [
        (0, 0),
        (1, None),
        (2, 2),
    ]
    assert capsys.readouterr().err == "caco: it: image 1 of three cannot be read and is left out (1 such so far)\n"


def test_what_one_rank_cannot_read_ends_all(tmp_path):
    """They end at once, and not only when a collective of the other ranks times out."""
    codes, outputs = ranks(2, pixelwise.read_what_one_rank_cannot, str(tmp_path))
    assert codes == [0, 0], outputs
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["photo_1.jpg: expected an image"] * 2


def test_steps_can_be_asked_for_alone_as_statistics_after_training_need_them():
    task = Brightness()
    steps = list(batches(task, 3, 5, 7, store_of(), seed=3))
    assert [len(examples) for examples in steps] == [3, 3]
    whole = Brightness()
    trained(task=whole)
    assert task.asked == whole.asked[15:]


def test_test_images_come_once_each_and_the_lines_say_how_many_are_left(monkeypatch):
    monkeypatch.setattr("caco.saying._SECONDS", 0.0)
    said, files = [], coloured(5, "five")
    found = list(one_by_one(lambda index: index**2, files, store_of(num_workers=2, said=said), name="it"))
    assert found == [(0, 0), (1, 1), (2, 4), (3, 9), (4, 16)]
    assert said[0].startswith("it: images tested: 1 of 5, ") and said[-1].endswith("0:00:00 left")
    assert list(one_by_one(lambda index: index**2, files, store_of(), name="it", skip=3)) == found[3:]


def test_the_lines_of_training_say_the_step_the_time_left_and_the_loss(monkeypatch):
    monkeypatch.setattr("caco.saying._SECONDS", 0.0)
    said = []
    trained(said=said, save_every_steps=4)
    assert re.fullmatch(r"it: step: 4 of 7, \S+ (a second|s each), 0:00:00 left, loss [\d.]+", said[1]), said


def test_a_root_that_is_not_there_and_all_that_is_missing_are_refused_at_once(tmp_path):
    for root in (None, str(tmp_path / "none")):
        message = (
            r"root: expected the folder that holds the set, as eval.segment.root=PATH, got .*Expected below it:\n "
            r" a/b.txt"
        )
        with pytest.raises(UserError, match=message):
            roots.existing(root, "segment", "  a/b.txt")
    (tmp_path / "a.txt").touch()
    assert roots.existing(str(tmp_path), "segment", "") == tmp_path
    assert roots.absent(tmp_path, ["a.txt", "b.txt"]) == ["b.txt"] and roots.absent(tmp_path / "none", ["c"]) == ["c"]
    roots.refuse_missing("VOC", tmp_path, [], "layout")
    with pytest.raises(
        UserError, match=r"root: VOC is incomplete below .*\n  one\n  two\nExpected below root:\nlayout"
    ):
        roots.refuse_missing("VOC", tmp_path, ["one", "two"], "layout")
