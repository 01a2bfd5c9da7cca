"""What a run will take, before anyone queues for a cluster: memory, messages, arithmetic and time.

    python -m caco.plan data.root=/anywhere bank=12M batch=4096 world=32
    python -m caco.plan preset=demo measure=true          with this machine's own speed

Counted from the configuration, on tensors without contents; neither data nor a GPU is needed. Time is arithmetic at an
assumed speed plus messages at an assumed bandwidth, one after the other, as the trainer does them; loading, evaluation and
saving are not in it.
"""

import copy
import functools
import json
import sys
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from caco import errors
from caco.banks import noise, scoring
from caco.banks.base import Bank
from caco.config import composition, folders, refusals, validation
from caco.config.composition import instantiate
from caco.data.sets.sources import num_images_of
from caco.engine import speed
from caco.engine.assembly import build_encoder, counts_images, with_encoder
from caco.errors import UserError
from caco.methods.base import Costs, Method
from caco.nn.norm import BATCH_NORMS
from caco.runs.identity import plain
from caco.schedules import RunShape

# Assumptions, nobody's measurement: tflops=, gbytes_per_s= and measure=true replace them.
_DEFAULTS = {"tflops": 60.0, "gbytes_per_s": 10.0}
ROWS = (8192, 65_536, 98_304, 1 << 20, 10_000_000, 100_000_000)  # of the table of bank sizes


