"""Share of a training step that is not the pure model: the bank, the objective, the twin's update, the optimiser.

The whole step is what caco/trainer.py does between two batches, without data, logging, evaluation and saving. The pure
model is the same encoder and twin, forward and backward on the same views, with a loss that costs nothing. Both are
timed in turn in one process, so that a drifting machine hits both.

    python benchmarks/step.py --json step.json                             the default, below
    python benchmarks/step.py backbone=resnet18_cifar batch=256 bank=8M    any configuration of caco.train
"""

import argparse
import json
import statistics
import time

import torch

from caco import config
from caco.build import build, build_method, pick_device
from caco.tracking.environment import environment

DEFAULT = ["backbone=small_resnet", "augmentation=cifar", "projector.hidden_dim=256", "batch=256", "bank=8M"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help=f"as for caco.train; without any: {' '.join(DEFAULT)}")
    parser.add_argument("--runs", type=int, default=7, help="timed pairs, after two that warm up")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    overrides = arguments.overrides or DEFAULT
    config.register()
    cfg = config.job_config(config.compose(["data=digits", "eval=[]", "tracking=ledger", *overrides]))
    device = pick_device(cfg.device)
    method = build_method(cfg).to(device=device, memory_format=torch.channels_last).train()
    optimizer = build(cfg.optimizer, parameters=method.encoder_parameters())
    generator = torch.Generator().manual_seed(0)
    views = [
        torch.randn(cfg.batch, 3, size, size, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
        for size in build(cfg.augmentation).sizes
    ]

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")

    def pure_model() -> None:
        with autocast():
            q, _, _, _ = method.encode(views)
        sum(view.sum() for view in q if view is not None).backward()
        method.zero_grad()

    def step() -> None:
        method.update_twin(0.99)
        with autocast():
            loss = method(views).loss
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.update_bank(0.01)

    def seconds(function) -> float:
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    pairs = [(seconds(step), seconds(pure_model)) for _ in range(2 + arguments.runs)][2:]
    shares = [1 - model / whole for whole, model in pairs]
    figures = {
        "overhead": statistics.median(shares),
        "overhead_min": min(shares),
        "overhead_max": max(shares),
        "step_seconds": statistics.median(whole for whole, _ in pairs),
        "model_seconds": statistics.median(model for _, model in pairs),
        "runs": arguments.runs,
        "overrides": overrides,
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }
    print(
        f"{' '.join(overrides)}\n"
        f"step {figures['step_seconds']:.3f} s, pure model {figures['model_seconds']:.3f} s, "
        f"outside the model {100 * figures['overhead']:.0f} % "
        f"({100 * min(shares):.0f} to {100 * max(shares):.0f} % in {arguments.runs} pairs)"
    )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
