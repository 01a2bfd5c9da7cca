"""Training steps on a device that has no values: whoever asks for one is found, as on a GPU he would wait for it.

PyTorch's device "meta" computes shapes alone. A step that only tells such a device what to do goes through; one that
reads a number from it, or makes a tensor whose shape depends on one, is an error by itself. `Watch` adds what a GPU
waits for and this device does not: a tensor of the host's that is sent over from memory that is not pinned.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from tiny import noise
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from caco import devices
from caco.banks import scoring
from caco.banks.by_image import ImageBank
from caco.banks.kernels import fused
from caco.config.composition import instantiate
from caco.data.loaders.batches import Batch
from caco.engine import losses
from caco.engine.assembly import build_method
from caco.engine.optimizers import Optimisation, OptimizerSchedule
from caco.engine.trainer import Trainer
from caco.methods.pcl import PCL
from caco.methods.sela import SeLa
from caco.schedules import RunShape

META = torch.device("meta")
# Whose kernels on a GPU take a number of the host's as an argument.
WITH_NUMBERS = {"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "lt", "gt", "le", "ge", "eq", "ne", "pow",
                "maximum", "minimum", "rsub", "lerp", "lerp_", "remainder", "bitwise_and"}  # fmt: skip
SHAPED_BY_VALUES = {"nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "repeat_interleave", "item",
                    "_local_scalar_dense", "is_nonzero", "equal", "unique_consecutive"}  # fmt: skip


class WaitedError(AssertionError):
    """A step would have waited for a GPU."""


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


class Watch(TorchDispatchMode):
    """Refuses what a GPU would wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        name = func.__name__.partition(".")[0]
        ahead = [x for x in tensors if x.device == META]
        if ahead and name in SHAPED_BY_VALUES:
            raise WaitedError(f"{func} reads values")
        if ahead and name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(map(_is_mask, args[1])):
            raise WaitedError(f"{func} by a mask: its shape depends on values")
        made = func(*args, **(kwargs or {}))
        on_meta = ahead or any(isinstance(x, torch.Tensor) and x.device == META for x in tree_leaves(made))
        of_host = [x for x in tensors if x.device.type == "cpu"]
        if on_meta and of_host and not (name in WITH_NUMBERS and all(x.ndim == 0 for x in of_host)):
            raise WaitedError(f"{func} sends a tensor of the host's")
        return made


class Over(Exception):
    """As many steps as were to be made have been made."""


class Loader:
    """The same batch again and again, on the device already."""

    def __init__(self, batch: Batch, steps: int):
        self.batch, self.left, self.steps_per_epoch = batch, steps, 1000

    def epoch(self, epoch: int, first: int, order: np.ndarray | None = None) -> Iterator[Batch]:
        while self.left:
            self.left -= 1
            yield self.batch
        raise Over


class Arrived:
    """Numbers from a device that has none."""

    def __init__(self, numbers_N: torch.Tensor):
        self.count = len(numbers_N)

    def read(self) -> list[float]:
        return [1.0] * (self.count - 1) + [0.0]  # the last one: nobody was told to stop


class _NoKernel:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def _not_on_meta(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is not None and torch.device(device) == META:
            raise WaitedError("numbers of the host's are sent")
        return make(data, *args, device=device, **kwargs)

    return made


def on_meta(monkeypatch: Any) -> None:
    """The device without values takes what a GPU takes: Triton's kernels, which do nothing there, and what is sent to
    it without waiting; what comes from it are ones.
    """
    from caco.banks.kernels import triton_passes

    def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=device)

    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # it knows no such device
    # They copy a number where nobody sees it.
    monkeypatch.setattr(torch, "tensor", _not_on_meta(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", _not_on_meta(torch.as_tensor))
    monkeypatch.setattr(scoring, "low_precision", lambda device: True)
    monkeypatch.setattr(devices, "sent", sent)
    monkeypatch.setattr(losses, "Sent", Arrived)
    monkeypatch.setattr(fused, "supports", lambda *tensors: True)
    for name in ("forward", "nearest_row", "update"):
        monkeypatch.setattr(fused, name, getattr(triton_passes, name))
    monkeypatch.setattr(triton_passes, "KERNELS", dict.fromkeys(triton_passes.KERNELS, _NoKernel()))


class Nothing:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: {}


def trainer_of(cfg: Any, *, steps: int, in_training: bool, num_images: int = 256) -> Trainer:
    """Of a configuration, on the device without values; it ends by `Over` after so many steps."""
    method = build_method(cfg, num_images).to(META).train()
    views, patches = noise(cfg, cfg.batch, torch.Generator())
    index = torch.empty(cfg.batch, dtype=torch.int64, device=META)
    batch = Batch([view.to(META) for view in views], index, index, None if patches is None else patches.to(META))
    schedule = dict(cfg.schedule)
    run = RunShape(cfg.epochs, 1000, cfg.batch, schedule.pop("unit"), 0)
    nothing: Any = Nothing()
    loader: Any = Loader(batch, steps)
    trainer = Trainer(
        method=method, loader=loader, images=nothing, run=run, evaluation=nothing, tracker=nothing, checkpoints=nothing,
        optimisation=Optimisation(
            instantiate(cfg.optimizer, groups=method.parameter_groups()), OptimizerSchedule(**schedule), run
        ),
        device=META, seed=0, config_hash="", data_digest="", precision="fp32", log_every_steps=1000,
        accumulate=cfg.accumulate,
    )  # fmt: skip
    trainer.step = trainer.course.training_starts + 1 if in_training else 0
    trainer.evaluation_due = None
    # What the host does before an epoch, and what it has read in the first one.
    method.before_epoch = lambda now, images: None  # type: ignore[method-assign]
    if isinstance(method, SeLa):
        method.make_labels = lambda images, step, heads: None  # type: ignore[method-assign]
    for part in method.modules():
        if isinstance(part, ImageBank):
            part._known.note(part.normaliser, [1.0] * part.parts)
            part._are_unit = True
        if isinstance(part, PCL):
            part._has_clusters.note(part.made, True)
    return trainer
