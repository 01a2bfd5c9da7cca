"""BatchNorm over the batch of all ranks. torch's SyncBatchNorm does it on CUDA and refuses CPU tensors."""

from typing import Any, TypeVar, cast

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from caco import distributed
from caco.errors import UserError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)  # timm's layers derive from these
M = TypeVar("M", bound=nn.Module)



class AllRanksBatchNorm(nn.BatchNorm1d):
    """BatchNorm of any [B, C, ...] with statistics over all ranks, for CPU processes; the gradient flows through the statistics.

    Args:
        replaced: the layer whose place this one takes: it has that one's parameters and statistics, and, as timm's
            BatchNormAct2d does, it goes on to that one's drop-out and activation.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float
    drop: nn.Module
    act: nn.Module

    def __init__(self, replaced: Any):
        super().__init__(replaced.num_features, replaced.eps, replaced.momentum, replaced.affine)
        self.weight, self.bias = replaced.weight, replaced.bias  # the twin's stay without gradient
        for name in ("drop", "act"):
            self.add_module(name, getattr(replaced, name, nn.Identity()))
        self.to(replaced.running_mean).load_state_dict(replaced.state_dict())
        self.train(replaced.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self._over_all_ranks(x) if self.training else self._as_learned(x)))

    def _as_learned(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def _over_all_ranks(self, x: Tensor) -> Tensor:
        over = [0, *range(2, x.ndim)]
        count = x.numel() // x.shape[1] * distributed.world()  # every rank has the same share of the batch
        shape = [1, -1] + [1] * (x.ndim - 2)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        mean = distributed.sum_with_gradient(wide.sum(over)) / count
        centred = wide - mean.view(shape)
        variance = distributed.sum_with_gradient(centred.square().sum(over)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


# What the layers that we can replace compute: normalisation alone, or with drop-out and activation after it.
_KNOWN = {layer.forward for layer in (*BATCH_NORMS, BatchNormAct2d, AllRanksBatchNorm)}


def over_all_ranks(module: M, device: torch.device) -> M:
    """Replace every BatchNorm inside by one over all ranks; with one process nothing changes.

    Raises:
        UserError: a layer of the backbone computes something of its own, which the replacement would leave out.
    """
    if distributed.world() == 1:
        return module
    for name, layer in module.named_modules():
        if isinstance(layer, BATCH_NORMS) and type(layer).forward not in _KNOWN:
            raise UserError(
                f"{name}: expected layers of torch's BatchNorm or timm's BatchNormAct2d, whose statistics can be taken over "
                f"{distributed.world()} processes, got {type(layer).__name__}: train in one process, or choose another backbone"
            )
    # timm's and not torch's, which would replace a BatchNormAct2d by a layer without its activation.
    return convert_sync_batchnorm(module) if device.type == "cuda" else cast(M, _replaced(module))


def _replaced(module: nn.Module) -> nn.Module:
    if isinstance(module, AllRanksBatchNorm):
        return module
    if isinstance(module, BATCH_NORMS):
        return AllRanksBatchNorm(module)
    for name, child in module.named_children():
        setattr(module, name, _replaced(child))
    return module
