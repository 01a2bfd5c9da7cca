"""Functions that tests with several ranks run in every rank; rank 0 writes the result."""

import json
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist
from processes import PATIENCE_S, caco_train
from tiny import batch_of, compose, noise, now

from caco import distributed
from caco.config.composition import CONF, instantiate
from caco.data.loaders.batches import Batch
from caco.engine import recording, trainer, training
from caco.engine.assembly import build_method
from caco.nn.heads import Encoder
from caco.nn.norm import in_groups
from caco.runs.checkpoint import Checkpoints
from caco.schedules import RunShape

GLOBAL_BATCH, STEPS = 16, 3
# Methods without a bank or with a row for each image, for which tests do not set the size of the bank.
WITHOUT_BANK = {"pn=none"} | {
    f"method={path.stem}"
    for path in (CONF / "method").glob("*.yaml")
    if re.search(r"\nbank: null|\n  size: null", path.read_text())
}


def start() -> None:
    distributed.start(torch.device("cpu"), timeout_s=PATIENCE_S)


def own_batch(cfg, step, dtype=torch.float64):
    """This rank's part of the global batch of a step: all views, with small crops and patches if the configuration has
    them."""
    part = GLOBAL_BATCH // distributed.world()
    views, patches = noise(cfg, GLOBAL_BATCH, torch.Generator().manual_seed(100 + step), torch.float64)
    own = [distributed.own(view, part).to(dtype) for view in views]
    own_patches = None if patches is None else distributed.own(patches, part).to(dtype)
    return batch_of(own, first=distributed.rank() * part, patches=own_patches)


def placed(method, cfg):
    """The method on this rank, wrapped as in a run."""
    images = GLOBAL_BATCH // distributed.world()
    return in_groups(method, torch.device("cpu"), cfg.norm_groups, images=images, shuffle_keys=cfg.shuffle_keys)


