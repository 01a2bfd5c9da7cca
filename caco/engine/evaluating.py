"""Runs the evaluators of a checked configuration of caco.evaluate: loads the weights and images, skips known
results.
"""

import copy
import sys
import time
from pathlib import Path

import torch
from omegaconf import DictConfig

from caco import distributed
from caco.config.channels_needed import channels_of
from caco.config.composition import instantiate
from caco.config.pretrained import CHECKPOINT, Location
from caco.data.sets.overlap import Overlap
from caco.engine.assembly import build_splits, build_tracker, pick_device, refuse_unfit_backbone
from caco.engine.channels import backbone_of, views_of
from caco.engine.continuing import refuse_different_steps
from caco.evals.evaluation import Evaluation
from caco.evals.pixels import RawPixels
from caco.evals.record import Record
from caco.nn import weights
from caco.runs.checkpoint import Checkpoints
from caco.runs.paths import expanded
from caco.saying import Sometimes, doing


def load_pretrained(cfg: DictConfig, location: Location | None, backbone: torch.nn.Module) -> tuple[Path, int]:
    """Load the weights named by run= (its newest readable checkpoint, unless it names a file) or weights= into a
    backbone.

    Returns:
        the file, and the step at which it was saved (0 for weights=).
    Raises:
        ValueError: no file can be read, or the file has another architecture; the differing keys are listed.
    """
    if location is None:
        path = expanded(cfg.weights)
        message = weights.load_backbone(path, cfg.format, backbone)
        if distributed.is_main():
            print(f"caco: {message}", file=sys.stderr)
        return path, 0
    if location.checkpoint is not None:
        path = location.checkpoint
    else:
        newest = Checkpoints(location.run_dir / "checkpoints").load_newest()
        assert newest is not None, "`locate` has found one"
        state, path = newest
        refuse_different_steps(state["step"], location.run_dir)
    weights.load_backbone(path, "caco", backbone)
    name = CHECKPOINT.fullmatch(path.name)
    assert name is not None, "`locate` takes no other file"
    return path, int(name[1])


def run_evaluation(cfg: DictConfig, location: Location | None, results_dir: Path) -> dict[str, float]:
    """Run the evaluators whose results are not known yet; each result is written as soon as it exists.

    Args:
        location: the run that is evaluated; None with weights=.
        results_dir: the folder for the results: the run's directory or another one.
    Returns:
        every result by name; those of the baselines as untrained/NAME and pixels/NAME.
    """
    device = pick_device(cfg.device)
    distributed.start(device)
    refuse_unfit_backbone(cfg)
    torch.manual_seed(cfg.seed)
    # Seeded alike and built first, the backbone has the weights with which the run's began: the "untrained" baseline.
    backbone = backbone_of(cfg.backbone, channels_of(cfg))
    encoders: dict[str, torch.nn.Module] = {"": backbone}
    if cfg.baselines:
        encoders |= {
            "untrained/": copy.deepcopy(backbone),
            "pixels/": RawPixels(cfg.augmentation.size, channels=channels_of(cfg) or 3),
        }
    path, step = load_pretrained(cfg, location, backbone)
    with doing("reading the images"):
        splits = build_splits(cfg)
    say = Sometimes(distributed.is_main(), bars=True)
    views = views_of(cfg, splits, run_dir=None if location is None else location.run_dir, say=say)
    for source in (splits.pretrain, splits.train, splits.test):
        if source is not None:
            source.look(say)
    compared = Overlap(say)
    if cfg.overlap == "refuse":
        compared.refuse_in(splits)
    evaluation = Evaluation(
        {name: instantiate(node) for name, node in cfg.eval.items()},
        splits,
        views,
        batch=cfg.batch,
        device=device,
        precision=cfg.precision,
        seed=cfg.seed,
        loader=instantiate(cfg.loader),
        folder=results_dir / "evaluations",
        cache=None if cfg.cache is None else expanded(cfg.cache),
        overlap=cfg.overlap,
        compared=compared,
        say=say,
    )
    evaluation.require(backbone)
    record = Record(
        results_dir,
        cfg,
        tracker=build_tracker(cfg),
        step=step,
        path=path,
        is_run=location is not None and cfg.to is None,
    )
    status = None
    try:
        if distributed.is_main():
            status = record.open()
        for prefix, encoder in encoders.items():
            encoder.to(device).to(memory_format=torch.channels_last).eval()
            todo = None
            if distributed.is_main():
                made_from = {name: record.made_from(name, evaluation, encoder) for name in cfg.eval}
                todo = [name for name in cfg.eval if not record.known(prefix, name, made_from[name])]
            todo = distributed.shared_object(todo, patient=True)
            begun = time.monotonic()
            for name, values in evaluation.each(encoder, todo):
                if distributed.is_main():
                    record.add(prefix, name, made_from[name], values, seconds=time.monotonic() - begun)
                begun = time.monotonic()
    finally:
        if status is not None:
            record.close(status)
        distributed.stop()
    if record.results:
        print(record.table())
        for line in dict.fromkeys(
            line for evaluator in evaluation.evaluators.values() for line in evaluator.departures
        ):
            print(f"caco: {line}")
    return record.results
