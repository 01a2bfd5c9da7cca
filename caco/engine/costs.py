"""What one image of a run costs on one device: arithmetic, memory, messages. Counted for caco.plan, on tensors without
contents.
"""

import copy
import dataclasses
import functools
import json
import math

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from caco.banks.base import Bank
from caco.config import views_needed
from caco.config.channels_needed import channels_of
from caco.config.composition import instantiate
from caco.engine.assembly import build_encoder, counts_images, method_on
from caco.methods.base import Costs, Method
from caco.nn.norm import BATCH_NORMS
from caco.runs.identity import plain


def parts(cfg: DictConfig, num_images: int) -> str:
    """A text of everything that the counts depend on, so that runs with the same text are counted once."""
    tree = plain(cfg)
    names = (
        "method",
        "bank",
        "negatives",
        "backbone",
        "projector",
        "optimizer",
        "augmentation",
        "precision",
        "norm_groups",
        "shuffle_keys",
    )
    chosen = {name: tree.get(name) for name in names}
    by_image = chosen["bank"] is not None and chosen["bank"]["size"] is None
    chosen["num_images"] = None if not counts_images(cfg) else 2 if by_image else num_images
    chosen["data"] = {"channels": channels_of(tree)}
    if chosen["bank"] is not None:
        chosen["bank"] |= {"size": 2, "seed": 0}
    return json.dumps(chosen)


@functools.lru_cache(maxsize=64)
def counted(text: str) -> tuple[dict[str, float], Method, Bank | None]:
    """The costs of a step, per image where they depend on the batch, and the method and bank that were built. These are
    built on torch's meta device and run once, forward and backward.
    """
    cfg = OmegaConf.create(json.loads(text))
    with torch.device("meta"):
        encoder = build_encoder(cfg)
    method, bank = method_on(encoder, cfg, cfg.num_images)
    method.train()
    views = instantiate(cfg.augmentation)
    views_needed.refuse(dataclasses.asdict(method.needs), views.patches, views.colours)
    sizes, channels = views.sizes, channels_of(cfg) or 3
    # Heads that learn; the twin of a head does not.
    others = [child for name, child in method.named_children() if name not in ("encoder", "twin", "bank")]
    others = [child.to("meta") for child in others if any(p.requires_grad for p in child.parameters())]
    costs = method.costs(sizes)
    of_patches = set() if costs.patch_network is None else set(costs.patch_network.modules())
    others = [child for child in others if child not in of_patches]
    groups = method.parameter_groups()
    learning = [p for group in groups for p in group.parameters]
    optimizer = instantiate(cfg.optimizer, groups=groups)
    weight_bytes = sum(p.nbytes for p in learning)
    twin_bytes = sum(
        p.nbytes for name, p in method.named_parameters() if not p.requires_grad and not name.startswith("bank.")
    )
    buffers = sum(b.nbytes for name, b in method.named_buffers() if not name.startswith("bank."))
    flops = activation_bytes = 0.0
    of_images = float(channels) * sum(size * size for size in sizes)  # number of values in all views of an image
    for size in dict.fromkeys(sizes):
        forward, both, saved = run_once(encoder, others, (channels, size, size), cfg.precision)
        with_gradient = sum(sizes[view] == size for view in costs.encoded)
        flops += with_gradient * both + sum(sizes[view] == size for view in costs.followed) * forward
        activation_bytes += with_gradient * saved
    if costs.patch_network is not None:
        shape = (views.patches.grid**2, channels, views.patches.size, views.patches.size)
        _, both, saved = run_once(costs.patch_network, [], shape, cfg.precision)
        flops, activation_bytes, of_images = flops + both, activation_bytes + saved, of_images + math.prod(shape)
    optimizer.step()  # with the gradients of the last run, so that the optimiser's state exists and can be counted
    state = sum(v.nbytes for values in optimizer.state.values() for v in values.values() if torch.is_tensor(v))
    # Autocast keeps a bf16 copy of the weights until the backward pass is over.
    copies = weight_bytes // 2 if cfg.precision == "bf16" else 0
    figures = {
        "flops": flops,
        "activation_bytes": activation_bytes,
        "view_bytes": 4.0 * of_images,
        "parameter_bytes": 2 * weight_bytes + twin_bytes + state + buffers + copies,
        "saved_bytes": weight_bytes + twin_bytes + state + buffers,
        "gradient_bytes": weight_bytes,
        "terms": costs.terms,
        "bank_terms": costs.bank_terms,
        **{name: getattr(costs, name) for name in ("sums", "left_out", "candidates", "drawn", "synthetic")},
        "scans": costs.searches,
        "lookups": costs.lookups,
        "in_batch_columns": costs.columns_per_image,
        "columns": costs.columns,
        "drawn_terms": costs.drawn_terms,
        "drawn_rows": costs.drawn_rows,
        "key_gathers": costs.gathers,
        "key_gradients": costs.gathers_with_gradient,
        "learnable": bank is not None and bank.rows.learnable,
        "norm_sums": _norm_sums(costs, sizes, encoder, others, in_groups=cfg.norm_groups != 1),
        "shuffled_bytes": (
            sum(4 * (channels * sizes[view] ** 2 + cfg.projector.dim) for view in costs.followed)
            if cfg.shuffle_keys
            else 0
        ),
        "scores": costs.prototypes * len(costs.encoded),
        "matrices": costs.matrices,
        "summed_bytes": costs.summed_bytes,
        "pass_bytes": costs.pass_bytes,
    }
    return figures, method, bank


