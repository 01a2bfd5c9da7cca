"""Measures how fast this machine trains, so that `caco.plan` need not assume it."""

import time
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from caco.config.channels_needed import channels_of
from caco.config.composition import instantiate
from caco.engine.assembly import build_encoder, pick_device


def measure(cfg: DictConfig, *, images: int = 16, rows: int = 16_384, runs: int = 3) -> dict[str, float]:
    """The speed of this machine, each the best of a few runs: "tflops" of the encoder, forward and backward, and, where
    a query meets whole rows of a bank, "bank_tflops" of scoring against the bank and moving it.

    Args:
        images: number of images, of the first view's size, that go through the encoder.
        rows: number of rows of the bank. It is scored against the run's batch of queries, at most 1024.
        runs: number of timed runs.
    """
    device = pick_device(cfg.device)
    encoder = build_encoder(cfg).to(device).to(memory_format=torch.channels_last).train()
    views = instantiate(cfg.augmentation)
    size = (views.sizes or [views.patches.size])[0]
    view = torch.randn(images, channels_of(cfg) or 3, size, size, device=device).contiguous(
        memory_format=torch.channels_last
    )

    def model() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            out = encoder(view)
        out.sum().backward()

    with FlopCounterMode(display=False) as counter:
        model()
    speeds = {"tflops": counter.get_total_flops() / seconds(model, device, runs) / 1e12}
    if cfg.bank is None:
        return speeds
    bank: Any = instantiate(cfg.bank, size=rows).to(device)
    if getattr(bank, "parts", 1) > 1:
        return speeds
    queries = min(cfg.batch, 1024)
    q_BD = nn.functional.normalize(torch.randn(queries, cfg.projector.dim, device=device), dim=1).requires_grad_()

    def score() -> None:
        bank.score(q_BD, bank.rows.most_probable(q_BD.detach()), temperature=0.1).loss_B.mean().backward()
        if bank.rows.learnable:  # other banks only copy keys, which takes little time
            bank.update(lr=0.0, keys_GD=q_BD.detach())

    products = 5 if bank.rows.learnable else 3
    speeds["bank_tflops"] = products * 2 * queries * rows * cfg.projector.dim / seconds(score, device, runs) / 1e12
    return speeds


def seconds(work: Callable[[], None], device: torch.device, runs: int) -> float:
    """The shortest of some runs in seconds, after one run to warm up."""
    best = float("inf")
    for _ in range(1 + runs):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
