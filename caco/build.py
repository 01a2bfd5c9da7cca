"""From a checked configuration to a Trainer: the only place where components meet their settings."""

import os
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig

from caco import distributed, runs, weights
from caco.checkpoint import Checkpoints
from caco.config import build
from caco.evals.evaluation import Evaluation
from caco.nn.backbones import feature_width
from caco.nn.heads import Encoder
from caco.nn.norm import over_all_ranks
from caco.optimizers import Schedule
from caco.preemption import Stop, Stopped
from caco.tracking.environment import environment
from caco.tracking.files import read_json, write_json
from caco.trainer import Trainer


def pick_device(name: str) -> torch.device:
    """auto takes CUDA where there is one.

    Raises:
        ValueError: cuda was asked for and torch sees none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device=cuda, but torch sees no CUDA device here; use device=cpu or device=auto")
        # Modulo: some clusters show each process its own GPU alone, as number 0.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device(name)


def build_encoder(cfg: DictConfig) -> Encoder:
    """Backbone and projector, random weights from torch's generator."""
    backbone = build(cfg.backbone)
    return Encoder(backbone=backbone, projector=build(cfg.projector, in_dim=feature_width(backbone)))


def build_method(cfg: DictConfig) -> torch.nn.Module:
    """Encoder, bank and objective; the same weights and rows on every rank, from `seed` alone."""
    torch.manual_seed(cfg.seed)
    encoder = build_encoder(cfg)
    bank = None if cfg.bank is None else build(cfg.bank)
    return build(cfg.method, encoder=encoder, bank=bank)


def train(cfg: DictConfig, run_dir: Path, *, stop: Stop | None = None) -> dict[str, float]:
    """Build everything, go on from the newest checkpoint if there is one, train, and write summary.json.

    Data come first, so that what is missing or too small is said before any model is built.
    """
    device = pick_device(cfg.device)
    distributed.start(device)
    main = distributed.is_main()
    config_hash = runs.run_hash(cfg)
    hashes = distributed.all_objects(config_hash)
    if len(set(hashes)) > 1:
        raise ValueError(f"every rank must have the same configuration; got the hashes {', '.join(hashes)}, by rank")
    tracker = build(cfg.tracking)
    splits, views = build(cfg.data), build(cfg.augmentation)
    data_digest = distributed.shared_object(splits.pretrain.digest() if main else None)
    loader = build(cfg.loader).bind(
        splits.pretrain,
        views,
        batch=cfg.batch,
        seed=cfg.seed,
        rank=distributed.rank(),
        world=distributed.world(),
        device=device,
    )
    evaluation = Evaluation(
        {name: build(node) for name, node in cfg.eval.items()},
        splits,
        views,
        batch=max(1, min(cfg.batch, 512)),
        device=device,
        precision=cfg.precision,
        seed=cfg.seed,
    )
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=cfg.checkpoint.keep)
    newest = checkpoints.load_newest()
    method = build_method(cfg)
    if cfg.weights is not None and newest is None:
        told = weights.initialise(method, Path(cfg.weights).expanduser(), cfg.format)
        if main:
            print(f"caco: {told}", file=sys.stderr)
    method = over_all_ranks(method, device).to(device=device, memory_format=torch.channels_last)
    if cfg.compile:
        method.encoder.compile()
    optimizer = build(cfg.optimizer, parameters=method.encoder_parameters())
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    trainer = Trainer(
        method=method,
        loader=loader,
        optimizer=optimizer,
        schedule=Schedule(**cfg.schedule),
        evaluation=evaluation,
        tracker=tracker,
        checkpoints=checkpoints,
        device=device,
        epochs=cfg.epochs,
        batch=cfg.batch,
        seed=cfg.seed,
        config_hash=config_hash,
        data_digest=data_digest,
        max_steps=cfg.max_steps,
        precision=cfg.precision,
        log_every_steps=cfg.log_every_steps,
        eval_every_epochs=cfg.eval_every_epochs,
        save_every_epochs=cfg.checkpoint.every_epochs,
        save_every_steps=cfg.checkpoint.every_steps,
        milestone_epochs=list(cfg.checkpoint.milestone_epochs),
        anomaly=cfg.anomaly,
        profile_to=run_dir if cfg.profile else None,
        stop=stop,
    )
    if newest is not None:
        state, path = newest
        trainer.load_state_dict(state)
        if main:
            print(f"caco: going on from {path}, step {trainer.step} of {trainer.total_steps}", file=sys.stderr)
        if trainer.step == trainer.total_steps and (run_dir / "summary.json").exists():
            loader.close()
            distributed.stop()
            return read_json(run_dir / "summary.json")

    status = "FAILED"
    summary: dict = {}
    if main:
        tracker.start(
            run_dir,
            params=runs.flat(cfg),
            tags={**environment(), "config_hash": config_hash, "data": splits.pretrain.name, "data_digest": data_digest},
            run_name=run_dir.name,
            state=newest[0]["tracker"] if newest else None,
        )
    try:
        metrics = trainer.fit()
        about = {"config_hash": config_hash, "data": splits.pretrain.name, "data_digest": data_digest}
        summary = {**metrics, "processes": distributed.world(), **about}
        if main:
            write_json(run_dir / "summary.json", summary)
        status = "FINISHED"
    except (KeyboardInterrupt, Stopped):
        status = "KILLED"
        raise
    finally:
        if main:
            tracker.finish(status, summary)
        loader.close()
        distributed.stop()
    return summary
