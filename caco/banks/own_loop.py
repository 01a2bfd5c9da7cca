"""A bank in a training loop of the user's own: the loss of a batch of embeddings against the bank. It needs no
configuration, no Trainer and no process group.

    bank = LearnableBank(size=65536, dim=128)  # from caco.banks.learnable; or MoCo's queue, FifoBank of caco.banks.fifo
    ...
        loss = bank.loss(q, k)      # q from the encoder, k from its momentum twin, [B, D] each
        loss.backward()             # gradients of q; the bank notes what it needs to move its rows
        optimizer.step()
        bank.update()               # the rows move, or the queue takes the keys: once an optimiser step

The loss is computed by `Bank.score`, which the methods use too (caco/methods/contrastive.py), so the same kernels
serve. Of the methods' kinds of positives it has the two most common ones.

Shapes: B this rank's queries, D width, E extra columns.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import distributed
from caco.banks.base import Bank
from caco.banks.rows import Rows
from caco.errors import UserError

PositiveOf = Literal["row", "key"]


def unit(embedding_BD: Tensor, rows: Rows) -> Tensor:
    """Embeddings [B, D] of any norm and precision as unit vectors in the rows' precision. The eight bits of bf16 are
    too coarse for cosines that are divided by a temperature of 0.08.
    """
    with torch.autocast(embedding_BD.device.type, enabled=False):
        return F.normalize(embedding_BD.to(rows.weight.dtype), dim=1)


def loss(
    bank: Bank,
    q_BD: Tensor,
    k_BD: Tensor,
    *,
    temperature: float,
    positive: PositiveOf,
    extra_BE: Tensor | None = None,
    learn: bool = True,
) -> Tensor:
    """The mean over this rank's queries of InfoNCE over all rows of the bank, a scalar; see `LearnableBank.loss`."""
    _refuse_unfit(bank, q_BD, k_BD, temperature, positive, extra_BE)
    q_BD, k_BD = unit(q_BD, bank.rows), unit(k_BD, bank.rows)
    if positive == "row":
        row_B = bank.rows.most_probable(k_BD)
    else:  # the key is the first extra column, and the columns are counted on from the bank's rows
        row_B = torch.full((len(q_BD),), bank.size, device=q_BD.device)
        key_B1 = (q_BD * k_BD).sum(1, keepdim=True)
        extra_BE = key_B1 if extra_BE is None else torch.cat([key_B1, extra_BE.to(key_B1.dtype)], 1)
    if extra_BE is not None:
        extra_BE = extra_BE.to(q_BD.dtype)
    value = bank.score(q_BD, row_B, temperature=temperature, extra_BE=extra_BE, learn=learn).loss_B.mean()
    extra = bank.regulariser(q_BD, temperature=temperature) if learn else None
    return value if extra is None else value + extra


def _refuse_unfit(
    bank: Bank, q_BD: Tensor, k_BD: Tensor, temperature: float, positive: str, extra_BE: Tensor | None
) -> None:
    """Raise a UserError that names everything that is wrong with the arguments of `loss`, if anything is."""
    rows, problems = bank.rows, list[str]()
    expected = rows.weight.shape[1]
    if q_BD.ndim != 2 or q_BD.shape != k_BD.shape or q_BD.shape[1] != expected or not len(q_BD):
        problems.append(
            f"queries and keys: expected shape [B, {expected}] for both, as wide as the bank's rows; got"
            f" {list(q_BD.shape)} and {list(k_BD.shape)}"
        )
    elif extra_BE is not None and (extra_BE.ndim != 2 or len(extra_BE) != len(q_BD)):
        problems.append(f"extra: expected cosines [{len(q_BD)}, E]; got {list(extra_BE.shape)}")
    if temperature <= 0:
        problems.append(f"temperature: expected a number above 0; got {temperature}")
    if positive not in ("row", "key"):
        problems.append(f"positive: expected row or key; got {positive!r}")
    if rows.weight.dtype not in (torch.float32, torch.float64):
        problems.append(
            f"the bank's rows: expected float32, got {str(rows.weight.dtype).removeprefix('torch.')}, which would lose"
            " small steps; do not apply .half() or .bfloat16() to the bank, but use autocast (in Lightning bf16-mixed)"
        )
    if rows.weight.device != q_BD.device:
        problems.append(
            f"the bank is on {rows.weight.device} and the queries are on {q_BD.device}: move the bank, as"
            " bank.to(device)"
        )
    device = q_BD.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        problems.append(
            "autocast: expected bfloat16 or no autocast; got float16, whose loss scaling would scale the motion of the"
            " rows too"
        )
    if (rows.first, rows.last) != distributed.shard(rows.size):
        problems.append(
            f"this bank was made before the process group of {distributed.world()} ranks, so each rank holds all rows:"
            " make the bank after the process group (in Lightning in configure_model)"
        )
    if problems:
        raise UserError("\n".join(problems))


def leave_to_ranks(module: nn.Module) -> nn.Module:
    """Tell DistributedDataParallel to leave the banks inside a module alone. Call this before it wraps the module (in
    Lightning at the end of configure_model).

    Each rank holds other rows of a bank, and the rows get no gradients. Without this call, DistributedDataParallel
    would overwrite every rank's rows with those of rank 0 and wait for gradients that never come.

    Returns:
        the module.
    """
    of_banks = [
        f"{name}.{own}" if name else own
        for name, part in module.named_modules()
        if isinstance(part, Rows)
        for own in [*dict(part.named_parameters()), *dict(part.named_buffers())]
    ]
    # DistributedDataParallel reads this attribute. torch's own method for setting it is as private.
    setattr(module, "_ddp_params_and_buffers_to_ignore", of_banks)
    return module
