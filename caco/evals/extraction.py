"""Frozen features of images: one pass of a backbone over them, by one rank or by all."""

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
    """Features of every image in order, by the backbone in eval mode; leaves its modes, buffers and the RNGs as they
    were.

    Args:
        batches: (images [b, 3, H, W], labels [b]) pairs.
        precision: "bf16" (autocast) or "fp32".
    Returns:
        features [N, D] float32 and labels [N] int64, both on the CPU, where a large set fits.
    Raises:
        ValueError: unknown precision, no batches, an output that is not [b, D], a feature that is not finite.
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
    """As `extract`, but gives each batch's features [b, D] (in the backbone's own type, on the CPU) and labels to
    `take`.

    Args:
        all_ranks: every rank is here, with batches of its own: `take` gets on rank 0 the first batch of each rank, then
            the second of each, and on the others nothing. What goes wrong on one rank is raised on all.
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
    computed: list[tuple[Tensor, Tensor]] = []  # by this rank, of the next batch
    arrived: list[tuple[Tensor, Tensor]] = []  # on rank 0, of the last one, by every rank

    def work() -> bool:
        """Whether there is another batch. What arrived is taken here, where the other ranks hear of it if that
        fails.
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
        # Neither the batches' making nor a backbone that draws may be seen by the training that goes on afterwards.
        with torch.random.fork_rng(devices=cuda_devices), torch.inference_mode(), autocast:
            while any(distributed.together(work) if all_ranks else [work()]):
                one = computed.pop() if computed else None  # the last batches may not be one for each rank
                arrived += [part for part in (distributed.on_main(one) if all_ranks else [one]) if part is not None]
    finally:
        if isinstance(own, Generator):
            own.close()  # now, and not when the last traceback that holds it goes: workers may wait behind it
        for module, training in was_training.items():
            module.training = training


def in_one(num_images: int) -> tuple[list[Tensor], Callable[[Tensor, Tensor], None]]:
    """A list that will hold one tensor [num_images, D] float32, and a `take` that fills it: features are not held
    twice.
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
    """Matrix products without TF32 or bfloat16, whatever training allows itself: what we count must not depend on
    that.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def network_digest(network: nn.Module) -> str:
    """Sixteen hexadecimal digits of what a network computes: its structure, every parameter and buffer, and code of the
    user's own.
    """
    code = folders.code_of({type(module).__module__ for module in network.modules()})
    state = hashlib.sha256(f"{network!r}{code or ''}".encode())
    for name, tensor in network.state_dict().items():
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()[:16]
