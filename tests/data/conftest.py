"""Tiny image sets that the tests write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from spectra import wave

from caco.data.sets.beton import BetonImages
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.sources import Splits
from caco.data.views import native
from caco.data.views.augmentation import View, Views
from caco.write import write_splits


def noise(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


@pytest.fixture
def write_images() -> Callable[..., None]:
    """write_images(folder, count, size=8, suffix=".png") writes images 0000, 0001, ... into a folder."""

    def write(folder: Path, count: int, size: int = 8, suffix: str = ".png") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(noise(size, i)).save(folder / f"{i:04d}{suffix}")

    return write


@pytest.fixture
def noise_source() -> Callable[..., ImagesInMemory]:
    """noise_source(count) makes a source of `count` different images with labels 0, 1, 2, 0, ..."""

    def make(count: int, size: int = 12) -> ImagesInMemory:
        images = np.stack([noise(size, i) for i in range(count)])
        return ImagesInMemory(images, name="noise", labels=np.arange(count) % 3, classes=["a", "b", "c"])

    return make


@pytest.fixture
def beton_source(noise_source, tmp_path: Path) -> Callable[[int], BetonImages]:
    """beton_source(count) writes the images of noise_source(count) as raw pixels into a .beton."""

    def make(count: int) -> BetonImages:
        source = noise_source(count)
        write_splits(Splits(source, source, None), tmp_path, mode="raw", num_workers=1)
        return BetonImages(tmp_path / "train.beton", name="noise")

    return make


@pytest.fixture(scope="module")
def spectra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled folder of float32 .npy files with five channels."""
    root = tmp_path_factory.mktemp("spectra")
    for split, count in (("train", 10), ("test", 4)):
        for label in range(2):
            (root / split / f"c{label}").mkdir(parents=True)
            for i in range(count):
                np.save(root / split / f"c{label}" / f"{i}.npy", wave(100 * label + i + 7 * count, 5) + label)
    return root


@pytest.fixture
def two_views() -> Views:
    """A recipe of two large views and a smaller third, in which every random step is used."""
    kind: dict[str, Any] = {"blur_p": 0.5, "solarize_p": 0.5, "rotate": 10.0, "shift": 0.1}
    return Views(
        size=8, views={"both": View(count=2, **kind), "small": View(size=6, **kind)}, mean=[0.5] * 3, std=[0.25] * 3
    )


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make caco behave as if it was installed without a compiler."""
    monkeypatch.setattr(native, "library", lambda: None)
