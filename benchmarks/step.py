"""Which share of a training step is not the model itself but the bank, the loss, the twin's update and the optimiser.

The whole step is what caco/engine/trainer.py does between two batches, without data loading, logging, evaluation and
saving. The pure model is the forward and backward pass of the same encoder and twin on the same views, with a loss that
costs nothing. For CaCo with two views, the bank alone and the same step with the published bank
(benchmarks/published.py) are timed, too; the bank alone chooses positives, scores both views' queries and moves the
rows, as in the step, for random queries.
All take turns in one process, so that changes in the machine's speed affect all of them.

    python benchmarks/step.py --json step.json                             the default configuration (DEFAULT below)
    python benchmarks/step.py backbone=resnet18_cifar batch=256 bank=8M    any configuration of caco.train
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

if not __package__:  # run as a file: import caco and benchmarks from this checkout, as python -m benchmarks.step does
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import caco  # noqa: F401, I001 - before torch, because it sets torch's instruction set
import torch

from benchmarks.common import Report, formatted, lacks_bf16, named, parser, ratios, say, seconds, spread, turns
from benchmarks.published import Published
from caco.banks.learnable import LearnableBank
from caco.config import composition
from caco.config.composition import instantiate
from caco.data.loaders.batches import Batch
from caco.engine.assembly import build_method, pick_device
from caco.engine.losses import Losses
from caco.methods.base import TRAINING, Now
from caco.methods.contrastive import Contrastive
from caco.saying import per_second

DEFAULT = ["backbone=small_resnet", "augmentation=cifar", "projector.hidden_dim=256", "batch=256", "bank=8M"]
TINY = [*DEFAULT, "backbone.width=8", "projector.hidden_dim=16", "batch=8", "bank.size=64"]
FP32 = "precision=fp32"


def measure(report: Report, overrides: list[str], runs: int) -> dict:
    """Time the whole step, the pure model and, for CaCo, the whole step with the published bank, in turns.

    Returns the figures, and adds rows to the report.

    Raises:
        ValueError: precision=bf16 is among the overrides, and the processor has no unit for it.
    """
    composition.register()
    base = ["data=digits", "eval=[]", "tracking=ledger", *overrides]
    cfg = composition.job_config(composition.compose(base))
    device = pick_device(cfg.device)
    lacking = lacks_bf16() if device.type == "cpu" and cfg.precision == "bf16" else None
    if lacking and "precision=bf16" in overrides:
        raise ValueError(f"precision=bf16: {lacking}; expected {FP32} here")
    if report.leave_out("the step in bf16", lacking):
        overrides = [*overrides, FP32]
        cfg = composition.job_config(composition.compose([*base, FP32]))
    say(f"step: {' '.join(overrides)}")
    method = cast(Contrastive, build_method(cfg))  # a method of another kind fails below, at the first missing member
    method = method.to(device).to(memory_format=torch.channels_last).train()
    optimizer = instantiate(cfg.optimizer, groups=method.parameter_groups())
    generator = torch.Generator().manual_seed(0)
    views = [
        torch.randn(cfg.batch, 3, size, size, generator=generator)
        .to(device)
        .contiguous(memory_format=torch.channels_last)
        for size in instantiate(cfg.augmentation).sizes
    ]
    comparable = method.positives.bank_rows and len(views) == 2
    published = Published(cast(LearnableBank, method.bank).rows.weight.detach()) if comparable else None

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")

    def pure_model() -> None:
        with autocast():
            q, _, _, _ = method.encode(views)
        sum((view.sum() for view in q.values()), torch.zeros((), device=device)).backward()
        method.zero_grad()

    index = torch.arange(cfg.batch, device=device)
    batch = Batch(views, index, torch.full_like(index, -1))
    now = Now(0, TRAINING, 0, False, 0, 0, {"twin_momentum": 0.99, "bank_lr": 0.01})

    losses = Losses(device)  # checks the losses as a run does
    no_images: Any = None  # only methods that make a pass over all images read this

    def step() -> None:
        method.before_step(now, no_images)
        with losses.watching() as held:
            with autocast():
                loss = method(batch, now).loss
            loss.backward()
        losses.add(["loss", "stop"], torch.stack([loss.detach(), torch.zeros_like(loss)]), "this step", held)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(now)

    def published_step(published: Published) -> None:
        assert method.twin is not None, "the published step has a twin"
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

    some = torch.nn.functional.normalize(torch.randn(4, cfg.batch, cfg.projector.dim, generator=generator), dim=-1)
    *queries, one_key, other_key = some.to(device).unbind()

    def bank_alone(bank: LearnableBank) -> None:
        for q, k in zip(queries, (other_key, one_key), strict=True):
            q = q.clone().requires_grad_()
            with autocast():
                loss = bank.score(q, bank.rows.most_probable(k), temperature=cfg.method.temperature).loss_B.mean()
            loss.backward()
        bank.update(lr=0.01)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        report.figures["step_peak_gib"] = peak
        report.row("peak memory of a step", f"{peak:.1f} GiB", "parameters, optimiser and bank included")
    works: dict[str, Callable[[], None]] = {"step": step, "model": pure_model}
    if published:
        bank = cast(LearnableBank, method.bank)
        works |= {"bank": partial(bank_alone, bank), "published": partial(published_step, published)}
    times = turns({name: partial(seconds, work, device=device) for name, work in works.items()}, runs, warm=2)
    overhead = spread([1 - model / whole for model, whole in zip(times["model"], times["step"], strict=True)])
    figures = {
        **named(overhead, "overhead"),
        **{f"{name}_seconds": spread(values)["median"] for name, values in times.items()},
        "runs": runs,
        "overrides": overrides,
        "precision": cfg.precision,
        "device": device.type,
        "threads": torch.get_num_threads(),
    }
    taken, model = figures["step_seconds"], figures["model_seconds"]
    figures["images_per_second"] = cfg.batch / taken
    report.row(
        "images per second", per_second(cfg.batch / taken), f"{cfg.batch} images per step; loading is not included"
    )
    report.row(
        f"share of a step in {cfg.precision} outside the model", formatted(overhead, " %", scale=100, digits=0),
        f"step {taken:.3f} s, pure model {model:.3f} s",
    )  # fmt: skip
    if published:
        parts = zip(times["model"], times["bank"], times["step"], strict=True)
        beside = spread([1 - (model + bank) / whole for model, bank, whole in parts])
        figures |= named(beside, "outside")
        report.row(
            "share of a step outside the model and the bank",
            formatted(beside, " %", scale=100, digits=0),
            f"the bank alone {figures['bank_seconds']:.3f} s",
        )
        against = ratios(times["published"], times["step"])
        figures |= named(against, "vs_published")
        report.row(
            "that step with the published bank",
            f"{formatted(against)} times as long",
            f"{figures['published_seconds']:.3f} s",
        )
    return figures


def main() -> None:
    options = parser(__doc__, runs="This many turns are measured, after two that warm up. The default is 7.")
    options.add_argument(
        "overrides",
        nargs="*",
        help=f"Measure the step of this configuration, given as for caco.train. The default is {' '.join(DEFAULT)}.",
    )
    arguments = options.parse_args()
    overrides = arguments.overrides or (TINY if arguments.tiny else DEFAULT)
    report = Report(["what", "figure", "details"], arguments.json)
    try:
        report.figures |= measure(report, overrides, arguments.runs or (1 if arguments.tiny else 7))
    except ValueError as error:
        options.error(str(error))
    report.end(arguments.json)


if __name__ == "__main__":
    main()
