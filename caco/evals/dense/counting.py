"""The cost of dense evaluators for caco.plan: arithmetic counted on tensors without data, time measured on real
ones."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from caco.evals.base import Work

VOC_IMAGE = (375, 500)  # height and width of most images of VOC


def work_of(what: str, images: int, network: nn.Module, *, height: int, width: int, training: bool) -> Work:
    """The cost of images of one size in a network's forward pass, with `training` also in its backward pass.

    Args:
        what: description, see `Work`.
        images: number of images.
        network: on the CPU; it is copied.
        height, width: of the images, in pixels.
    """

    def once(device: torch.device, *, count: int = 1) -> None:
        own = copy.deepcopy(network).to(device).train(training)
        with torch.set_grad_enabled(training):
            out = own(torch.zeros(count, 3, height, width, device=device))
        if training:
            out.sum().backward()

    with FlopCounterMode(display=False) as counter:
        once(torch.device("meta"), count=2)  # two images, because BatchNorm needs more than one value of each feature
    return Work(what, images, counter.get_total_flops() / 2, once)
