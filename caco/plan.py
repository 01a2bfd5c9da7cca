"""Estimates what a run will need before it is queued on a cluster: memory, messages, arithmetic and time.

    python -m caco.plan data.root=/anywhere bank=12M batch=4096 world=32
    python -m caco.plan preset=demo measure=true          with this machine's own speed
    python -m caco.plan data.root=/anywhere images=1281167 eval=[segment,dense_linear]
        also what these evaluations will need

Counted from the configuration, on tensors without contents; neither data nor a GPU is needed. Time is arithmetic at an
assumed speed plus messages at an assumed bandwidth, one after the other, as in the trainer; loading, evaluation and
saving are not included. Evaluations that fine-tune for hours have lines of their own."""

import functools
import math
import sys
from typing import Any

from omegaconf import DictConfig
from torch import nn

from caco import errors
from caco.banks import noise, scoring
from caco.config import composition, folders, refusals, validation
from caco.config.channels_needed import channels_of
from caco.config.composition import instantiate
from caco.data.sets.sources import num_images_of
from caco.engine import costs, speed
from caco.engine.assembly import pick_device
from caco.engine.channels import backbone_of
from caco.errors import UserError
from caco.nn.norm import groups_of_a_rank
from caco.saying import amount, per_second
from caco.schedules import RunShape

# Assumptions, not measurements: tflops=, gbytes_per_s= and measure=true replace them.
_DEFAULTS = {"tflops": 60.0, "gbytes_per_s": 10.0}
ROWS = (8192, 65_536, 98_304, 1 << 20, 10_000_000, 100_000_000)  # the rows of the table of bank sizes


