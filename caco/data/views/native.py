"""The compiled views (views.cpp), if they were built: whole batches at once, to the bit what Pillow makes."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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


IMAGE = np.dtype([("data", "<u8"), ("bytes", "<i8"), ("height", "<i4"), ("width", "<i4")])


def library() -> ctypes.CDLL | None:
    """The compiled views, or None where they were not built or are turned off; `why_not` says which."""
    loaded = instructions.compiled(instructions.VIEWS)
    if loaded is not None:
        loaded.caco_make_views.argtypes, loaded.caco_make_views.restype = [ctypes.POINTER(_Job)], None
    return loaded


def why_not() -> str:
    """Why there is no library."""
    return f"are turned off by {instructions.VARIABLE}=torch" if instructions.LEVEL == "torch" else "were not built"


@cache
def turbojpeg() -> ctypes.Array | None:
    """The addresses of libturbojpeg's functions that views.cpp calls, or None where it is not installed.

    The functions of version 2, which version 3 still has.
    """
    try:
        loaded = ctypes.CDLL("libturbojpeg.so.0")
    except OSError:
        return None
    names = ("InitDecompress", "DecompressHeader3", "Decompress2", "GetErrorStr2", "GetErrorCode", "Destroy")
    made = (ctypes.c_void_p * len(names))(
        *(ctypes.cast(getattr(loaded, f"tj{name}"), ctypes.c_void_p) for name in names)
    )
    setattr(made, "library", loaded)  # for as long as its addresses are held
    return made


@dataclass(frozen=True)
class Settings:
    """A recipe as C structs; the arrays are kept for as long as it is."""

    views: ctypes.Array
    scale: np.ndarray
    offset: np.ndarray


def settings(views: Sequence[tuple[Any, int]], scale: Any, offset: Any) -> Settings:
    """Of (view, its size) pairs, and the factor and summand that normalise each channel of a uint8 pixel."""
    made = (_View * len(views))()
    for struct, (view, size) in zip(made, views, strict=True):
        struct.size, struct.bicubic = size, view.interpolation == "bicubic"
        for name, kind, *_ in _View._fields_[2:]:
            value = getattr(view, name)
            setattr(struct, name, kind(*value) if isinstance(value, list) else value)
    return Settings(made, np.asarray(scale, np.float32), np.asarray(offset, np.float32))


def table(images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Where these images lie; they must stay there. One array [N, h, w, 3] or a sequence of [h, w, 3], all uint8."""
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
    """Fill out[v], [B, H, W, 3] each: normalised where it is float32, pixels where it is uint8.

    Args:
        images: rows of `table`.
        samples, stream: what the random numbers depend on, see caco.data.views.draws.uniforms.
        plain: not 0: no random view, but the middle of each image after its shorter side was resized to this.
    Returns:
        bool [B], which images are JPEGs that cannot be decoded; their rows of out are as they were.
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
    assert loaded is not None, "whoever calls this has asked"
    loaded.caco_make_views(ctypes.byref(job))  # lets go of the interpreter: other threads run on
    return unreadable
