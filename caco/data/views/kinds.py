"""Makes all kinds of view for a batch of images. The compiled code draws the views if it was built; otherwise Pillow
does, with the same bits. A view's `then` and `patches` are not compiled: Pillow and NumPy apply them in both cases.

Shapes: B images, P patches of each, H and W pixels, C channels, N random numbers; photographs are uint8 with C = 3.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from PIL import Image

from caco.data.views import native
from caco.data.views.draws import stream_of, uniforms


class Operation(Protocol):
    """A further operation of a view, as listed in its `then`. It is called with an RGB image and `numbers` random
    numbers in [0, 1), and returns an image of the same size. The same numbers must give the same image. operations.py
    has some operations.

    Attributes:
        numbers: how many random numbers each call receives, whether the operation uses them all or not.
    """

    numbers: int

    def __call__(self, image: Image.Image, u: Sequence[float]) -> Image.Image: ...


class Kinds:
    """All kinds of view of a recipe, in order.

    Args:
        kinds: (caco.data.views.augmentation.View, its size in pixels) pairs; at most one of them has patches.
    Attributes:
        channels, dtype: number of channels and type of the pixels.
    """

    channels = 3
    dtype: np.dtype = np.dtype(np.uint8)

    def __init__(self, kinds: Sequence[tuple[Any, int]]):
        self.kinds = list(kinds)
        self.cut = next((v for v, (view, _) in enumerate(self.kinds) if view.patches is not None), None)
        patches = None if self.cut is None else self.kinds[self.cut][0].patches
        self._each = None if patches is None or patches.each is None else self.of([(patches.each, patches.size)])
        self.patches = patches
        self.needs_finish = any(view.then for view, _ in self.kinds) or self.cut is not None

    def of(self, kinds: Sequence[tuple[Any, int]]) -> "Kinds":
        """Other kinds of view of the same sort of images: same channels and type of pixels."""
        return Kinds(kinds)

    def settings(self, scale: Sequence[float] = (1, 1, 1), offset: Sequence[float] = (0, 0, 0)) -> native.Settings:
        """The settings in the form that the compiled views take; scale and offset normalise a pixel, [3] each."""
        return native.settings(self.kinds, scale, offset)

    def shapes(self, count: int) -> list[tuple[int, ...]]:
        """For each kind, the shape [B, H, W, C] of its views of `count` images, before any view is cut into patches."""
        return [(count, size, size, self.channels) for _, size in self.kinds]

    def shape_of_patches(self, count: int) -> tuple[int, ...]:
        """The shape [B, P, H, W, C] of the patches of `count` images."""
        assert self.patches is not None
        return (count, self.patches.grid**2, self.patches.size, self.patches.size, self.channels)

    def make(
        self, images: Sequence[np.ndarray], samples: np.ndarray, stream: int
    ) -> tuple[list[np.ndarray], np.ndarray | None]:
        """Make all views of a batch.

        Args:
            images: [h, w, C] each.
            samples, stream: the random numbers follow from these two, see `draws.uniforms`.
        Returns:
            An array [B, H, W, C] for each kind without patches; and the patches [B, P, H, W, C] of the kind that has
            them, or None.
        """
        drawn = [np.empty(shape, self.dtype) for shape in self.shapes(len(images))]
        self.draw(images, samples, stream, drawn)
        patches = None if self.cut is None else np.empty(self.shape_of_patches(len(images)), self.dtype)
        self.finish(drawn, samples, stream, patches=patches)
        return [pixels for v, pixels in enumerate(drawn) if v != self.cut], patches

    def draw(self, images: Sequence[np.ndarray], samples: np.ndarray, stream: int, drawn: Sequence[np.ndarray]) -> None:
        """Crop and augment the images, and write the views of kind number v into drawn[v], without their `then`."""
        if native.library() is not None:
            images = [np.ascontiguousarray(image) for image in images]
            native.make_views(self.settings(), native.table(images), samples, stream, drawn)
            return
        for v, (view, size) in enumerate(self.kinds):
            for row, (image, u) in enumerate(zip(images, uniforms(stream, samples, v).tolist(), strict=True)):
                drawn[v][row] = view.draw(Image.fromarray(image), size, u)

    def finish(
        self,
        drawn: Sequence[np.ndarray],
        samples: np.ndarray,
        stream: int,
        *,
        patches: np.ndarray | None = None,
        num_threads: int = 1,
    ) -> None:
        """Complete views that `draw` made: apply each kind's `then` in place, and fill `patches`, [B, P, H, W, C], with
        the windows of the kind that has patches.
        """

        def part(rows: np.ndarray) -> None:
            some = slice(rows[0], rows[-1] + 1)
            for v, (view, _) in enumerate(self.kinds):
                if view.then or v == self.cut:
                    u = uniforms(stream, samples[some], v, view.numbers)
                    _further(view, drawn[v][some], u)
                    if v == self.cut and patches is not None:
                        patches[some] = self._cut(drawn[v][some], u[:, -view.patches.numbers :], samples[some], stream)

        if self.needs_finish and len(samples):
            _in_parts(part, len(samples), num_threads)

    def _cut(self, pixels_BHWC: np.ndarray, u_BN: np.ndarray, samples: np.ndarray, stream: int) -> np.ndarray:
        assert self.patches is not None and self.cut is not None
        patches = windows(self.patches, pixels_BHWC, u_BN)
        if self._each is not None:
            count = patches.shape[1]
            of_patches = (np.asarray(samples, np.int64)[:, None] * count + np.arange(count)).ravel()
            (made,), _ = self._each.make(
                list(patches.reshape(-1, *patches.shape[2:])), of_patches, stream_of(stream, self.cut)
            )
            patches = made.reshape(patches.shape)
        if self.patches.shuffled:
            order_BP = u_BN[:, 2 * patches.shape[1] :].argsort(1, kind="stable")
            patches = patches[np.arange(len(patches))[:, None], order_BP]
        return patches


def windows(patches: Any, pixels_BHWC: np.ndarray, u_BN: np.ndarray) -> np.ndarray:
    """Cut the windows of each image out, in row-major order: [B, P, size, size, C].

    Args:
        patches: caco.data.views.augmentation.Patches.
        pixels_BHWC: the views to cut.
        u_BN: uniform numbers; the first P give each window's shift down within its cell, the next P its shift to the
            right.
    """
    grid, size = patches.grid, patches.size
    corners = np.mgrid[:grid, :grid].reshape(2, -1) * patches.stride  # of the cells: [2, P], down and across
    corner_B2P = corners + (u_BN[:, : 2 * grid**2] * (patches.jitter + 1)).astype(np.int64).reshape(-1, 2, grid**2)
    made = np.empty((len(pixels_BHWC), grid**2, size, size, pixels_BHWC.shape[3]), pixels_BHWC.dtype)
    for pixels, of_image, (tops, lefts) in zip(pixels_BHWC, made, corner_B2P.tolist(), strict=True):
        for window, top, left in zip(of_image, tops, lefts, strict=True):
            window[...] = pixels[top : top + size, left : left + size]
    return made


def _further(view: Any, pixels_BHWC: np.ndarray, u_BN: np.ndarray) -> None:
    """Apply a view's `then`, in place."""
    if view.then:
        for pixels, u in zip(pixels_BHWC, u_BN.tolist(), strict=True):
            pixels[...] = view.further(Image.fromarray(pixels), u)


def _in_parts(work: Callable[[np.ndarray], None], count: int, num_threads: int) -> None:
    """Divide the rows 0 to count - 1 among threads and call `work` on each part."""
    parts = np.array_split(np.arange(count), min(num_threads, count))
    if len(parts) == 1:
        work(parts[0])
        return
    with ThreadPoolExecutor(len(parts)) as threads:
        list(threads.map(work, parts))
