"""What dense evaluators take, counted on tensors without contents and timed on real ones, for caco.plan."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from caco.evals.base import Work

VOC_IMAGE = (375, 500)  # height and width of most of VOC's images


def work_of(what: str, images: int, network: nn.Module, *, height: int, width: int, training: bool) -> Work:
    """Images of one size through a network from pixels to anything, and with `training` back.

    Args:
        images: how many.
        network: on the CPU; it is copied.
    """

    def once(device: torch.device, *, count: int = 1) -> None:
        own = copy.deepcopy(network).to(device).train(training)
        with torch.set_grad_enabled(training):
            out = own(torch.zeros(count, 3, height, width, device=device))
        if training:
            out.sum().backward()

    with FlopCounterMode(display=False) as counter:
        once(torch.device("meta"), count=2)  # BatchNorm needs more than one value of a feature, whatever the size
    return Work(what, images, counter.get_total_flops() / 2, once)
