"""Damaged .beton files: caco's reader, and, if it accepts the file, both loaders and every single image."""

import io
from pathlib import Path

import numpy as np
from damaging import damaged
from PIL import Image

from caco.data.loaders.bound import Loader
from caco.data.loaders.ffcv_loader import FFCVLoader, what_ffcv_lacks
from caco.data.loaders.plain import plain_batches
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.beton import FIELD, HEADER, JPEG, RAW, RECORD, BetonImages, sidecar_path, write
from caco.data.views.augmentation import View, Views
from caco.errors import UserError

VIEWS = Views(size=8, views={"two": View(count=2)}, mean=[0.5] * 3, std=[0.25] * 3)
PAGE = 4096
NUM_IMAGES = 12


def prepare(folder: Path) -> tuple[Path, bytes, bytes]:
    rng = np.random.default_rng(0)
    images = []
    for i in range(NUM_IMAGES):
        pixels = rng.integers(0, 256, (10 + i, 12, 3), np.uint8)
        if i % 2:
            Image.fromarray(pixels).save(out := io.BytesIO(), "JPEG")
            images.append((JPEG, 10 + i, 12, out.getvalue()))
        else:
            images.append((RAW, 10 + i, 12, pixels.tobytes()))
    file = folder / "train.beton"
    write(file, images, np.arange(NUM_IMAGES) % 3, NUM_IMAGES, {"classes": ["a", "b", "c"]}, page_size=PAGE)
    return file, file.read_bytes(), sidecar_path(file).read_bytes()


def case(prepared: tuple[Path, bytes, bytes], rng: np.random.Generator) -> str:
    file, whole, sidecar = prepared
    kind = int(rng.integers(0, 8))
    content = bytearray(whole)
    begin = HEADER.itemsize + 2 * FIELD.itemsize
    table_at = int(np.frombuffer(whole, HEADER, count=1)["table_at"][0])
    places = {
        0: (0, HEADER.itemsize),
        1: (HEADER.itemsize, begin),
        2: (begin, begin + NUM_IMAGES * RECORD.itemsize),
        3: (begin, begin + NUM_IMAGES * RECORD.itemsize),
        4: (table_at, len(whole)),
        5: (table_at, len(whole)),
    }
    sidecar_path(file).unlink(missing_ok=True)
    if kind in places:
        first, end = places[kind]
        for _ in range(int(rng.integers(1, 4))):
            at, size = int(rng.integers(first, end)), int(rng.integers(1, 9))
            value = [bytes([int(rng.integers(0, 256))]), rng.bytes(size), b"\xff" * size, bytes(size)][
                int(rng.integers(0, 4))
            ]
            content[at : min(end, at + len(value))] = value[: end - at]
    elif kind == 6:
        content = bytearray(damaged(whole, rng))
    else:
        sidecar_path(file).write_bytes(damaged(sidecar, rng))
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    try:
        source = BetonImages(file, name="damaged")
    except UserError as error:
        assert str(error).startswith(str(file.with_suffix(""))), error
        return "refused"
    source.digest()
    word = "read"
    for index in range(len(source)):
        try:
            source.image(index)
        except UserError as error:
            assert str(file) in str(error) and f"number {index}" in str(error)
            word = "read in part"
    loaders: list[Loader] = [TorchLoader(num_workers=0, corrupt="skip")]
    if what_ffcv_lacks(source) is None and rng.integers(0, 8) == 0:
        loaders.append(FFCVLoader(num_workers=1, corrupt="skip"))
    for settings in loaders:
        loader = settings.bind(source, VIEWS, batch=min(4, len(source)), seed=0)
        try:
            for _ in loader.epoch(0):
                pass
        except UserError as error:
            assert "damaged" in str(error)  # no image can be read
        finally:
            loader.close()
    try:
        for _ in plain_batches(source, VIEWS, batch=5, corrupt="skip"):
            pass
    except UserError as error:
        assert "damaged" in str(error)  # no image of that class can be read
    return word
