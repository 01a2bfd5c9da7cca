"""A bank in anyone's own loop: the loss of a batch of embeddings against it, without a configuration, a Trainer or a
process group.

    bank = LearnableBank(size=65536, dim=128) # of caco.banks.learnable; or FifoBank of caco.banks.fifo, MoCo's queue
    ...
        loss = bank.loss(q, k)                                 # q of the encoder, k of its momentum twin, [B, D] each
        loss.backward()                                        # gradients of q; what it asks of the rows is noted
        optimizer.step()
        bank.update()                                          # the rows move, or take the keys: once an optimiser step

It is `Bank.score` of the methods (caco/methods/contrastive.py), with their two commonest positives, and so the same
kernels.

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
    """Embeddings of any length and precision as unit vectors in the rows' precision: bf16's eight bits do not survive
    tau 0.08.
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
    else:  # it is the first extra column, which comes right after the bank's rows
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
    """Raises UserError, which names everything that is wrong."""
    rows, problems = bank.rows, list[str]()
    expected = rows.weight.shape[1]
    if q_BD.ndim != 2 or q_BD.shape != k_BD.shape or q_BD.shape[1] != expected or not len(q_BD):
        problems.append(
            f"queries and keys: expected [B, {expected}] both, as wide as the bank's rows; got {list(q_BD.shape)} and"
            f" {list(k_BD.shape)}"
        )
    elif extra_BE is not None and (extra_BE.ndim != 2 or len(extra_BE) != len(q_BD)):
        problems.append(f"extra: expected cosines [{len(q_BD)}, E]; got {list(extra_BE.shape)}")
    if temperature <= 0:
        problems.append(f"temperature: expected a number above 0; got {temperature}")
    if positive not in ("row", "key"):
        problems.append(f"positive: expected row or key; got {positive!r}")
    if rows.weight.dtype not in (torch.float32, torch.float64):
        problems.append(
            f"the bank's rows: expected float32, got {str(rows.weight.dtype).removeprefix('torch.')}: small steps are"
            " lost in it; leave the bank out of .half() and .bfloat16(), and take autocast (in Lightning bf16-mixed)"
        )
    if rows.weight.device != q_BD.device:
        problems.append(
            f"the bank lies on {rows.weight.device} and the queries on {q_BD.device}: move it, as bank.to(device)"
        )
    device = q_BD.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        problems.append(
            "autocast: expected bfloat16, or none; got float16, whose loss scaling would scale the motion of the rows"
        )
    if (rows.first, rows.last) != distributed.shard(rows.size):
        problems.append(
            f"this bank was made before the process group of {distributed.world()} ranks, so each holds all of its"
            " rows: make it afterwards (in Lightning in configure_model)"
        )
    if problems:
        raise UserError("\n".join(problems))


def leave_to_ranks(module: nn.Module) -> nn.Module:
    """Call it on a module with banks inside before DistributedDataParallel wraps it (in Lightning at the end of
    configure_model).

    Each rank has other rows of a bank, and they get no gradients: DistributedDataParallel would write rank 0's rows
    over all others', and wait for gradients. This tells it which parameters and buffers to leave alone.

    Returns:
        the module.
    """
    of_banks = [
        f"{name}.{own}" if name else own
        for name, part in module.named_modules()
        if isinstance(part, Rows)
        for own in [*dict(part.named_parameters()), *dict(part.named_buffers())]
    ]
    # What DistributedDataParallel reads; the method of the same purpose has an underscore too.
    setattr(module, "_ddp_params_and_buffers_to_ignore", of_banks)
    return module
