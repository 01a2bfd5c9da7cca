"""PACS in its published layouts and with its published lists; images of the target domain are read only for the
test.
"""

import pytest
from toy_pacs import LAYOUTS, write_pacs

from caco.config.composition import compose, instantiate
from caco.data.sets.domains import CLASSES, DAMAGED, DOMAINS, PUBLISHED, pacs, read
from caco.data.sets.overlap import shared_images
from caco.data.sets.sources import labels_of
from caco.errors import FileError, UserError


@pytest.fixture
def said():
    return []


@pytest.fixture
def reading(said):
    """reading(root) reads a toy set; its messages are in `said`, except those about the numbers of images, because a
    toy set has few.
    """

    def make(root):
        def say(text, passing=False):
            if "the published list has" not in text:
                said.append(text)

        return read(root, key="data.root", say=say)

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_published_layout_gives_the_same_images(tmp_path, layout, reading, said):
    write_pacs(tmp_path / "here", layout)
    write_pacs(tmp_path / "there", "original")
    for root in (
        tmp_path / "here",
        (tmp_path / "here" / LAYOUTS[layout][0]).parent if layout != "mirror" else tmp_path / "here" / "PACS",
    ):
        found = reading(root)
        assert found.every.digest() == reading(tmp_path / "there").every.digest() and len(found.every) == 4 * 7 * 4
    assert said == []


def test_lists_classes_and_domains_are_as_published(tmp_path, reading):
    write_pacs(tmp_path)
    found = reading(tmp_path)
    train, crossval = found.part(["cartoon", "photo"], "train"), found.part(["cartoon", "photo"], "crossval")
    assert (len(train), len(crossval), len(found.part(["photo"]))) == (42, 14, 28)
    for source in (train, crossval):
        for i in range(len(source)):
            domain, name, _ = source.path(i).parts[-3:]
            assert (
                domain in ("cartoon", "photo")
                and CLASSES[labels_of(source)[i]] == name
                and source.image(i).mode == "RGB"
            )
    assert shared_images(train, crossval) == []
    assert sum(map(sum, PUBLISHED.values())) == 9991 and [sum(PUBLISHED[name]) for name in DOMAINS] == [
        2048,
        2344,
        1670,
        3929,
    ]


def test_classes_come_from_the_folders_and_a_number_that_differs_is_said(tmp_path, reading, said):
    lists = write_pacs(tmp_path, first=0)  # JiGen's lists count from 0
    before = labels_of(reading(tmp_path).every).tolist()
    assert said == []
    file = lists / "art_painting_crossval_kfold.txt"
    file.write_text(file.read_text().replace("art_painting/dog/pic_003.jpg 0", "art_painting/dog/pic_003.jpg 4"))
    assert labels_of(reading(tmp_path).every).tolist() == before
    assert said == [
        f"{file}: the number of art_painting/dog/pic_003.jpg is another class's than the folder's; the folder counts"
    ]


@pytest.mark.parametrize("how", ["cut", "removed"])
def test_the_one_damaged_image_is_left_out_by_name(tmp_path, reading, said, how):
    write_pacs(tmp_path)
    file = tmp_path / "pacs" / "images" / DAMAGED
    whole = reading(tmp_path)
    assert DAMAGED in [str(whole.every.path(i)).partition("images/")[2] for i in range(len(whole.every))] and said == []
    file.write_bytes(file.read_bytes()[:60]) if how == "cut" else file.unlink()
    found = reading(tmp_path)
    assert len(found.every) == len(whole.every) - 1 == len(found.domain) == len(found.train)
    assert said == [f"data.root: left out {DAMAGED}, which is damaged or not there, as Dassl does"]


def test_what_is_missing_is_one_refusal_with_the_layouts(tmp_path, reading):
    with pytest.raises(FileError) as nothing:
        reading(tmp_path)
    assert (
        f"data.root: expected PACS below {tmp_path}, got no folder with art_painting/, cartoon/, photo/, sketch/ and no"
        " lists" in str(nothing.value)
    )
    assert "PACS/kfold/DOMAIN/CLASS/*.jpg" in str(nothing.value) and "pacs/images/DOMAIN/CLASS" in str(nothing.value)
    lists = write_pacs(tmp_path)
    (lists / "photo_crossval_kfold.txt").unlink()
    with pytest.raises(FileError, match=r"got in .*splits not photo_crossval_kfold.txt\. Layouts:"):
        reading(tmp_path)


def test_lists_and_images_that_do_not_fit_are_refused_by_name(tmp_path, reading):
    lists = write_pacs(tmp_path)
    train, crossval = lists / "photo_train_kfold.txt", lists / "photo_crossval_kfold.txt"
    whole = train.read_text(), crossval.read_text()
    for text, message in (
        (whole[0] + "photo/cat/pic_000.jpg 1\n", "expected lines like .*got 'photo/cat/pic_000.jpg 1'"),
        (whole[0] + "photo/dog/pic_000.jpg\n", "expected lines like .*got 'photo/dog/pic_000.jpg'"),
        ("\n", "expected lines like .*, got none"),
        (whole[0] + "photo/dog/pic_003.jpg 1\n", "each image on one list, got 1 on several: photo/dog/pic_003.jpg"),
        (
            whole[0] + "photo/dog/pic_009.jpg 1\n",
            r"the 113 images of the lists below .*, got 1 of them not there \(photo/dog/pic_009.jpg\)",
        ),
    ):
        train.write_text(text)
        with pytest.raises(UserError, match=message):
            reading(tmp_path)


def test_other_numbers_than_the_published_ones_are_said(tmp_path):
    write_pacs(tmp_path)
    said = []
    read(tmp_path, key="data.root", say=lambda text, passing=False: said.append(text))
    assert (
        len(said) == 8 and "data.root: photo_crossval_kfold.txt: the published list has 171 images, this one 7" in said
    )


def test_pre_training_sees_three_domains_and_the_test_the_fourth(tmp_path, capsys):
    write_pacs(tmp_path)
    cfg = compose(["data=pacs", f"data.root={tmp_path}", "data.target=cartoon"])
    splits = instantiate(cfg.data)
    domains = {
        name: {source.path(i).parts[-3] for i in range(len(source))}
        for name, source in vars(splits).items()
        if source is not None
    }
    assert domains == {
        "pretrain": {"art_painting", "photo", "sketch"},
        "train": {"art_painting", "photo", "sketch"},
        "test": {"cartoon"},
    }
    assert (len(splits.pretrain), len(splits.test)) == (63, 28) and shared_images(splits.pretrain, splits.test) == []
    assert pacs(root=str(tmp_path), target="photo").pretrain.digest() != splits.pretrain.digest()
    held = pacs(root=str(tmp_path), target="cartoon", validation_fraction=0.2)
    assert {held.test.path(i).parts[-3] for i in range(len(held.test))} <= {"art_painting", "photo", "sketch"}
    with pytest.raises(
        UserError, match="data.target: expected one of art_painting, cartoon, photo, sketch, got 'clipart'"
    ):
        pacs(root=str(tmp_path), target="clipart")
