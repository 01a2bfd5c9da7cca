"""The process group, made from torchrun's environment variables (caco/launch/jobs.py sets them too), and the few
collectives that caco needs. Without these variables there is one process and no group.

With one process every function returns its own input, so no caller needs to ask how many processes there are.
"""

import datetime
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from caco.errors import UserError

_patient: dist.ProcessGroup | None = None  # for collectives that may wait for hours; made when first needed
T = TypeVar("T")


def start(device: torch.device, *, timeout_s: float = 600.0) -> None:
    """Join the process group that the environment describes; a single process joins none.

    Raises:
        UserError: the other ranks do not join within the time-out.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=timeout_s)
            )
        except (RuntimeError, ValueError) as error:  # torch's errors; ValueError: a variable is missing
            place = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"the {os.environ['WORLD_SIZE']} processes of this run did not find one another within {timeout_s:g} s"
                f" at {place} ({str(error).splitlines()[0][:200]}): check that all are started and that their machines"
                " reach the first one"
            ) from error


def stop() -> None:
    global _patient
    if dist.is_initialized():
        dist.destroy_process_group()
    _patient = None


def has_lost_another(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has ended, or has not answered within the time-out."""
    return world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def wait_for_main() -> None:
    """A barrier of all ranks without a time-out, because rank 0 may work for hours in the meantime."""
    if world() > 1:
        dist.barrier(group=_patient_group())


def _patient_group() -> dist.ProcessGroup:
    """The group of all ranks on gloo, without a time-out: for plain values and CPU tensors, and for work of unknown
    length.
    """
    global _patient
    if _patient is None:
        made = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
        assert isinstance(made, dist.ProcessGroup), "every rank is in it"
        _patient = made
    return _patient


def together(work: Callable[[], T]) -> list[T]:
    """What `work` returns on each rank, in rank order, on every rank. The values must be picklable. There is no
    time-out.

    An error on one rank is raised on all ranks, so no rank waits for one that has failed.
    """
    if world() == 1:
        return [work()]
    result: T | None = None
    raised: Exception | None = None
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must be told
        raised = error
    told = None if raised is None else (isinstance(raised, UserError), str(raised) or type(raised).__name__)
    everyone: list[Any] = [None] * world()
    dist.all_gather_object(everyone, (result, told), group=_patient_group())
    if raised is not None:
        raise raised
    for number, (_, theirs) in enumerate(everyone):
        if theirs is not None:
            of_user, text = theirs
            raise UserError(text) if of_user else RuntimeError(f"rank {number}: {text}")
    return [value for value, _ in everyone]


def on_each(work: Callable[[], T]) -> T:
    """Like `together`, but each rank keeps only its own result, which may have any size and type."""
    own: list[T] = []
    together(lambda: own.append(work()))
    return own[0]


def on_main(value: T) -> list[T]:
    """On rank 0 every rank's value, in rank order; on the other ranks []. The values must be picklable."""
    if world() == 1:
        return [value]
    values: list[Any] | None = [None] * world() if is_main() else None
    dist.gather_object(value, values, dst=0, group=_patient_group())
    return values or []


def sum_(x: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def max_(x: Tensor) -> Tensor:
    """Elementwise maximum over the ranks, in place."""
    if world() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def gather(x: Tensor) -> Tensor:
    """[B, ...] of every rank, joined in rank order to [world * B, ...]; without gradient. B is the same on every
    rank.
    """
    if world() == 1:
        return x.detach()
    own_part = x.detach().contiguous()  # so that every rank sends the same memory layout
    parts = [torch.empty_like(own_part) for _ in range(world())]
    dist.all_gather(parts, own_part)
    return torch.cat(parts)


def from_main(x: Tensor) -> Tensor:
    """Rank 0's tensor on every rank, in place; x must have the same shape everywhere."""
    if world() > 1:
        dist.broadcast(x, src=0)
    return x


def gather_on_main(x: Tensor) -> Tensor:
    """Every rank's [B, ...], where B may differ, joined on rank 0 in CPU memory; other ranks return their own part. For
    tensors too large to be on every rank: a device holds its own part and one more."""
    if world() == 1:
        return x.detach()
    own_part = x.detach().contiguous()
    sizes = all_objects(len(own_part))
    if not is_main():
        dist.send(own_part, dst=0)
        return own_part
    parts = [own_part.cpu()]
    for other in range(1, world()):
        received = own_part.new_empty((sizes[other], *own_part.shape[1:]))
        dist.recv(received, src=other)
        parts.append(received.cpu())
    return torch.cat(parts)


def exchange(x: Tensor) -> Tensor:
    """From [world * B, ...], whose part r is for rank r, to [world, B, ...]: what each rank has for this one. Without
    gradient.
    """
    if world() == 1:
        return x.detach()[None]
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.detach().contiguous())
    return received.unflatten(0, (world(), -1))


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return gather(x)

    @staticmethod
    def backward(ctx, grad):
        part = len(grad) // world()
        return own(sum_(grad.contiguous().clone()), part)


def gather_with_gradient(x: Tensor) -> Tensor:
    """Like `gather`, but with a gradient: the gradients that all ranks have for this rank's part are summed."""
    return x if world() == 1 else _GatherWithGradient.apply(x)


class _SumWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return sum_(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return sum_(grad.contiguous().clone())


def sum_with_gradient(x: Tensor) -> Tensor:
    """Sum over the ranks. In the backward pass the gradients that the ranks have for it are summed too."""
    return x if world() == 1 else _SumWithGradient.apply(x)


class _SumForAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return sum_(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return grad * world()


def sum_for_all(x: Tensor) -> Tensor:
    """Sum over the ranks, if every rank then computes the same from it. The gradients are then equal on all ranks, so
    the sum that `sum_with_gradient` would make of them needs no message."""
    return x if world() == 1 else _SumForAll.apply(x)


def own(x: Tensor, part: int) -> Tensor:
    """This rank's rows, `part` of them, of a gathered tensor."""
    return x[rank() * part : (rank() + 1) * part]


@torch.no_grad()
def mean_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the ranks, in one flat message.

    This happens after the backward pass, not during it: so it is one visible line of the training loop, and an encoder
    may run several times in a step.
    """
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def shared_object(value: Any, *, patient: bool = False) -> Any:
    """Rank 0's value on every rank; only for small picklable values.

    Args:
        patient: wait without a time-out, because rank 0 may come hours after the others.
    """
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_patient_group() if patient else None)
    return box[0]


def all_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order; only for small picklable values."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def shard(size: int) -> tuple[int, int]:
    """The first of this rank's contiguous rows, and the one after its last. If the rows cannot be divided evenly, the
    first ranks have one more.

    Raises:
        UserError: fewer rows than ranks.
    """
    if size < world():
        raise UserError(f"a bank of {size} rows cannot be shared by {world()} ranks: expected at least one row each")
    part, more = divmod(size, world())
    first = rank() * part + min(rank(), more)
    return first, first + part + (rank() < more)
