"""BatchNorm over the batch of all ranks. torch's SyncBatchNorm does it on CUDA and refuses CPU tensors."""

import torch
from torch import Tensor, nn

from caco import distributed


class AllRanksBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with statistics over all ranks, for CPU processes; the gradient flows through the statistics."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # any [B, C, ...]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
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


def over_all_ranks(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace every BatchNorm inside by one over all ranks; with one process nothing changes."""
    if distributed.world() == 1:
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            ours = AllRanksBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            ours.weight, ours.bias = child.weight, child.bias  # the twin's stay without gradient
            ours.load_state_dict(child.state_dict())
            setattr(module, name, ours)
        else:
            over_all_ranks(child, device)
    return module
