"""The loader that reads a .beton through FFCV, and the loader that uses FFCV where possible."""

import sys
from collections.abc import Iterable
from typing import Any, Literal

import torch

from caco import instructions
from caco.data.loaders.batches import Order
from caco.data.loaders.bound import BoundLoader, Loader, Made
from caco.data.loaders.rows import rows_of
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.sources import Source
from caco.data.views import native
from caco.data.views.augmentation import Views
from caco.errors import UserError
from caco.installed import command_to_install, is_installed
from caco.ranges import Ahead, Threads, Workers, held


class FFCVLoader(Loader):
    """Settings of a loader that reads a .beton through FFCV; `bind` combines them with data. It makes the same batches
    as `TorchLoader`, to the bit.

    Each JPEG is decoded once for all of its views, inside FFCV's pipeline (caco/data/loaders/ffcv_pipeline.py).

    Args:
        num_workers: threads that decode and make views, at least 1.
        prefetch, corrupt: as in `TorchLoader`.
    Raises:
        UserError: num_workers or prefetch is below 1, or `corrupt` is another word.
    """

    @held
    def __init__(self, *, num_workers: Threads = 2, prefetch: Ahead = 4, corrupt: Literal["fail", "skip"] = "fail"):
        self.num_workers, self.prefetch, self.corrupt = num_workers, prefetch, corrupt

    def bind(
        self,
        source: Source,
        views: Views,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        drop_last: bool = True,
    ) -> BoundLoader:
        """As `TorchLoader.bind`.

        Raises:
            UserError: also if the data are not a .beton, or FFCV or a compiled part is missing.
        """
        packed = source.packed
        if (missing := what_ffcv_lacks(source)) is not None or packed is None:
            raise UserError(f"loader=ffcv: {missing}; loader=auto and loader=torch do without")
        from caco.data.loaders.ffcv_pipeline import FFCVBatches

        device = torch.device(device)

        def maker(order: Order) -> Iterable[Made]:
            return FFCVBatches(
                source, packed, views, seed, order, self.num_workers, self.prefetch, self.corrupt, device
            )

        return BoundLoader(
            maker, source, views, batch=batch, seed=seed, rank=rank, world=world, device=device, drop_last=drop_last
        )


class AutoLoader(Loader):
    """Uses FFCV if the data are a .beton and FFCV is installed, otherwise `TorchLoader`. The batches are the same.

    Args:
        num_workers, prefetch, corrupt: as in `TorchLoader`.
    """

    @held
    def __init__(self, *, num_workers: Workers = 2, prefetch: Ahead = 4, corrupt: Literal["fail", "skip"] = "fail"):
        self.num_workers = num_workers
        self._torch = TorchLoader(num_workers=num_workers, prefetch=prefetch, corrupt=corrupt)
        self._ffcv = FFCVLoader(num_workers=max(1, num_workers), prefetch=prefetch, corrupt=corrupt)
        self.corrupt = corrupt

    def bind(self, source: Source, views: Views, *, rank: int = 0, **options: Any) -> BoundLoader:
        """As `TorchLoader.bind`; rank 0 prints which loader is used."""
        missing = what_ffcv_lacks(source)
        if rank == 0:
            print(f"caco: images and augmentation: {_chosen(source, missing)}", file=sys.stderr)
        loader = self._torch if missing is not None else self._ffcv
        return loader.bind(source, views, rank=rank, **options)


def _chosen(source: Source, missing: str | None) -> str:
    if missing is None:
        return "FFCV reads, its compiled pipeline augments"
    if source.channels is not None:
        plural = "s" * (source.channels > 1)
        return f"worker processes read {source.channels} channel{plural} as stored, augmented by NumPy and Pillow"
    how = f"Pillow (the compiled views {native.why_not()})" if native.library() is None else "compiled C++ code"
    if source.arrays is not None:
        return f"decoded images kept in memory, augmented by {how}"
    reading = (
        f"worker processes read files, augmented by {how}"
        if rows_of(source, 1) is None
        else "threads of compiled C++ code decode images and augment them"
    )
    return reading + (f"; FFCV is not used: {missing}" if source.packed is not None else "")


def what_ffcv_lacks(source: Source) -> str | None:
    """The reason why FFCV cannot read these data on this machine; None if it can."""
    if source.packed is None:
        return "reads a .beton (data=beton), which python -m caco.write makes of any data"
    if native.library() is None:
        do = (
            f"unset {instructions.VARIABLE}"
            if instructions.LEVEL == "torch"
            else "install a C++ compiler, then caco again"
        )
        return f"needs the compiled views, which {native.why_not()}: {do}"
    if native.turbojpeg() is None:
        return "needs libturbojpeg (Debian: libturbojpeg0)"
    if not is_installed("ffcv"):
        return (
            f"needs FFCV: {command_to_install('ffcv')} (Debian: with libopencv-dev, libturbojpeg0-dev and pkg-config)"
        )
    return None
