"""Share of a training step that is not the pure model: the bank, the objective, the twin's update, the optimiser.

The whole step is what caco/trainer.py does between two batches, without data, logging, evaluation and saving. The pure
model is the same encoder and twin, forward and backward on the same views, with a loss that costs nothing. For CaCo with
two views the same step with the published bank (benchmarks/bank.py) is timed too. They take turns in one process, so that a
drifting machine hits all.

    python benchmarks/step.py --json step.json                             the default, below
    python benchmarks/step.py backbone=resnet18_cifar batch=256 bank=8M    any configuration of caco.train
"""

import argparse
import json
import statistics

from caco import instructions  # before torch: CACO_INSTRUCTIONS holds for it too

import torch
from bank import Published, seconds

from caco import config
from caco.build import build, build_method, pick_device
from caco.data.loader import Batch
from caco.methods.base import TRAINING, Now
from caco.methods.sources import BankRow
from caco.tracking.environment import environment

DEFAULT = ["backbone=small_resnet", "augmentation=cifar", "projector.hidden_dim=256", "batch=256", "bank=8M"]


def measure(overrides: list[str], runs: int) -> dict:
    """Timed turns of the whole step, the pure model and, for CaCo, the whole step with the published bank."""
    config.register()
    cfg = config.job_config(config.compose(["data=digits", "eval=[]", "tracking=ledger", *overrides]))
    device = pick_device(cfg.device)
    method = build_method(cfg).to(device=device, memory_format=torch.channels_last).train()
    optimizer = build(cfg.optimizer, groups=method.parameter_groups())
    generator = torch.Generator().manual_seed(0)
    views = [
        torch.randn(cfg.batch, 3, size, size, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
        for size in build(cfg.augmentation).sizes
    ]
    comparable = type(method.positives) is BankRow and len(views) == 2
    published = Published(method.bank.rows.weight.detach()) if comparable else None

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")

    def pure_model() -> None:
        with autocast():
            q, _, _, _ = method.encode(views)
        sum(view.sum() for view in q if view is not None).backward()
        method.zero_grad()

    index = torch.arange(cfg.batch, device=device)
    batch, now = Batch(views, index, torch.full_like(index, -1)), Now(0, TRAINING, 0, False, 0, 0, {"twin_momentum": 0.99, "bank_lr": 0.01})

    def step() -> None:
        method.before_step(now, None)
        with autocast():
            loss = method(batch, now).loss
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(now)

    def published_step() -> None:
        method.twin.update(method.encoder, 0.99)
        with autocast():
            q, k, _, _ = method.encode(views)
        (one, gradient), (other, also) = published.loss(q[0], k[1]), published.loss(q[1], k[0])
        loss = one + other
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        published.update(gradient + also)

    def timed(function) -> float:
        return seconds(lambda: (function(), torch.cuda.synchronize() if device.type == "cuda" else None))

    works = [step, pure_model, *([published_step] if published else [])]
    turns = [[timed(work) for work in works] for _ in range(2 + runs)][2:]
    shares = [1 - turn[1] / turn[0] for turn in turns]
    figures = {
        "overhead": statistics.median(shares),
        "overhead_min": min(shares),
        "overhead_max": max(shares),
        "step_seconds": statistics.median(turn[0] for turn in turns),
        "model_seconds": statistics.median(turn[1] for turn in turns),
        "runs": runs,
        "overrides": overrides,
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }
    if published:
        figures["published_seconds"] = statistics.median(turn[2] for turn in turns)
        ratios = [turn[2] / turn[0] for turn in turns]
        figures |= {"vs_published": statistics.median(ratios), "vs_published_min": min(ratios), "vs_published_max": max(ratios)}
    return figures


def told(figures: dict) -> str:
    lines = [
        " ".join(figures["overrides"]),
        f"step {figures['step_seconds']:.3f} s, pure model {figures['model_seconds']:.3f} s, "
        f"outside the model {100 * figures['overhead']:.0f} % "
        f"({100 * figures['overhead_min']:.0f} to {100 * figures['overhead_max']:.0f} % in {figures['runs']} turns)",
    ]
    if "vs_published" in figures:
        lines.append(
            f"with the published bank {figures['published_seconds']:.3f} s, {figures['vs_published']:.2f} times as long "
            f"({figures['vs_published_min']:.2f} to {figures['vs_published_max']:.2f})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help=f"as for caco.train; without any: {' '.join(DEFAULT)}")
    parser.add_argument("--runs", type=int, default=7, help="timed turns, after two that warm up")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    print(instructions.told(), flush=True)
    overrides = arguments.overrides or DEFAULT
    figures = measure(overrides, arguments.runs)
    print(told(figures))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
