"""BatchNorm over the batch of all ranks, or of parts of it that have statistics of their own.

torch's SyncBatchNorm takes the statistics over all ranks on CUDA and refuses CPU tensors; no library's splits the batch
of a rank and does what the layer does besides.
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
    """A BatchNorm of any [B, C, ...] in the place of another layer; a subclass says how it normalises in training.

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
        return self.act(self.drop(self._in_training(x) if self.training else self._as_learned(x)))

    def _as_learned(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def _in_training(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class AllRanksBatchNorm(_InPlaceOf):
    """Statistics over all ranks, for CPU processes; the gradient flows through the statistics.

    The ranks may have unequal numbers of images, and images of unequal shapes: what each has of both is added up with
    its sums. With momentum None the running statistics are the plain mean of all batches, as torch's are.
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
    """Each group of a rank's images has statistics of its own; rows of several views of an image belong to the group of
    the image.

    Barlow Twins' loss, whose coordinates a BatchNorm normalises, does it with groups too. The running statistics move
    towards the mean of what the groups of all ranks have, and so are the same on every rank.

    Source: the SplitBatchNorm of MoCo's CIFAR notebook, whose groups are every S-th image, and on several GPUs MoCo's
    BatchNorm of each; of whose running statistics the published code keeps those of the first GPU.

    Args:
        groups: of a rank, neighbours in its batch.
        images: of a rank, in one view; the rows are those of one view or of several views, one view after the other.
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
            own = pieces[group :: self.groups]  # one of each view
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            out = nn.functional.batch_norm(
                _joined(own), mean, variance, self.weight, self.bias, True, self.momentum, self.eps
            )
            # What one view alone has stays whole: autograd allows no activation in place on a part of a split.
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


# What the layers that we can replace compute: normalisation alone, or with drop-out and activation after it.
_KNOWN = {layer.forward for layer in (*BATCH_NORMS, BatchNormAct2d, _InPlaceOf)}


def over_all_ranks(module: M, device: torch.device) -> M:
    """Replace every BatchNorm inside by one over all ranks; with one process nothing changes, but that groups are no
    more.

    Raises:
        UserError: a layer of the backbone computes something of its own, which the replacement would leave out.
    """
    for layer in module.modules():
        if isinstance(layer, GroupedBatchNorm):
            layer.groups = 1
    if distributed.world() == 1:
        return module
    _refuse_others(module, f"{distributed.world()} processes", "train in one process")
    # timm's and not torch's, which would replace a BatchNormAct2d by a layer without its activation; nor does it know
    # our layers.
    ours = any(isinstance(layer, _InPlaceOf) for layer in module.modules())
    return (
        convert_sync_batchnorm(module)
        if device.type == "cuda" and not ours
        else cast(M, _replaced(module, AllRanksBatchNorm))
    )


def groups_of_a_rank(norm_groups: int | str, *, world: int, images: int) -> int:
    """How many groups of the batch are a rank's.

    Args:
        norm_groups: of the batch of all ranks, or "rank" for one on each.
        images: that a rank puts through the network at once.
    Raises:
        UserError: the groups cannot be shared out evenly, or one has a single image.
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
    """Replace every BatchNorm inside by one whose statistics are of a group of the batch; 1 is `over_all_ranks`.

    Args:
        norm_groups, images: as in `groups_of_a_rank`.
        shuffle_keys: whether momentum twins embed the images of all ranks in another order, so that a key's statistics
            are of other images than its query's (MoCo, AdCo).
    Raises:
        UserError: as in `groups_of_a_rank` and `over_all_ranks`; there is no BatchNorm, or nothing that shuffling would
            change.
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
                "shuffle_keys: with one group of images it changes nothing; expected more norm_groups, got"
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
