"""BatchNorm whose statistics are those of the batch of all ranks, or those of groups of its images.

torch's SyncBatchNorm computes statistics over all ranks on CUDA, but refuses CPU tensors. No library has a BatchNorm
that splits a rank's batch into groups and also applies the drop-out and activation that timm's layers have inside.
"""

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from caco import distributed
from caco.errors import UserError
from caco.nn.twin import MomentumTwin

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)  # timm's layers derive from these
M = TypeVar("M", bound=nn.Module)


class _InPlaceOf(nn.BatchNorm1d):
    """A BatchNorm for tensors [B, C, ...] that takes the place of another layer. A subclass defines how it normalises
    in training.

    Args:
        replaced: the layer that is replaced. Its parameters and statistics are taken over, and so are the drop-out and
            the activation that timm's BatchNormAct2d applies after normalising.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float
    drop: nn.Module
    act: nn.Module

    def __init__(self, replaced: Any):
        super().__init__(replaced.num_features, replaced.eps, replaced.momentum, replaced.affine)
        self.weight, self.bias = replaced.weight, replaced.bias  # the same objects: a twin's still require no gradient
        for name in ("drop", "act"):
            self.add_module(name, getattr(replaced, name, nn.Identity()))
        self.to(replaced.running_mean).load_state_dict(replaced.state_dict())
        self.train(replaced.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self._in_training(x) if self.training else self._as_learned(x)))

    def _as_learned(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def _in_training(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class AllRanksBatchNorm(_InPlaceOf):
    """BatchNorm with statistics over all ranks, for CPU processes. The gradient flows through the statistics.

    The ranks may have different numbers of images, and images of different sizes, because the numbers of values are
    summed over the ranks along with the values. With momentum None the running statistics are the plain mean over all
    batches, as in torch.
    """

    def _in_training(self, x: Tensor) -> Tensor:
        over = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        own_count = wide.new_full((1,), x.numel() // x.shape[1])
        sums = distributed.sum_with_gradient(torch.cat([wide.sum(over), own_count]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = wide - mean.view(shape)
        variance = distributed.sum_with_gradient(centred.square().sum(over)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), share)
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


class GroupedBatchNorm(_InPlaceOf):
    """BatchNorm in which each group of a rank's images has statistics of its own. If the rows are several views of the
    images, all views of an image belong to the image's group.

    The BatchNorm inside Barlow Twins' loss is replaced too, so its coordinates are then normalised by group. The
    running statistics move towards the mean over the groups of all ranks, so they are the same on every rank.

    Source: the SplitBatchNorm of MoCo's CIFAR notebook, whose groups consist of every S-th image; and MoCo's own
    BatchNorm on several GPUs, where each GPU is a group. The published code keeps the running statistics of the first
    GPU.

    Args:
        replaced: the layer that is replaced.
        groups: number of groups of a rank; a group's images are neighbours in the rank's batch.
        images: number of a rank's images. The rows are one view of these, or several views one after the other.
    """

    def __init__(self, replaced: Any, *, groups: int, images: int):
        super().__init__(replaced)
        self.groups, self.images = groups, images

    def _in_training(self, x: Tensor) -> Tensor:
        if self.groups > 1 and len(x) % self.images:
            raise UserError(
                f"norm_groups: expected a batch of {self.images} images, or several views of it one after the other;"
                f" got {len(x)} rows"
            )
        pieces = x.split(self.images // self.groups) if self.groups > 1 else (x,)
        normalised, running = list(pieces), []
        for group in range(self.groups):
            own = pieces[group :: self.groups]  # the group's piece of each view
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            out = nn.functional.batch_norm(
                _joined(own), mean, variance, self.weight, self.bias, True, self.momentum, self.eps
            )
            # With one view the output is not split: autograd allows no in-place activation on a part of a split.
            normalised[group :: self.groups] = [out] if len(own) == 1 else out.split([len(piece) for piece in own])
            running.append(torch.stack([mean, variance]))
        with torch.no_grad():
            self.num_batches_tracked += 1
            mean, variance = distributed.sum_(torch.stack(running).mean(0)) / distributed.world()
            self.running_mean.copy_(mean)
            self.running_var.copy_(variance)
        return _joined(normalised)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


# The forward functions of the layers that can be replaced: normalisation alone, or with drop-out and activation after
# it.
_KNOWN = {layer.forward for layer in (*BATCH_NORMS, BatchNormAct2d, _InPlaceOf)}


def over_all_ranks(module: M, device: torch.device) -> M:
    """Replace every BatchNorm inside a module by one with statistics over all ranks, and return the module. With one
    process no layer is replaced; layers with groups get a single group.

    Args:
        device: that the module will train on; it decides between torch's SyncBatchNorm and `AllRanksBatchNorm`.
    Raises:
        UserError: a BatchNorm layer computes something more, which the replacement would leave out.
    """
    for layer in module.modules():
        if isinstance(layer, GroupedBatchNorm):
            layer.groups = 1
    if distributed.world() == 1:
        return module
    _refuse_others(module, f"{distributed.world()} processes", "train in one process")
    # timm's conversion and not torch's, which would replace a BatchNormAct2d by a layer without its activation. Neither
    # of them knows our own layers.
    ours = any(isinstance(layer, _InPlaceOf) for layer in module.modules())
    return (
        convert_sync_batchnorm(module)
        if device.type == "cuda" and not ours
        else cast(M, _replaced(module, AllRanksBatchNorm))
    )


def groups_of_a_rank(norm_groups: int | str, *, world: int, images: int) -> int:
    """The number of groups of the batch that each rank has.

    Args:
        norm_groups: number of groups of the batch of all ranks, or "rank" for one group on each rank.
        world: number of ranks.
        images: number of images that a rank puts through the network at once.
    Raises:
        UserError: the images cannot be divided evenly into these groups, or a group would have a single image.
    """
    count = world if norm_groups == "rank" else int(norm_groups)
    groups = max(1, count // world)
    if count > 1 and (count % world or images % groups or images // groups < 2):
        raise UserError(
            f"norm_groups: expected 1, rank, or a multiple of the {world} process{'es' * (world > 1)} that cuts the"
            f" {images} images which each puts through the network at once into equal groups of at least 2; got"
            f" {norm_groups}"
        )
    return groups


def in_groups(module: M, device: torch.device, norm_groups: int | str, *, images: int, shuffle_keys: bool = False) -> M:
    """Replace every BatchNorm inside a module by one with statistics for each group of the batch, and return the
    module. With norm_groups 1 this is `over_all_ranks`.

    Args:
        norm_groups, images: as in `groups_of_a_rank`.
        shuffle_keys: whether momentum twins embed the images of all ranks in a shuffled order, so that a key's
            statistics come from other images than its query's (MoCo, AdCo).
    Raises:
        UserError: as in `groups_of_a_rank` and `over_all_ranks`; or the module has no BatchNorm, or shuffling would
            change nothing.
    """
    world = distributed.world()
    groups = groups_of_a_rank(norm_groups, world=world, images=images)
    if shuffle_keys:
        twins = [twin for twin in module.modules() if isinstance(twin, MomentumTwin) and _has_batch_norm(twin)]
        if not twins:
            raise UserError(
                "shuffle_keys: expected false, as this method has no momentum twin with BatchNorm; got true"
            )
        if norm_groups == 1 or groups * world == 1:
            raise UserError(
                "shuffle_keys: shuffling changes nothing with one group of images; expected more norm_groups, got"
                f" {norm_groups}"
            )
        for twin in twins:
            twin.shuffles = True
    if norm_groups == 1:
        return over_all_ranks(module, device)
    if not _has_batch_norm(module):
        raise UserError(f"norm_groups: expected 1, as this method's networks have no BatchNorm; got {norm_groups}")
    _refuse_others(module, "groups of the batch", "norm_groups=1")
    return cast(M, _replaced(module, lambda layer: GroupedBatchNorm(layer, groups=groups, images=images)))


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(layer, BATCH_NORMS) for layer in module.modules())


def _refuse_others(module: nn.Module, over: str, instead: str) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, BATCH_NORMS) and type(layer).forward not in _KNOWN:
            raise UserError(
                f"{name}: expected layers of torch's BatchNorm or timm's BatchNormAct2d, whose statistics can be taken"
                f" over {over}, got {type(layer).__name__}: {instead}, or choose another backbone"
            )


def _replaced(module: nn.Module, layer: Any) -> nn.Module:
    if type(module) is layer:
        return module
    if isinstance(module, BATCH_NORMS):
        return layer(module)
    for name, child in module.named_children():
        setattr(module, name, _replaced(child, layer))
    return module