def plan(
    cfg: DictConfig,
    *,
    world: int = 1,
    tflops: float = _DEFAULTS["tflops"],
    bank_tflops: float | None = None,
    gbytes_per_s: float = _DEFAULTS["gbytes_per_s"],
    images: int | None = None,
) -> dict[str, float]:
    """Figures of one run on `world` devices.

    Args:
        cfg: a checked configuration without Hydra's own part.
        tflops: 10^12 operations a second, of one device in the model; bank_tflops in the bank, None for the same.
        gbytes_per_s: what one device sends to the others.
        images: in the training split; None where the data set has one size or lies at data.root.
    Returns:
        steps, warm_start_steps (part of steps), images_per_second, step_seconds, run_hours;
        flops_per_step over all devices, model_flops_per_step and bank_flops_per_step of it;
        device_bytes, the sum of parameter_bytes (weights, gradients, twin, optimiser), bank_bytes, activation_bytes and
        workspace_bytes; sent_bytes_per_step by one device; checkpoint_bytes.
    Raises:
        ValueError: ranks that cannot share the batch or the bank, or an unknown number of images.
    """
    bank_tflops = tflops if bank_tflops is None else bank_tflops
    if world < 1 or min(tflops, bank_tflops, gbytes_per_s) <= 0:
        raise UserError(
            "world, tflops, bank_tflops and gbytes_per_s must be positive; got "
            f"{world}, {tflops}, {bank_tflops} and {gbytes_per_s}"
        )
    if cfg.batch % world:
        raise UserError(f"batch: expected a multiple of the {world} processes that share it, got {cfg.batch}")
    count = _images(cfg) if images is None else images
    if count < cfg.batch:
        raise UserError(f"batch: expected at most the {count} images, got {cfg.batch}")
    size = 0 if cfg.bank is None else cfg.bank.size or count  # of a bank with a row for each image, these
    if cfg.bank is not None and size < world:
        raise UserError(f"a bank of {size} rows cannot be shared by {world} ranks: expected a row for each at least")
    one, method, bank = _counted(_parts(cfg, count))

    per_epoch = count // cfg.batch
    if bank is not None:
        bank.size = size  # counted with few rows; how long a phase is depends on how many there are
    warm_start = sum(phase.steps or 0 for phase in method.phases(RunShape(cfg.epochs, per_epoch, cfg.batch, cfg.schedule.unit)))
    steps = warm_start + cfg.epochs * per_epoch
    steps = steps if cfg.max_steps is None else min(steps, cfg.max_steps)

    images_per_device, dim = cfg.batch // world, cfg.projector.dim
    columns = one["in_batch_columns"] * cfg.batch
    unit = 2 * cfg.batch * dim  # one product of the queries with one row
    bank_flops = unit * size * (4 * one["bank_terms"] if one["learnable"] else 2 * one["bank_terms"])
    bank_flops += unit * (size * one["scans"] + 2 * one["drawn_terms"] * one["drawn_rows"])
    model_flops = one["flops"] * cfg.batch + 3 * unit * (columns * one["terms"] + dim * one["matrices"])

    row_bytes = dim * 4 * (2 if one["learnable"] else 1) + 8  # weight, velocity; uses
    bank_bytes = -(-size // world) * row_bytes
    # One block of scores and its copies, or one part of drawn rows; the stream of queries and the sums of all ranks' queries.
    block = max(3 * scoring.BLOCK_ELEMENTS if size else 0, noise.PART_ELEMENTS if one["drawn_rows"] else 0)
    workspace = 4 * block + 4 * 4 * cfg.batch * dim * max(1, one["bank_terms"] + one["drawn_terms"])
    workspace += -(-count // world) * one["pass_bytes"]
    logits = columns * one["terms"] + one["scores"]  # of an image; they, their softmax and its gradient are held
    activations = images_per_device * (one["activation_bytes"] + one["view_bytes"]) + 3 * 4 * (images_per_device * logits + dim * dim * one["matrices"])
    total = one["parameter_bytes"] + bank_bytes + activations + workspace
    sent = _sent(one, cfg.batch, dim, world) if world > 1 else 0.0
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


def _parts(cfg: DictConfig, num_images: int) -> str:
    """What the counts depend on, so that runs that share it are counted once."""
    tree = plain(cfg)
    parts = {key: tree[key] for key in ("method", "bank", "backbone", "projector", "optimizer", "augmentation", "precision")}
    by_image = parts["bank"] is not None and parts["bank"]["size"] is None
    parts["num_images"] = None if not counts_images(cfg) else 2 if by_image else num_images
    if parts["bank"] is not None:
        parts["bank"] |= {"size": 2, "seed": 0}
    return json.dumps(parts)


@functools.lru_cache(maxsize=64)
def _counted(text: str) -> tuple[dict[str, float], Method, Bank | None]:
    """Of one image where it depends on the batch: built on torch's meta device and run once, forward and backward. And what was built."""
    cfg = OmegaConf.create(json.loads(text))
    with torch.device("meta"):
        encoder = build_encoder(cfg)
    method = with_encoder(cfg, encoder, cfg.num_images).train()
    bank: Bank | None = getattr(method, "bank", None)
    others = [child for name, child in method.named_children() if name not in ("encoder", "twin", "bank")]
    others = [child for child in others if any(p.requires_grad for p in child.parameters())]  # no twin of a head
    for child in others:
        child.to("meta")
    groups = method.parameter_groups()
    learning = [p for group in groups for p in group.parameters]
    sizes = instantiate(cfg.augmentation).sizes
    optimizer = instantiate(cfg.optimizer, groups=groups)
    weight_bytes = sum(p.nbytes for p in learning)
    twin_bytes = sum(p.nbytes for name, p in method.named_parameters() if not p.requires_grad and not name.startswith("bank."))
    buffers = sum(b.nbytes for name, b in method.named_buffers() if not name.startswith("bank."))
    costs = method.costs(sizes)
    flops = activation_bytes = 0.0
    for size in dict.fromkeys(sizes):
        forward, both, saved = _run_once(encoder, others, size, cfg.precision)
        with_gradient = sum(sizes[view] == size for view in costs.encoded)
        flops += with_gradient * both + sum(sizes[view] == size for view in costs.followed) * forward
        activation_bytes += with_gradient * saved
    optimizer.step()  # on the gradients of the last run, so that its state is there to be counted
    state = sum(v.nbytes for values in optimizer.state.values() for v in values.values() if torch.is_tensor(v))
    # Autocast keeps a bf16 copy of the weights until the backward pass is over.
    copies = weight_bytes // 2 if cfg.precision == "bf16" else 0
    figures = {
        "flops": flops,
        "activation_bytes": activation_bytes,
        "view_bytes": 4.0 * sum(3 * size * size for size in sizes),
        "parameter_bytes": 2 * weight_bytes + twin_bytes + state + buffers + copies,
        "saved_bytes": weight_bytes + twin_bytes + state + buffers,
        "gradient_bytes": weight_bytes,
        "terms": costs.terms,
        "bank_terms": costs.bank_terms,
        "scans": costs.searches,
        "lookups": costs.lookups,
        "in_batch_columns": costs.columns_per_image,
        "drawn_terms": costs.drawn_terms,
        "drawn_rows": costs.drawn_rows,
        "key_gathers": costs.gathers,
        "key_gradients": costs.gathers_with_gradient,
        "learnable": bank is not None and bank.rows.learnable,
        "norm_sums": _norm_sums(costs, sizes, encoder, others),
        "scores": costs.prototypes * len(costs.encoded),
        "matrices": costs.matrices,
        "summed_bytes": costs.summed_bytes,
        "pass_bytes": costs.pass_bytes,
    }
    return figures, method, bank


def _run_once(encoder: nn.Module, others: list[nn.Module], size: int, precision: str) -> tuple[float, float, float]:
    """Of one image of `size` pixels: operations of the encoder forward, of it and what follows it forward and backward, bytes kept for
    backward."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    run = copy.deepcopy(encoder).to(dtype)

    def forward(images: int) -> tuple[torch.Tensor, int]:
        """The output, and the bytes of all that is kept for backward: of weights and what is made of them, and of the images."""
        held: list[torch.Tensor] = []  # meta tensors, so holding them costs nothing and keeps their storages apart

        def hold(x: torch.Tensor) -> torch.Tensor:
            held.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            out = run(torch.empty(images, 3, size, size, device="meta", dtype=dtype))
            encoder_flops.append(counter.get_total_flops())
            for other in others:
                out = other(out)
        return out, sum({StorageWeakRef(x.untyped_storage()): x.untyped_storage().nbytes() for x in held}.values())

    encoder_flops: list[int] = []
    with FlopCounterMode(display=False) as counter:
        out, of_two = forward(2)  # BatchNorm needs more than one
        out.sum().backward()
        both = counter.get_total_flops()
    for parameter, copied in zip(encoder.parameters(), run.parameters(), strict=True):
        parameter.grad = torch.empty_like(parameter) if copied.grad is not None else None
    return encoder_flops[0] / 2, both / 2, forward(3)[1] - of_two


def _norm_sums(costs: Costs, sizes: list[int], encoder: nn.Module, others: list[nn.Module]) -> int:
    """How many numbers the BatchNorm layers sum over the ranks: means and variances, and their gradients."""

    def features(*parts: nn.Module) -> int:
        return sum(m.num_features for part in parts for m in part.modules() if isinstance(m, BATCH_NORMS))

    backbone, total = features(encoder.get_submodule("backbone")), 0
    for views, numbers, heads in ((costs.encoded, 4, others), (costs.followed, 2, [])):  # a twin has no predictor
        passes = (len({sizes[view] for view in views}), min(1, len(views))) if costs.together else (len(views), len(views))
        total += numbers * (backbone * passes[0] + (features(encoder, *heads) - backbone) * passes[1])
    return total


def _sent(one: dict[str, float], batch: int, dim: int, world: int) -> float:
    """Bytes that one rank sends in a step: all-gathers pass a part on to each other rank, all-reduces go round twice.

    Of the bank nothing but queries, keys and their sums travels, whatever its size.
    """
    part, ring = (world - 1) * batch / world, 2 * (world - 1) / world
    term = part * (4 * dim + 8 + 4) + ring * batch * 4 * (1 + dim + 2)  # query, positive, gradient; maximum and sums
    scan = part * (4 * dim + 8) + ring * batch * (8 + 8)  # key, choice; its score and its index
    lookup = part * 8 + ring * batch * 4 * dim
    drawn = part * (4 * dim + 8) + ring * batch * (4 * dim + 8 + 8)  # query, image; gradient, sum, own score
    keys = one["key_gathers"] * part * 4 * dim + one["key_gradients"] * ring * batch * 4 * dim
    return (
        ring * (one["gradient_bytes"] + 4 * one["norm_sums"] + one["summed_bytes"])
        + one["bank_terms"] * term
        + one["drawn_terms"] * drawn
        + one["scans"] * scan
        + one["lookups"] * lookup
        + keys
    )


def _images(cfg: DictConfig) -> int:
    """Images of the training split: known, or counted where the data lie."""
    data = cfg.data
    known = num_images_of(composition.target(data))
    if known is not None and data.get("class_list") is None:
        held_out = data.get("validation_fraction") or 0.0
        known = round(known * (1 - held_out))
        return min(known, data.get("limit") or known)
    if "root" in data and data.root is None:
        raise UserError("the number of training images is not known here: say images=N, or where they lie, data.root=PATH")
    return len(instantiate(data).pretrain)


def report(cfg: DictConfig, *, world: int, images: int | None, speeds: dict[str, float]) -> str:
    """The plan in words, and a table of bank sizes up to 100 million rows."""
    one = plan(cfg, world=world, images=images, **speeds)
    gib = {key: one[key] / 2**30 for key in one if key.endswith("_bytes")}
    lines = [
        f"{one['steps']:,.0f} steps of {cfg.batch} images on {world} device{'s' * (world > 1)}"
        f" ({one['warm_start_steps']:,.0f} of them, {100 * one['warm_start_steps'] / one['steps']:.2g} %, warm start), "
        f"{cfg.batch // world} images each",
        f"memory of a device   {gib['device_bytes']:.2f} GiB: weights, twin, optimiser {gib['parameter_bytes']:.2f}, "
        f"activations {gib['activation_bytes']:.2f}, bank {gib['bank_bytes']:.2f}, workspace {gib['workspace_bytes']:.2f}",
        f"sent by a device     {one['sent_bytes_per_step'] / 1e6:.1f} MB a step",
        f"arithmetic           {one['flops_per_step'] / 1e12:.3f} TFLOP a step over all devices, "
        f"{100 * one['bank_flops_per_step'] / one['flops_per_step']:.0f} % of it the bank",
        f"time                 {one['step_seconds']:.4g} s a step, {one['images_per_second']:,.0f} images a second, "
        f"{one['run_hours']:.3g} hours, without loading, evaluation and saving",
        f"a checkpoint         {gib['checkpoint_bytes']:.2f} GiB",
        "at " + ", ".join(f"{name}={value:.4g}" for name, value in (_DEFAULTS | speeds).items()),
    ]
    if cfg.bank is not None:
        by_image = cfg.bank.size is None
        head = "images, rows" if by_image else "rows"
        lines.append(f"\n{head:>12} {'GiB a device':>13} {'MB sent a step':>15} {'s a step':>10} {'hours':>8} {'GiB saved':>10}")
        count = _images(cfg) if by_image and images is None else images
        for rows in sorted({*ROWS, int(cfg.bank.size or count or 0)}):
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
usage: python -m caco.plan [--config-dir DIR] [overrides as for caco.train] [world=N] [images=N] [tflops=X] [bank_tflops=X] [gbytes_per_s=X] [measure=true]

  world         devices, 1
  images        in the training split, where the data set does not say
  tflops        of a device in the model, {tflops:g} assumed; bank_tflops in the bank, the same
  gbytes_per_s  that a device sends, {gbytes_per_s:g} assumed
  measure       tflops and bank_tflops of this machine, a few seconds"""
_NUMBERS = {"world": int, "images": int, "tflops": float, "bank_tflops": float, "gbytes_per_s": float}


def _main(arguments: list[str]) -> str:
    own: dict[str, Any] = {"world": 1, "images": None}
    overrides = []
    measured = False
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
    return report(cfg, world=world, images=images, speeds=speeds)


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