def plan(
    cfg: DictConfig,
    *,
    world: int = 1,
    tflops: float = _DEFAULTS["tflops"],
    bank_tflops: float | None = None,
    gbytes_per_s: float = _DEFAULTS["gbytes_per_s"],
    images: int | None = None,
) -> dict[str, float]:
    """The estimates for one run on `world` devices.

    Args:
        cfg: a checked configuration without Hydra's own settings.
        tflops: speed of one device in the model, in 10^12 operations a second. bank_tflops: in the bank; None: the
            same.
        gbytes_per_s: what one device sends to the others, in 10^9 bytes a second.
        images: number in the training split; None if the data set has a fixed size, or can be counted at data.root.
    Returns:
        steps, warm_start_steps (part of steps), images_per_second, step_seconds, run_hours;
        flops_per_step over all devices, and its parts model_flops_per_step and bank_flops_per_step;
        device_bytes, the sum of parameter_bytes (weights, gradients, twin, optimiser), bank_bytes, activation_bytes and
        workspace_bytes; sent_bytes_per_step by one device; checkpoint_bytes.
    Raises:
        UserError: the ranks cannot share the batch or the bank, or the number of images is unknown.
    """
    bank_tflops = tflops if bank_tflops is None else bank_tflops
    if images is not None and images < 1:
        raise UserError(f"images: expected at least 1, got {images}")
    if world < 1 or not all(0 < speed < math.inf for speed in (tflops, bank_tflops, gbytes_per_s)):
        raise UserError(
            "world, tflops, bank_tflops and gbytes_per_s must be finite and positive; got "
            f"{world}, {tflops}, {bank_tflops} and {gbytes_per_s}"
        )
    if cfg.batch % world:
        raise UserError(f"batch: expected a multiple of the {world} processes that share it, got {cfg.batch}")
    groups_of_a_rank(cfg.norm_groups, world=world, images=cfg.batch // world // (cfg.accumulate or 1))
    count = _images(cfg) if images is None else images
    if count < cfg.batch:
        raise UserError(f"batch: expected at most the {count} images, got {cfg.batch}")
    size = 0 if cfg.bank is None else cfg.bank.size or count  # a bank without a size has one row for each image
    if cfg.bank is not None and size < world:
        raise UserError(f"a bank of {size} rows cannot be shared by {world} ranks: expected at least one row each")
    one, method, bank = costs.counted(costs.parts(cfg, count))

    per_epoch = count // cfg.batch
    if bank is not None:
        bank.size = size  # it was counted with few rows, but the length of a phase depends on their number
    warm_start = sum(
        phase.steps or 0 for phase in method.phases(RunShape(cfg.epochs, per_epoch, cfg.batch, cfg.schedule.unit))
    )
    steps = warm_start + cfg.epochs * per_epoch
    steps = steps if cfg.max_steps is None else min(steps, cfg.max_steps)

    images_per_device, dim = cfg.batch // world, cfg.projector.dim
    columns = one["in_batch_columns"] * cfg.batch + one["columns"]
    unit = 2 * cfg.batch * dim  # one product of the queries with one row
    # Products of the queries with all rows.
    kept = cfg.bank is not None and cfg.bank.get("keep_probabilities", False)
    products = max(1, one["sums"]) * (4 - kept if one["learnable"] else 2) + (one["candidates"] > 0)
    bank_flops = unit * (
        size * (products * one["bank_terms"] + one["scans"]) + 2 * one["drawn_terms"] * one["drawn_rows"]
    )
    model_flops = one["flops"] * cfg.batch + 3 * unit * (
        (columns + one["synthetic"]) * one["terms"] + dim * one["matrices"]
    )

    row_bytes = dim * 4 * (2 if one["learnable"] else 1) + 8  # weight and velocity; how often it was used
    bank_bytes = -(-size // world) * row_bytes
    # One block of scores with its copies, or one part of drawn rows; the stream of queries, and the sums of the queries
    # of all ranks.
    block = max(3 * scoring.BLOCK_ELEMENTS if size else 0, noise.PART_ELEMENTS if one["drawn_rows"] else 0)
    workspace = 4 * block + 4 * 4 * cfg.batch * dim * max(1, one["bank_terms"] + one["drawn_terms"])
    workspace += -(-count // world) * one["pass_bytes"]
    # Sources of further negatives: candidates, found and sorted, with their places; and rows, at most all of them.
    queries, found = cfg.batch * one["bank_terms"], min(one["candidates"], -(-size // world))
    workspace += kept * 4 * queries * -(-size // world)
    workspace += 2 * (queries * found * (4 + 8) + 4 * dim * min(size, queries * one["drawn"]))
    # Logits of an image; they, their softmax and its gradient are held at once.
    logits = (columns + one["synthetic"]) * one["terms"] + one["scores"]
    activations = images_per_device * (one["activation_bytes"] + one["view_bytes"]) + 3 * 4 * (
        images_per_device * logits + dim * dim * one["matrices"]
    )
    total = one["parameter_bytes"] + bank_bytes + activations + workspace
    sent = costs.sent_bytes(one, cfg.batch, size, dim, world) if world > 1 else 0.0
    seconds = (model_flops / tflops + bank_flops / bank_tflops) / (world * 1e12) + sent / (gbytes_per_s * 1e9)
    return {
        "steps": float(steps),
        "warm_start_steps": float(min(warm_start, steps)),
        "step_seconds": seconds,
        "images_per_second": cfg.batch / seconds,
        "run_hours": steps * seconds / 3600,
        "flops_per_step": float(model_flops + bank_flops),
        "model_flops_per_step": float(model_flops),
        "bank_flops_per_step": float(bank_flops),
        "device_bytes": float(total),
        "parameter_bytes": float(one["parameter_bytes"]),
        "bank_bytes": float(bank_bytes),
        "activation_bytes": float(activations),
        "workspace_bytes": float(workspace),
        "sent_bytes_per_step": float(sent),
        "checkpoint_bytes": float(one["saved_bytes"] + size * row_bytes),
    }


def _images(cfg: DictConfig) -> int:
    """The number of training images: the data set's fixed size, or counted at data.root."""
    data = cfg.data
    known = num_images_of(composition.target(data))
    if known is not None and data.get("class_list") is None:
        known = round(known * (1 - (data.get("validation_fraction") or 0.0)))
        return min(known, data.get("limit") or known)
    if "root" in data and data.root is None:
        raise UserError(
            "the number of training images is not known here: give images=N, or data.root=PATH, where they can be"
            " counted"
        )
    return len(instantiate(data).pretrain)


def evaluations(cfg: DictConfig, *, world: int, tflops: float, measured: bool) -> list[str]:
    """A line for each part of the work of the run's evaluators that estimate it; if `measured`, also the time of one
    image on this machine.
    """
    device = pick_device(cfg.device)

    @functools.cache
    def backbone() -> nn.Module:
        return backbone_of(cfg.backbone, channels_of(cfg))

    lines = []
    for work in (part for node in cfg.eval.values() for part in instantiate(node).work(backbone)):
        hours = work.images * work.flops / (tflops * 1e12 * world) / 3600
        line = (
            f"{work.what}: {work.images:,} of {work.flops / 1e9:.4g} GFLOP, an estimated {hours:.3g} hours at"
            f" {tflops:.4g} TFLOP/s"
        )
        if measured:
            one_takes = speed.seconds(lambda: work.once(device), device, runs=1)
            line += (
                f"; one takes {one_takes:.3g} s here, all would take {work.images * one_takes / world / 3600:.3g} hours"
            )
        lines.append(line)
    return lines


def report(cfg: DictConfig, *, world: int, images: int | None, speeds: dict[str, float], measured: bool = False) -> str:
    """The plan as text, with a table of bank sizes up to 100 million rows."""
    one = plan(cfg, world=world, images=images, **speeds)
    gib = {key: one[key] / 2**30 for key in one if key.endswith("_bytes")}
    lines = [
        (
            f"{amount(round(one['steps']), 'step')} of {amount(cfg.batch, 'image')} on {amount(world, 'device')}"
            f" ({one['warm_start_steps']:,.0f} of them, {100 * one['warm_start_steps'] / one['steps']:.2g} %, warm"
            f" start), {amount(cfg.batch // world, 'image')} each"
        ),
        (
            f"memory of a device   {gib['device_bytes']:.2f} GiB: weights, twin, optimiser"
            f" {gib['parameter_bytes']:.2f}, activations {gib['activation_bytes']:.2f}, bank {gib['bank_bytes']:.2f},"
            f" workspace {gib['workspace_bytes']:.2f}"
        ),
        f"sent by a device     {one['sent_bytes_per_step'] / 1e6:.1f} MB a step",
        (
            f"arithmetic           {one['flops_per_step'] / 1e12:.3f} TFLOP a step over all devices, "
            f"{100 * one['bank_flops_per_step'] / one['flops_per_step']:.0f} % of it the bank"
        ),
        (
            f"time                 {one['step_seconds']:.4g} s a step, {per_second(one['images_per_second'])} images a"
            f" second, {one['run_hours']:.3g} hours, without loading, evaluation and saving"
        ),
        f"a checkpoint         {gib['checkpoint_bytes']:.2f} GiB",
        "at " + ", ".join(f"{name}={value:.4g}" for name, value in (_DEFAULTS | speeds).items()),
    ]
    lines += evaluations(cfg, world=world, tflops=(_DEFAULTS | speeds)["tflops"], measured=measured)
    count = _images(cfg) if images is None else images
    if costs.counted(costs.parts(cfg, count))[0]["left_out"]:
        lines.insert(
            5,
            "the bank's passes    in PyTorch, block by block: each query's positive is left out of its sums, which no"
            " kernel does",
        )
    if cfg.bank is not None and cfg.bank.get("keep_probabilities", False):
        lines.insert(
            5,
            "probabilities        are kept by the compiled kernel on a CPU without AMX tiles; on any other device they"
            " need no memory, and the bank computes one product more",
        )
    if cfg.bank is not None:
        by_image = cfg.bank.size is None
        head = "images, rows" if by_image else "rows"
        lines.append(
            f"\n{head:>12} {'GiB a device':>13} {'MB sent a step':>15} {'s a step':>10} {'hours':>8} {'GiB saved':>10}"
        )
        for rows in sorted({*ROWS, int(cfg.bank.size or count)}):
            if rows < (max(cfg.batch, world) if by_image else 1):
                continue
            other = cfg.copy()
            other.bank.size = None if by_image else rows
            row = plan(other, world=world, images=rows if by_image else images, **speeds)
            lines.append(
                f"{rows:>12,} {row['device_bytes'] / 2**30:>13.2f} {row['sent_bytes_per_step'] / 1e6:>15.1f} "
                f"{row['step_seconds']:>10.4g} {row['run_hours']:>8.3g} {row['checkpoint_bytes'] / 2**30:>10.2f}"
            )
    return "\n".join(lines)


USAGE = """\
usage: python -m caco.plan [--config-dir DIR] [overrides as for caco.train] [world=N] [images=N]
    [tflops=X] [bank_tflops=X] [gbytes_per_s=X] [measure=true]

  world         number of devices; default 1
  images        number of training images, if the data set does not tell
  tflops        speed of a device in the model; {tflops:g} is assumed; bank_tflops: in the bank; default the same
  gbytes_per_s  what a device sends a second; {gbytes_per_s:g} is assumed
  measure       measure tflops and bank_tflops on this machine, in a few seconds"""
_NUMBERS = {"world": int, "images": int, "tflops": float, "bank_tflops": float, "gbytes_per_s": float}


def _main(arguments: list[str]) -> str:
    own: dict[str, Any] = {"world": 1, "images": None}
    overrides, measured = [], False
    for argument in folders.take(arguments):
        key, _, value = argument.partition("=")
        if key == "measure":
            if value not in ("true", "false"):
                raise UserError(f"measure: expected true or false, got {value!r}")
            measured = value == "true"
        elif key in _NUMBERS:
            try:
                own[key] = _NUMBERS[key](value)
            except ValueError as error:
                raise UserError(f"{key}: expected a number, got {value!r}") from error
        else:
            overrides.append(argument)
    cfg = composition.compose(overrides)
    validation.check(cfg, overrides=overrides, choices=dict(cfg.hydra.runtime.choices))
    cfg = composition.job_config(cfg)
    world, images = own.pop("world"), own.pop("images")
    speeds = (speed.measure(cfg) if measured else {}) | own
    return report(cfg, world=world, images=images, speeds=speeds, measured=measured)


def main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(USAGE.format(**_DEFAULTS))
        return
    with errors.shown():
        try:
            print(_main(arguments))
        except refusals.COMPOSITION_ERRORS as error:
            raise UserError(refusals.explain(error, arguments)) from error


if __name__ == "__main__":
    main()
