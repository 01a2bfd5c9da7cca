"""caco.embed writes the features of each image of a folder under the image's name, in two formats, and gives the same
bytes however often it was interrupted.
"""

import json
import signal
import sys

import numpy as np
import pytest
import torch
from interrupted import embed_killed
from PIL import Image
from processes import Process, ranks
from processes import caco_embed as caco_embed_command
from tiny import train

import caco
from caco import embed
from caco.config.composition import compose, instantiate
from caco.data.views.augmentation import Views
from caco.nn.backbones import small_resnet

WEIGHTS = [
    "format=timm",
    "backbone=small_resnet",
    "backbone.width=8",
    "augmentation=digits",
    "precision=fp32",
    "device=cpu",
    "loader.num_workers=0",
]


def caco_embed(*words):
    """Run `caco-embed` with this command line; returns its exit code."""
    before, sys.argv = sys.argv, ["caco-embed", *map(str, words)]
    try:
        embed.main()
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty images of different sizes, some in subfolders, some grey, one with an unusual name."""
    root = tmp_path_factory.mktemp("folder")
    draw = np.random.default_rng(0)
    for number in range(40):
        pixels = draw.integers(0, 256, (20 + number % 7, 24, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        path = (
            root / ("" if number < 5 else f"class {number % 3}") / ("naïve 'x'.png" if number == 7 else f"{number}.png")
        )
        path.parent.mkdir(exist_ok=True)
        (image.convert("L") if number % 9 == 0 else image).save(path)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(small_resnet(width=8).state_dict(), path)
    return path


def views() -> Views:
    return instantiate(compose(["preset=demo"]).augmentation)


@pytest.mark.long
def test_each_file_has_the_features_of_its_image_in_both_formats(tmp_path, folder, weights, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    common = [f"weights={weights}", *WEIGHTS, f"data.root={folder}", "batch=16"]
    assert (
        caco_embed(*common, f"to={tmp_path / 'features.npz'}")
        == caco_embed(*common, f"to={tmp_path / 'features.parquet'}")
        == 0
    )
    told = capsys.readouterr().err
    assert "are one network by their keys" in told and "features.npz (features of 40 images)" in told
    with np.load(tmp_path / "features.npz") as file:
        features, files = file["features"], file["files"].tolist()
        assert sorted(file) == ["about", "features", "files"]
    expected = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert sorted(files) == expected
    backbone = small_resnet(width=8).eval()
    backbone.load_state_dict(torch.load(weights))
    for name, row in zip(files, features, strict=True):
        plain = views().plain(Image.open(folder / name).convert("RGB"))
        with torch.no_grad():
            assert np.allclose(backbone(plain[None])[0].numpy(), row, atol=1e-5), name
    table = parquet.read_table(tmp_path / "features.parquet")
    assert table.column("file").to_pylist() == files
    assert np.array_equal(np.array(table.column("features").to_pylist(), dtype=np.float32), features)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.npz", "features.parquet"]


@pytest.mark.parametrize("kind", ["npz", pytest.param("parquet", marks=pytest.mark.long)])
def test_stopped_in_the_middle_it_goes_on_to_the_same_bytes(tmp_path, folder, weights, monkeypatch, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    common = [f"weights={weights}", *WEIGHTS, f"data.root={folder}", "batch=8"]
    assert caco_embed(*common, f"to={tmp_path / f'whole.{kind}'}") == 0
    forward, seen = type(small_resnet(width=8)).forward, []

    def stopped(self, images):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(type(small_resnet(width=8)), "forward", stopped)
    assert caco_embed(*common, f"to={tmp_path / f'stopped.{kind}'}") == 130
    assert not (tmp_path / f"stopped.{kind}").exists()

    def counted(self, images):
        seen.append(len(images))
        return forward(self, images)

    seen.clear()
    monkeypatch.setattr(type(small_resnet(width=8)), "forward", counted)
    assert caco_embed(*common, f"to={tmp_path / f'stopped.{kind}'}") == 0
    assert seen == [8, 8]  # three of the five batches had been stored
    assert (tmp_path / f"whole.{kind}").read_bytes() == (tmp_path / f"stopped.{kind}").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_killed_at_whatever_instants_it_goes_on_to_the_same_bytes(tmp_path, folder, weights, kind):
    """The process is killed from outside several times, while it computes and writes features."""
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    common = [f"weights={weights}", *WEIGHTS, f"data.root={folder}", "batch=1"]
    code, cost, told = Process(embed_killed, 600.0, *common, f"to={tmp_path / f'whole.{kind}'}").end()
    assert code == 0, told
    draw, kept = np.random.default_rng(0), []
    for share in draw.uniform(0, 0.25, 6):
        killed = [*common, f"to={tmp_path / f'killed.{kind}'}"]
        code, _, told = Process(embed_killed, share * float(cost), *killed).end()
        assert code == -signal.SIGPROF, told
        kept.append(sum(path.stat().st_size for path in tmp_path.glob(".killed.*/features/*.partial")))
    assert kept == sorted(kept) and 0 < kept[-1], kept
    code, _, told = Process(caco_embed_command, *killed).end()
    assert code == 0 and f"features of {len(list(folder.rglob('*.png')))} images" in told, told
    assert (tmp_path / f"whole.{kind}").read_bytes() == (tmp_path / f"killed.{kind}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"killed.{kind}", f"whole.{kind}"]


def test_a_second_time_it_is_said_and_another_file_is_never_written_over(tmp_path, folder, weights, capsys):
    common = [f"weights={weights}", *WEIGHTS, f"data.root={folder}"]
    to = tmp_path / "features.npz"
    assert caco_embed(*common, f"to={to}") == 0
    content = to.read_bytes()
    capsys.readouterr()
    assert caco_embed(*common, f"to={to}") == 0 and "finished already on 20" in capsys.readouterr().err
    assert caco_embed(*common, "augmentation.plain_crop=0.5", f"to={to}") == 2
    assert "exists and was made from another plain_view; choose another name" in capsys.readouterr().err
    assert to.read_bytes() == content
    to.write_bytes(b"mine")
    assert caco_embed(*common, f"to={to}") == 2 and "was not written by caco.embed" in capsys.readouterr().err
    assert to.read_bytes() == b"mine" and [path.name for path in tmp_path.iterdir()] == ["features.npz"]


def test_a_runs_own_views_and_labels_of_other_data(tmp_path, folder):
    train(tmp_path / "run", "max_steps=2", "eval=[]")
    assert caco_embed(f"run={tmp_path / 'run'}", "data=digits", f"to={tmp_path / 'digits.npz'}") == 0
    with np.load(tmp_path / "digits.npz") as file:
        assert file["features"].shape[0] == len(file["label"]) == 1797 and file["files"][0] == "digits/train/0"
        assert file["classes"].tolist() == [str(digit) for digit in range(10)]
        assert json.loads(str(file["about"]))["precision"] == "fp32"


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            ["to=features.csv"],
            "to: expected the file to write to, as to=FILE.npz or to=FILE.parquet, got 'features.csv'",
        ),
        (["loader.corrupt=skip", "to=x.npz"], "would get the features of another image"),
        (["data.root=nowhere", "to=x.npz"], "data=images needs images"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(tmp_path, weights, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    assert caco_embed(f"weights={weights}", *WEIGHTS, *words) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _by_ranks(words):
    assert caco_embed(*words) == 0


@pytest.mark.long
def test_two_ranks_write_what_one_does(tmp_path, folder, weights):
    common = [f"weights={weights}", *WEIGHTS, f"data.root={folder}", "batch=8"]
    codes, told = ranks(2, _by_ranks, [*common, f"to={tmp_path / 'two.npz'}"])
    assert codes == [0, 0], told
    assert caco_embed(*common, f"to={tmp_path / 'one.npz'}") == 0
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert one["files"].tolist() == two["files"].tolist() and np.allclose(
            one["features"], two["features"], atol=1e-6
        )


def test_images_as_they_are_stored_are_embedded_and_prepared_as_their_run_has_them(tmp_path, monkeypatch, capsys):
    """With four channels of 16 bits, caco.embed gives the same features as caco.load's backbone and preprocessing, and
    refuses photographs.
    """
    generator = np.random.default_rng(0)
    for number in range(40):
        file = tmp_path / "images" / f"{number:02d}.npy"
        file.parent.mkdir(exist_ok=True)
        np.save(file, generator.integers(0, 2**16, (12, 12, 4), dtype=np.uint16))
    channels = ["data=folder", f"data.root={tmp_path / 'images'}", "data.channels=4"]
    train(tmp_path / "run", *channels, "augmentation.size=8", "batch=8", "max_steps=2", "eval=[]")
    words = [
        f"run={tmp_path / 'run'}",
        f"data.root={tmp_path / 'images'}",
        f"to={tmp_path / 'made.npz'}",
        "precision=fp32",
        "loader.num_workers=0",
    ]
    assert caco_embed(*words) == 2
    assert "this backbone was trained on images as they are stored, of 4 channels" in capsys.readouterr().err
    assert caco_embed(*words, "data.channels=4") == 0
    made = np.load(tmp_path / "made.npz")
    backbone, preprocess = caco.load(tmp_path / "run")
    with torch.no_grad():
        own = backbone(preprocess([np.load(tmp_path / "images" / name) for name in made["files"]]))
    assert own.shape == made["features"].shape and np.allclose(own.numpy(), made["features"], atol=1e-5)