def run_once(
    encoder: nn.Module, others: list[nn.Module], shape: tuple[int, ...], precision: str
) -> tuple[float, float, float]:
    """Counts for one image (or its patches) of this shape: operations of the encoder's forward pass; operations of
    forward and backward of the encoder and the heads after it; bytes kept for the backward pass."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    run = copy.deepcopy(encoder).to(dtype)

    def forward(images: int) -> tuple[torch.Tensor, int]:
        """The output, and the bytes of everything kept for the backward pass: for the weights and what is made from
        them, the same for any number of images, and for the images.
        """
        held: list[torch.Tensor] = []  # holding meta tensors costs no memory and keeps their storages distinct

        def hold(x: torch.Tensor) -> torch.Tensor:
            held.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            out = run(torch.empty(images, *shape, device="meta", dtype=dtype))
            encoder_flops.append(counter.get_total_flops())
            for other in others:
                out = other(out)
        return out, sum({StorageWeakRef(x.untyped_storage()): x.untyped_storage().nbytes() for x in held}.values())

    encoder_flops: list[int] = []
    with FlopCounterMode(display=False) as counter:
        out, of_two = forward(2)  # two images, because BatchNorm needs more than one
        out.sum().backward()
        both = counter.get_total_flops()
    for parameter, copied in zip(encoder.parameters(), run.parameters(), strict=True):
        parameter.grad = torch.empty_like(parameter) if copied.grad is not None else None
    return encoder_flops[0] / 2, both / 2, forward(3)[1] - of_two


def _norm_sums(costs: Costs, sizes: list[int], encoder: nn.Module, others: list[nn.Module], *, in_groups: bool) -> int:
    """How many numbers the BatchNorm layers sum over the ranks in a step: means and variances and, unless they work in
    groups, the gradients of these.
    """

    def features(*parts: nn.Module) -> int:
        return sum(m.num_features for part in parts for m in part.modules() if isinstance(m, BATCH_NORMS))

    backbone, total = features(encoder.get_submodule("backbone")), 0
    if costs.patch_network is not None:
        total += (2 if in_groups else 4) * features(costs.patch_network)
    # A twin has no predictor, so the `followed` views pass through no heads.
    for views, numbers, heads in ((costs.encoded, 2 if in_groups else 4, others), (costs.followed, 2, [])):
        passes = (
            (len({sizes[view] for view in views}), min(1, len(views))) if costs.together else (len(views), len(views))
        )
        total += numbers * (backbone * passes[0] + (features(encoder, *heads) - backbone) * passes[1])
    return total


def sent_bytes(one: dict[str, float], batch: int, size: int, dim: int, world: int) -> float:
    """Bytes that one rank sends in a step. An all-gather passes each part on to every other rank; an all-reduce goes
    round the ring twice.

    Of the bank only queries, keys and their sums travel, whatever its size. If further negatives are made from its
    rows, each row needed travels once; the estimate assumes as many different rows as there can be.
    """
    part, ring = (world - 1) * batch / world, 2 * (world - 1) / world
    term = part * (4 * dim + 8 + 4) + ring * batch * 4 * (1 + dim + 2)  # query, positive, gradient; maximum and sums
    # Sums and derivatives, as doubles.
    term += 8 * (part * (1 + 2 * one["sums"]) + ring * batch * one["sums"]) if one["sums"] else 0
    scan = part * (4 * dim + 8) + ring * batch * (8 + 8)  # key and choice; the choice's score and index
    lookup = part * 8 + ring * batch * 4 * dim
    drawn = part * (4 * dim + 8) + ring * batch * (4 * dim + 8 + 8)  # query and image; gradient, sum and own score
    # Query and positive; the candidates and their places, which each rank gets for its own queries; the places of the
    # rows that are needed; these rows.
    mixing = part * (
        4 * dim + 8 * (one["scans"] > 0) + 12 * min(one["candidates"], -(-size // world)) + 8 * one["drawn"]
    )
    mixing = one["bank_terms"] * mixing + ring * 4 * dim * min(size, one["bank_terms"] * batch * one["drawn"])
    keys = (
        part * one["shuffled_bytes"]
        + one["key_gathers"] * part * 4 * dim
        + one["key_gradients"] * ring * batch * 4 * dim
    )
    return (
        ring * (one["gradient_bytes"] + 4 * one["norm_sums"] + one["summed_bytes"])
        + one["bank_terms"] * term
        + one["drawn_terms"] * drawn
        + one["scans"] * scan
        + one["lookups"] * lookup
        + keys + (mixing if one["candidates"] else 0)
    )  # fmt: skip
