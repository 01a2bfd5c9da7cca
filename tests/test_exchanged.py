"""If image files are exchanged for others with the same names and sizes, no earlier result is used again: in
evaluations, transfer, raw pixels, the overlap check and resuming.
"""

import shutil
import sys

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from tiny import compose, train

from caco import evaluate
from caco.errors import UserError
from caco.runs.files import read_json

TRAINING = ["max_steps=2", "epochs=1", "eval=[]", "bank.size=64", "warm_start.steps=0"]


def write_bitmaps(folder, *, swapped, seed, count=6):
    """Write BMP images of two classes with different colours; `swapped` exchanges the colours, not the names and
    sizes.
    """
    rng = np.random.default_rng(seed)
    for c, name in enumerate("ab"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
            pixels[..., c ^ swapped] += 180
            Image.fromarray(pixels).save(folder / name / f"{i}.bmp")


def exchange(one, other):
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    train(run_dir, *TRAINING)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(compose(*TRAINING), resolve=True))
    return run_dir


@pytest.fixture
def evaluated(tmp_path, finished, monkeypatch):
    """evaluated("eval=[knn]", ...) evaluates the run; returns the exit code and all results of the run by name."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("caco.runs.directory._locks", {})

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["caco-evaluate", f"run={run_dir}", *arguments])
        code = 0
        try:
            evaluate.main()
        except SystemExit as end:
            code = end.code
        return code, {k: v for k, v in read_json(run_dir / "summary.json").items() if "/" in k}

    return main


def test_evaluations_and_pixels(tmp_path, evaluated):
    """The classes of the test images are exchanged, so right predictions become wrong, in results, features and
    baselines.
    """
    write_bitmaps(tmp_path / "set" / "train", swapped=0, seed=0)
    write_bitmaps(tmp_path / "set" / "test", swapped=0, seed=1)
    write_bitmaps(tmp_path / "set" / "other", swapped=1, seed=1)
    sizes = [
        {f.relative_to(f.parents[1]): f.stat().st_size for f in (tmp_path / "set" / name).rglob("*.bmp")}
        for name in ("test", "other")
    ]
    assert sizes[0] == sizes[1]
    command = [
        "eval=[knn_all]",
        "eval.knn.k=3",
        "baselines=true",
        "data=folder",
        f"data.root={tmp_path / 'set'}",
        "data.in_memory_mb=0",
    ]
    code, before = evaluated(*command)
    assert code == 0 and before["pixels/folder/knn3_top1"] == 100.0
    exchange(tmp_path / "set" / "test", tmp_path / "set" / "other")
    code, after = evaluated(*command)
    assert code == 0 and after["pixels/folder/knn3_top1"] == 0.0
    exchange(tmp_path / "set" / "test", tmp_path / "set" / "other")
    assert evaluated(*command)[1]["pixels/folder/knn3_top1"] == 100.0


def test_transfer(tmp_path, evaluated):
    write_bitmaps(tmp_path / "sets" / "own" / "train", swapped=0, seed=0, count=20)
    write_bitmaps(tmp_path / "sets" / "own" / "test", swapped=0, seed=1)
    write_bitmaps(tmp_path / "sets" / "own" / "other", swapped=1, seed=1)
    command = [
        "eval=[transfer]",
        f"eval.transfer.root={tmp_path / 'sets'}",
        "eval.transfer.sets=[own]",
        "eval.transfer.size=16",
    ]
    command += ["eval.transfer.num_strengths=2", "baselines=true"]
    name = "pixels/transfer_size-16_num_strengths-2/own_top1"
    assert evaluated(*command)[1][name] == 100.0
    shutil.copytree(tmp_path / "sets", tmp_path / "copies")
    exchange(tmp_path / "sets" / "own" / "test", tmp_path / "sets" / "own" / "other")
    results = evaluated(*command)[1]
    (other,) = (key for key in results if key.startswith("pixels/own-") and key.endswith("own_top1"))
    assert results[name] == 100.0, "the earlier result must be that of the first images"
    assert results[other] == 0.0
    of_copies = evaluated(*command[:1], f"eval.transfer.root={tmp_path / 'copies'}", *command[2:])[1]
    assert of_copies == results, "a copy in another folder counts as the same set"


def test_overlap(tmp_path, evaluated, capsys):
    write_bitmaps(tmp_path / "set" / "train", swapped=0, seed=0)
    write_bitmaps(tmp_path / "set" / "test", swapped=0, seed=1)
    shutil.copytree(tmp_path / "set" / "train", tmp_path / "set" / "other")
    command = ["eval=[knn_all]", "eval.knn.k=3", "data=folder", f"data.root={tmp_path / 'set'}"]
    assert evaluated(*command)[0] == 0
    exchange(tmp_path / "set" / "test", tmp_path / "set" / "other")
    assert (
        evaluated(*command)[0] == 2
        and "12 of the 12 images of folder/test are images of folder/train too" in capsys.readouterr().err
    )


def test_resume(tmp_path):
    write_bitmaps(tmp_path / "set" / "train", swapped=0, seed=0, count=40)
    write_bitmaps(tmp_path / "set" / "other", swapped=0, seed=1, count=40)
    command = ["data=folder", f"data.root={tmp_path / 'set'}", "eval=[]", "epochs=4", "warm_start.steps=0", "batch=32"]
    train(tmp_path / "run", *command, "max_steps=2")
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    exchange(tmp_path / "set" / "train", tmp_path / "set" / "other")
    with pytest.raises(UserError, match="expected a checkpoint made with these data .*; got one made with other data"):
        train(tmp_path / "run", *command, "max_steps=2")
    # a copy elsewhere counts as the same data
    train(tmp_path / "run", *command, "max_steps=2", f"data.root={tmp_path / 'copy'}")