class FewImages:
    """A few images for passes over all images, with the interface of caco.data.loaders.images.Images: each rank gets
    its part of every batch.
    """

    def __init__(self, number, sizes):
        self.number, self.size = number, max(sizes, default=1)

    def __call__(self, kind, *, stream=0):
        generator = torch.Generator().manual_seed(500 + stream)
        images = torch.randn(self.number, 3, self.size, self.size, generator=generator, dtype=torch.float64)
        order = torch.arange(self.number) if kind == "plain" else torch.randperm(self.number, generator=generator)
        if kind == "plain":
            parts = torch.tensor_split(order, distributed.world())[distributed.rank()].split(8)
        else:
            parts = [distributed.own(part, GLOBAL_BATCH // distributed.world()) for part in order.split(GLOBAL_BATCH)]
        for part in parts:
            yield Batch([images[part]], part, torch.full_like(part, -1))


def steps(case):
    """Train a few steps in float64; returns losses, encoder, gradients of the last step, and the whole bank."""
    overrides = case.split()
    cfg = compose(*overrides, bank=not WITHOUT_BANK & set(overrides))
    method = placed(build_method(cfg), cfg).double().train()
    groups = method.parameter_groups()
    learning = [p for group in groups for p in group.parameters]
    optimizer = instantiate(cfg.optimizer, groups=groups)
    images = FewImages(cfg.data.limit or GLOBAL_BATCH, instantiate(cfg.augmentation).sizes)
    losses = []
    for step in range(STEPS):
        warm_start = step == 0 and len(method.phases(RunShape(1, STEPS, GLOBAL_BATCH))) > 1
        values = {"twin_momentum": 0.9, "bank_lr": 0.5, "labels_made": float(step == 1)}
        at = now("warm start" if warm_start else "training", 0 if warm_start else step, **values)
        method.before_epoch(at, images)
        method.before_step(at, images)
        outputs = method(own_batch(cfg, step), at)
        outputs.loss.backward()
        distributed.mean_gradients(learning)
        gradients = [p.grad.clone() for p in learning]
        losses.append(distributed.sum_(outputs.loss.detach().clone()) / distributed.world())
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(at)
        if warm_start:
            method.after_phase(at)
    state = {name: value.clone() for name, value in method.state_dict().items() if "num_batches" not in name}
    return {"losses": losses, "gradients": gradients, "state": state, "statistics": method.statistics()}


def write_steps(path, case):
    start()
    result = steps(case)
    if distributed.is_main():
        torch.save(result, path)
    distributed.stop()


def write_sent(path, cases):
    """For each configuration, write how many bytes a rank sends in the collectives of one step, if they run as a
    ring.
    """
    sent = {"bytes": 0.0}

    def counting(original, passes):
        """Wrap a collective so that it also counts its bytes; a rank sends `passes` times the bytes of the tensor."""

        def collective(*arguments, **options):
            tensor = arguments[-1] if isinstance(arguments[0], list) else arguments[0]
            sent["bytes"] += passes(dist.get_world_size()) * tensor.nbytes
            return original(*arguments, **options)

        return collective

    start()
    dist.all_reduce = counting(dist.all_reduce, lambda world: 2 * (world - 1) / world)
    dist.all_gather = counting(dist.all_gather, lambda world: world - 1)
    dist.all_to_all_single = counting(dist.all_to_all_single, lambda world: (world - 1) / world)
    counts = {}
    for case in cases:
        overrides = case.split()
        cfg = compose(*overrides, bank=not WITHOUT_BANK & set(overrides))
        method = placed(build_method(cfg), cfg).train()
        batch = own_batch(cfg, 0, torch.float32)
        sent["bytes"] = 0.0
        method(batch, now()).loss.backward()
        distributed.mean_gradients([p for group in method.parameter_groups() for p in group.parameters])
        method.after_step(now(bank_lr=0.1))
        counts[case] = sent["bytes"]
    if distributed.is_main():
        Path(path).write_text(json.dumps(counts))
    distributed.stop()


def in_float64() -> None:
    """Make this process train in float64, for comparisons over several steps.

    Training is chaotic where rounding decides a key's nearest row or the sign before a ReLU: in float32, two orders of
    summation lead to two different runs within a few steps. In float64 the runs start 1e-16 apart, and after twelve
    steps at these tests' rates they are 1e-10 apart. That is too little to change the choice of a row, and far less
    than the effect of a wrong gradient or a row in the wrong place (1e-3).
    """
    spread = training.in_groups

    def in_double(images):
        return images.double() if isinstance(images, torch.Tensor) else [view.double() for view in images]

    def doubled(*arguments, **settings):
        method = spread(*arguments, **settings).double()
        for module in method.modules():
            if isinstance(module, Encoder):
                module.register_forward_pre_hook(lambda module, images: (in_double(images[0]),))
        return method

    training.in_groups = doubled


def train_in_float64(*overrides):
    in_float64()
    caco_train(*overrides)


def write_what_was_loaded(path, *overrides):
    """Instead of training, write the state that a run would resume from, gathered again from its ranks."""
    in_float64()

    def fit(self):
        state = self.state_dict()
        if distributed.is_main():
            torch.save(state["method"], path)
        distributed.barrier()
        os._exit(0)

    trainer.Trainer.fit = fit
    caco_train(*overrides)


def train_with_a_seed_of_its_own(*overrides):
    caco_train(*overrides, f"seed={os.environ['RANK']}")


def print_refused_banks():
    from caco.banks.rows import Rows

    start()
    rank = distributed.rank()
    for size, seed in ((8 + 2 * rank, 0), (8, rank)):
        try:
            Rows(size=size, dim=4, seed=seed, learnable=True)
        except ValueError as error:
            print(error)
    distributed.stop()


def train_and_lose_rank_1(*overrides):
    original = recording.Recording.log_step

    def log(self, now, *rest, **named):
        if now.step == 4 and os.environ["RANK"] == "1":
            os._exit(9)
        original(self, now, *rest, **named)

    recording.Recording.log_step = log
    caco_train(*overrides)


def train_with_a_late_file_on_rank_1(*overrides):
    """Train while the newest checkpoint is not visible yet to the second rank, as on a slow shared file system."""
    files = Checkpoints._files
    late = int(os.environ["RANK"])
    Checkpoints._files = lambda self, kind="": files(self, kind)[: 2 - late]
    caco_train(*overrides)


def scores_of_all_ranks():
    return 0.9 * torch.rand(10, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def write_balanced(path):
    """Write SwAV's codes of ten images that are divided over the ranks."""
    from caco.methods.assignments import balanced

    start()
    part = len(scores_of_all_ranks()) // distributed.world()
    codes = distributed.gather(balanced(distributed.own(scores_of_all_ranks(), part), epsilon=0.05, iterations=3))
    if distributed.is_main():
        torch.save(codes, path)
    distributed.stop()


def embeddings_of_all_ranks():
    return torch.randn(10, 4, generator=torch.Generator().manual_seed(5)) + 0.5


def print_rank_me():
    """Print RankMe after an epoch whose last step had ten images, divided over the ranks."""
    from caco.methods.diagnostics import Signs

    start()
    signs = Signs()
    signs.of_step(distributed.own(embeddings_of_all_ranks(), 10 // distributed.world()))
    print(f"rank_me {signs.of_epoch()['embedding_rank_me']:.9f}")
    distributed.stop()
