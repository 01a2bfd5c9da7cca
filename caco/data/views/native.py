"""Calls the compiled views (views.cpp), which may be missing: whole batches at once, with the same bits as Pillow's."""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from caco import instructions


class _View(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_int32),
        ("bicubic", ctypes.c_int32),
        ("scale", ctypes.c_double * 2),
        ("ratio", ctypes.c_double * 2),
        ("rotate", ctypes.c_double),
        ("shift", ctypes.c_double),
        ("jitter", ctypes.c_double * 4),
        ("jitter_p", ctypes.c_double),
        ("gray_p", ctypes.c_double),
        ("blur", ctypes.c_double * 2),
        ("blur_p", ctypes.c_double),
        ("solarize_p", ctypes.c_double),
        ("flip_p", ctypes.c_double),
    ]


class _Job(ctypes.Structure):
    _fields_ = [
        ("num_images", ctypes.c_int64),
        ("images", ctypes.c_void_p),
        ("samples", ctypes.c_void_p),
        ("stream", ctypes.c_uint64),
        ("num_views", ctypes.c_int32),
        ("views", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("plain", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("set", ctypes.c_int32),
        ("turbojpeg", ctypes.c_void_p),
        ("unreadable", ctypes.c_void_p),
    ]


# One image: pixels; or a JPEG of this many bytes, or a path with bytes = -1. The size of a JPEG may be left 0.
IMAGE = np.dtype([("data", "<u8"), ("bytes", "<i8"), ("height", "<i4"), ("width", "<i4")])


def library() -> ctypes.CDLL | None:
    """The compiled views, or None if they were not built or are turned off; `why_not` tells which of the two."""
    loaded = instructions.compiled(instructions.VIEWS)
    if loaded is not None:
        loaded.caco_make_views.argtypes, loaded.caco_make_views.restype = [ctypes.POINTER(_Job)], None
    return loaded


def why_not() -> str:
    """Why `library` gives None, as the end of a sentence about the compiled views."""
    return f"are turned off by {instructions.VARIABLE}=torch" if instructions.LEVEL == "torch" else "were not built"


@cache
def turbojpeg() -> ctypes.Array | None:
    """The addresses of the functions of libturbojpeg that views.cpp calls, or None if the library is not installed.

    They are functions of libturbojpeg 2; version 3 still has them.
    """
    try:
        loaded = ctypes.CDLL("libturbojpeg.so.0")
    except OSError:
        return None
    names = ("InitDecompress", "Decompress2", "Destroy")
    made = (ctypes.c_void_p * len(names))(
        *(ctypes.cast(getattr(loaded, f"tj{name}"), ctypes.c_void_p) for name in names)
    )
    setattr(made, "library", loaded)  # keeps the library loaded for as long as its addresses are in use
    return made


@dataclass(frozen=True)
class Settings:
    """A recipe's settings as C structs; this object keeps the arrays alive that the structs point to."""

    views: ctypes.Array
    scale: np.ndarray
    offset: np.ndarray


def settings(views: Sequence[tuple[Any, int]], scale: Any, offset: Any) -> Settings:
    """The settings for the compiled views.

    Args:
        views: (caco.data.views.augmentation.View, its size in pixels) pairs.
        scale, offset: [3] each; a pixel of 0..255 is normalised to pixel * scale + offset.
    """
    made = (_View * len(views))()
    for struct, (view, size) in zip(made, views, strict=True):
        struct.size, struct.bicubic = size, view.interpolation == "bicubic"
        for name, kind, *_ in _View._fields_[2:]:
            value = getattr(view, name)
            setattr(struct, name, kind(*value) if isinstance(value, list) else value)
    return Settings(made, np.asarray(scale, np.float32), np.asarray(offset, np.float32))


def table(images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """The addresses and sizes of images in memory, an `IMAGE` record for each. The caller keeps the images alive and in
    place while the table is in use.

    Args:
        images: one array uint8 [N, h, w, 3], or a sequence of arrays uint8 [h, w, 3].
    """
    made = np.zeros(len(images), IMAGE)
    if isinstance(images, np.ndarray):
        assert images.flags.c_contiguous and images.dtype == np.uint8 and images.shape[3:] == (3,)
        made["data"] = images.ctypes.data + images.strides[0] * np.arange(len(images))
        made["height"], made["width"] = images.shape[1:3]
        return made
    for row, image in zip(made, images, strict=True):
        assert image.flags.c_contiguous and image.dtype == np.uint8 and image.shape[2:] == (3,)
        row["data"], row["height"], row["width"] = image.ctypes.data, *image.shape[:2]
    return made


def encoded_table(images: Sequence[Any]) -> tuple[np.ndarray, object]:
    """Encoded images as `IMAGE` records whose sizes are only known from their headers; and what the caller has to keep
    alive while the records are in use.

    Args:
        images: for each image the path of its file, or its bytes.
    """
    made = np.zeros(len(images), IMAGE)
    are_files = [isinstance(image, Path) for image in images]
    held = [
        np.frombuffer(os.fsencode(image) + b"\0" if is_file else image or b"\0", np.uint8)  # no bytes mean pixels
        for image, is_file in zip(images, are_files, strict=True)
    ]
    made["data"] = [content.ctypes.data for content in held]
    made["bytes"] = [-1 if is_file else len(content) for content, is_file in zip(held, are_files, strict=True)]
    return made, held


def make_views(
    settings: Settings,
    images: np.ndarray,
    samples: np.ndarray,
    stream: int,
    out: Sequence[np.ndarray],
    *,
    plain: int = 0,
    num_threads: int = 1,
) -> np.ndarray:
    """Make all views of a batch and write them into `out`.

    Args:
        images: rows of `table` or `encoded_table`, [B].
        samples, stream: the random numbers follow from these two, see caco.data.views.draws.uniforms.
        out: for each view an array [B, H, W, 3]: float32 is filled with normalised values, uint8 with pixels.
        plain: 0 makes random views; another number makes the plain view instead: the shorter side is resized to this
            many pixels, and the middle is cropped.
    Returns:
        bool [B]: which encoded images were not decoded; their rows of `out` are unchanged. Only JPEGs of the usual
        kinds are decoded, to the bits of caco.data.sets.reading.rgb, and only within its limits; about all others
        `rgb` decides.
    """
    images, samples = np.ascontiguousarray(images), np.ascontiguousarray(samples, np.int64)
    normalise = out[0].dtype == np.float32
    assert len(images) == len(samples) and len(out) == len(settings.views)
    for one, view in zip(out, settings.views, strict=True):
        assert (
            one.shape == (len(images), view.size, view.size, 3) and one.flags.c_contiguous and one.dtype == out[0].dtype
        )
    unreadable = np.zeros(len(images), bool)
    functions = turbojpeg() if images["bytes"].any() else None
    assert functions is not None or not images["bytes"].any()
    addresses = (ctypes.c_void_p * len(out))(*(one.ctypes.data for one in out))
    job = _Job(
        num_images=len(images),
        images=images.ctypes.data,
        samples=samples.ctypes.data,
        stream=stream,
        num_views=len(out),
        views=ctypes.addressof(settings.views),
        out=ctypes.addressof(addresses),
        scale=settings.scale.ctypes.data if normalise else None,
        offset=settings.offset.ctypes.data if normalise else None,
        plain=plain,
        num_threads=num_threads,
        set=instructions.number(),
        turbojpeg=None if functions is None else ctypes.addressof(functions),
        unreadable=unreadable.ctypes.data,
    )
    loaded = library()
    assert loaded is not None, "the caller has to check that library() is not None"
    loaded.caco_make_views(ctypes.byref(job))  # ctypes releases the interpreter's lock, so other threads run on
    return unreadable
