"""Computes frozen features of images: one pass of a backbone over them, by one rank or by all."""

import contextlib
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from caco import distributed
from caco.config import folders
from caco.errors import UserError

Precision = Literal["bf16", "fp32"]


def extract(
    backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device | str, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Features of all images in order, by the backbone in eval mode. The backbone's modes and buffers and the random
    number generators are left unchanged.

    Args:
        batches: (images [b, 3, H, W], labels [b]) pairs.
        precision: "bf16" (autocast) or "fp32".
    Returns:
        features [N, D] float32 and labels [N] int64, both on the CPU, so that they need no GPU memory.
    Raises:
        ValueError: the precision is unknown, or there are no batches.
        UserError: the backbone's output is not [b, D] or not finite.
    """
    features, labels = [], []

    def take(features_bD: Tensor, labels_b: Tensor) -> None:
        features.append(features_bD.float())
        labels.append(labels_b)

    for_each_batch(backbone, batches, take, device=device, precision=precision)
    if not features:
        raise ValueError("features: expected at least one batch of images, got none")
    return torch.cat(features), torch.cat(labels)


def for_each_batch(
    backbone: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    take: Callable[[Tensor, Tensor], Any],
    *,
    device: torch.device | str,
    precision: Precision,
    all_ranks: bool = False,
) -> None:
    """Like `extract`, but calls `take` with each batch's features [b, D], in the backbone's own type and on the CPU,
    and its labels.

    Args:
        all_ranks: True if every rank makes this call, each with its own batches. On rank 0 `take` gets the first batch
            of each rank, then the second of each, and so on; on the other ranks it gets nothing. An error on one rank
            is raised on all.
    """
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision: expected bf16 or fp32, got {precision!r}")
    device = torch.device(device)
    was_training = {module: module.training for module in backbone.modules()}
    cuda_devices = (
        [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    own = iter(batches)
    computed: list[tuple[Tensor, Tensor]] = []  # the batch that this rank has just computed
    arrived: list[tuple[Tensor, Tensor]] = []  # on rank 0: the last batch of every rank

    def work() -> bool:
        """Take what has arrived and compute the next batch; returns whether there was one. Arrived batches are taken
        here so that all ranks learn of an error in `take`.
        """
        for features_bD, labels_b in arrived:
            take(features_bD, labels_b)
        arrived.clear()
        for images, labels_b in own:
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            features_bD = backbone(images)
            if features_bD.ndim != 2 or len(features_bD) != len(images):
                raise UserError(f"backbone: expected features [{len(images)}, D], got {list(features_bD.shape)}")
            if not torch.isfinite(features_bD).all():
                raise UserError("features: expected finite numbers, got inf or nan from the backbone")
            computed.append((features_bD.cpu(), labels_b.cpu()))
            return True
        return False

    try:
        backbone.eval()
        # Training goes on afterwards, so its random numbers must not depend on the loading of batches or the backbone.
        with torch.random.fork_rng(devices=cuda_devices), torch.inference_mode(), autocast:
            while any(distributed.together(work) if all_ranks else [work()]):
                one = computed.pop() if computed else None  # in the last round some ranks may have no batch
                arrived += [part for part in (distributed.on_main(one) if all_ranks else [one]) if part is not None]
    finally:
        if isinstance(own, Generator):
            own.close()  # now, not when the last traceback that refers to it is freed: workers may be waiting
        for module, training in was_training.items():
            module.training = training


def in_one(num_images: int) -> tuple[list[Tensor], Callable[[Tensor, Tensor], None]]:
    """A list and a `take` for `for_each_batch`. The `take` copies all features into one tensor [num_images, D] float32,
    which it puts into the list, so that features are never in memory twice.
    """
    whole: list[Tensor] = []
    filled = [0]

    def take(features_bD: Tensor, labels_b: Tensor) -> None:
        if not whole:
            whole.append(torch.empty(num_images, features_bD.shape[1]))
        whole[0][filled[0] : filled[0] + len(features_bD)] = features_bD
        filled[0] += len(features_bD)

    return whole, take


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute matrix products in full float32, without TF32 or bfloat16, whatever training allows, so that results do
    not depend on that setting.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def network_digest(network: nn.Module) -> str:
    """A hash, 16 hexadecimal digits, of everything that decides what a network computes: its structure, all parameters
    and buffers, and the user's own code.
    """
    code = folders.code_of({type(module).__module__ for module in network.modules()})
    state = hashlib.sha256(f"{network!r}{code or ''}".encode())
    for name, tensor in network.state_dict().items():
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()[:16]
