"""All ranks share the work of reading images and computing features, and an error on one rank reaches all."""

import json

import numpy as np
import pytest
import together_worker
from PIL import Image
from processes import ranks
from toy_pacs import write_pacs

NAMES = ["knn", "own", "probe", "geometry", "transfer", "domain", "linear"]


def write_set(folder, train, test):
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for c, name in enumerate("rgb"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 180, (8, 8, 3), dtype=np.uint8)
                pixels[..., c] += 40
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


@pytest.fixture
def root(tmp_path):
    write_set(tmp_path / "images", 11, 4)
    write_set(tmp_path / "own", 9, 4)
    write_pacs(tmp_path, size=8)
    return tmp_path


@pytest.mark.parametrize("kept", [False, True])
def test_two_ranks_find_what_one_does_with_half_of_the_images_each(root, kept):
    expected, images = together_worker.all_of(str(root), NAMES, kept)
    codes, outputs = ranks(2, together_worker.evaluate, str(root), str(root / "out"), NAMES, kept)
    assert codes == [0, 0], outputs
    (results, first), (others, second) = (json.loads((root / f"out{rank}").read_text()) for rank in range(2))
    assert others == {} and list(results) == list(expected)
    # The batches are the same, so the features are equal to the bit. With two ranks the sums of the linear classifier
    # are rounded differently.
    assert {k: v for k, v in results.items() if "linear" not in k} == {
        k: v for k, v in expected.items() if "linear" not in k
    }
    assert first + second == images and first < 0.7 * images


def test_what_fails_on_one_rank_fails_for_all_by_name_and_the_others_are_made(root):
    codes, outputs = ranks(2, together_worker.fail, str(root), str(root / "out"))
    assert codes == [0, 0], outputs
    (results, told), (_, others) = (json.loads((root / f"out{rank}").read_text()) for rank in range(2))
    assert (
        [line.partition(":")[0] for line in told]
        == [line.partition(":")[0] for line in others]
        == ["knn", "geometry", "probe"]
    )
    assert all(
        "b/1.png: expected an image that can be read" in line for line in (told[0], others[0], told[2], others[2])
    )
    assert told[1] == "geometry: of rank 0 alone" and others[1] == "geometry: rank 0: of rank 0 alone"
    assert {name.partition("/")[0] for name in results} == {"pacs_size-8_num_strengths-3"}
