"""Runs a training from a checked configuration: builds the parts in their order, goes on from a checkpoint if there is
one, trains, and writes the summary.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from caco import distributed, metrics
from caco.config import folders
from caco.config.composition import instantiate
from caco.engine.assembly import build_method, build_tracker, final_backbone, pick_device, refuse_unfit
from caco.engine.channels import note
from caco.engine.continuing import last_state, refuse_different_steps, refuse_other_groups, taken_over
from caco.engine.next_command import evaluators_again, set_otherwise
from caco.engine.optimizers import Optimisation, OptimizerSchedule
from caco.engine.preemption import Stop, Stopped
from caco.engine.progress import beginning, ended_before, ending
from caco.engine.run_data import Data, read
from caco.engine.same_images import images_read, other_images
from caco.engine.starting import Start
from caco.engine.trainer import Trainer
from caco.errors import UserError
from caco.evals.evaluation import Evaluation
from caco.launch import labels
from caco.methods.base import Method
from caco.nn import weights
from caco.nn.norm import in_groups
from caco.runs import directory
from caco.runs.checkpoint import Checkpoints
from caco.runs.files import read_json, write_json
from caco.runs.identity import flat, run_hash
from caco.runs.paths import expanded
from caco.saying import Sometimes, doing
from caco.schedules import RunShape
from caco.tracking.base import Tracker
from caco.tracking.ledger import close_left_open

Saved = tuple[dict[str, Any], Path]  # a checkpoint's state, and its file


def run_training(
    cfg: DictConfig, run_dir: Path, *, stop: Stop | None = None, label: labels.Label | None = None
) -> dict[str, Any]:
    """Build everything, go on from the newest checkpoint if there is one, train, and write summary.json.

    The data come first, so that missing or too few images are reported before any model is built.
    """
    label = label or labels.Label(run_dir.name, {})
    device = pick_device(cfg.device)
    distributed.start(device)
    main = distributed.is_main()
    config_hash = _hash_of_all_ranks(cfg)
    tracker = build_tracker(cfg)
    say = Sometimes(main)
    start = Start()
    data = read(cfg, run_dir, device, say, start)
    with start.part("preparing the evaluators"):
        evaluation = _evaluation(cfg, run_dir, data, device, say)
    evaluated_on = images_read(evaluation) if main else {}
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=cfg.checkpoint.keep)
    newest, before = _saved(cfg, run_dir, checkpoints, start)
    method = _method(cfg, data, evaluation, device, start, is_new=newest is None)
    trainer = _trainer(
        cfg,
        run_dir,
        data,
        method,
        evaluation=evaluation,
        tracker=tracker,
        checkpoints=checkpoints,
        device=device,
        config_hash=config_hash,
        stop=stop,
    )
    if newest is not None:
        known = _go_on(cfg, run_dir, trainer, newest, evaluated_on, label)
        if known is not None:
            data.close()
            distributed.stop()
            return known

    elif before is not None:
        place = trainer.course.place(before[0]["step"])
        trainer.load_state_dict(taken_over(before[0], place=place, config_hash=config_hash))
        if main:
            at = f"step {trainer.step} of {trainer.course.total_steps}"
            print(f"caco: continues {before[1]} ({cfg.continued_schedule}), {at}", file=sys.stderr)

    about = {"config_hash": config_hash, "data": data.splits.pretrain.name, "data_digest": data.digest}
    if cfg.continue_from is not None:
        about |= {"continued_from": cfg.continue_from, "continued_run": cfg.continued_run}
    status = "FAILED"
    summary: dict = {}
    started = time.monotonic()
    if main:
        print(_beginning(cfg, run_dir, data, trainer, label), file=sys.stderr)
        start.say(always=cfg.profile)
        environment = _write_what_it_is(cfg, run_dir, data, evaluated_on)
        tracker.start(
            run_dir,
            params={**label.choices, **flat(cfg)},
            tags={**environment, **about},
            run_name=label.name,
            state=newest[0]["tracker"] if newest else None,
            sweep=label.sweep,
        )
    try:
        final = trainer.fit()
        summary = {**final, "processes": distributed.world(), **about}
        if main:
            start.add_to(run_dir / "shares.json")
            tracker.log_model(lambda: final_backbone(cfg, method))  # first: a run with a summary is never opened again
            write_json(run_dir / "summary.json", summary)
            seconds = time.monotonic() - started
            message = ending(
                summary,
                seconds=seconds,
                run_dir=run_dir,
                evaluators=evaluators_again(label, cfg),
                settings=set_otherwise(cfg, evaluators_again(label, cfg)),
                epochs=cfg.epochs,
                commands=label.sweep is None,
            )
            print(message, file=sys.stderr)
        status = "FINISHED"
    except (KeyboardInterrupt, Stopped):
        status = "KILLED"
        raise
    except RuntimeError as error:
        if not distributed.has_lost_another(error):
            raise
        raise UserError(
            "another process of this run has ended or does not answer; its own output, or failure.txt, says why. The"
            f" same command goes on from the last checkpoint ({str(error).splitlines()[0][:200]})"
        ) from error
    finally:
        if main:
            with doing("handing the results over to the tracker"):
                tracker.finish(status, summary)
        data.close()
        distributed.stop()
    return summary


# The stages before the first step, in their order.


def _hash_of_all_ranks(cfg: DictConfig) -> str:
    """The hash of the configuration, which must be the same on every rank. A collective."""
    config_hash = run_hash(cfg)
    hashes = distributed.all_objects(config_hash)
    if len(set(hashes)) > 1:
        raise UserError(f"every rank must have the same configuration; got the hashes {', '.join(hashes)}, by rank")
    return config_hash


def _evaluation(cfg: DictConfig, run_dir: Path, data: Data, device: torch.device, say: Sometimes) -> Evaluation:
    return Evaluation(
        {name: instantiate(node) for name, node in cfg.eval.items()},
        data.splits,
        data.views,
        batch=max(1, min(cfg.batch, 512)),
        device=device,
        precision=cfg.precision,
        seed=cfg.seed,
        loader=data.settings,
        folder=run_dir / "evaluations",
        passing=True,
        say=say,
    )


def _saved(cfg: DictConfig, run_dir: Path, checkpoints: Checkpoints, start: Start) -> tuple[Saved | None, Saved | None]:
    """The newest checkpoint of this run, and if there is none, the last one of the run that it continues. A
    collective.
    """
    with start.part("looking for a checkpoint"):
        newest = checkpoints.load_newest()
    refuse_different_steps(None if newest is None else newest[0]["step"], run_dir)
    before = last_state(cfg, expanded(cfg.continue_from)) if cfg.continue_from is not None and newest is None else None
    if before is not None:
        refuse_different_steps(before[0]["step"], expanded(cfg.continue_from))
    if cfg.norm_groups == "rank" and (begun := newest or before) is not None:
        refuse_other_groups(len(begun[0]["random"]))
    return newest, before


def _method(
    cfg: DictConfig, data: Data, evaluation: Evaluation, device: torch.device, start: Start, *, is_new: bool
) -> Method:
    """The method on its device, with BatchNorm in its groups.

    Args:
        is_new: whether the run has no checkpoint yet, so that given weights are loaded.
    """
    with start.part("building the network"):
        method = build_method(cfg, len(data.splits.pretrain))
    refuse_unfit(method, data.views, data.splits.pretrain)
    evaluation.require(method.backbone, method)
    if cfg.weights is not None and is_new:
        message = weights.initialise(method, expanded(cfg.weights), cfg.format)
        if distributed.is_main():
            print(f"caco: {message}", file=sys.stderr)
    at_once = cfg.batch // distributed.world() // (cfg.accumulate or 1)
    method = in_groups(method, device, cfg.norm_groups, images=at_once, shuffle_keys=cfg.shuffle_keys)
    with start.part("moving the network and its bank to the device"):
        method = method.to(device).to(memory_format=torch.channels_last)
    if cfg.compile:
        method.get_submodule("encoder").compile()
    return method


def _trainer(
    cfg: DictConfig,
    run_dir: Path,
    data: Data,
    method: Method,
    *,
    evaluation: Evaluation,
    tracker: Tracker,
    checkpoints: Checkpoints,
    device: torch.device,
    config_hash: str,
    stop: Stop | None,
) -> Trainer:
    schedule = dict(cfg.schedule)
    restart_epoch = int(cfg.continued_epochs) if cfg.continued_schedule == "restart" else 0
    run = RunShape(cfg.epochs, data.loader.steps_per_epoch, cfg.batch, schedule.pop("unit"), restart_epoch)
    return Trainer(
        method=method,
        loader=data.loader,
        images=data.images,
        optimisation=Optimisation(
            instantiate(cfg.optimizer, groups=method.parameter_groups()), OptimizerSchedule(**schedule), run
        ),
        run=run,
        evaluation=evaluation,
        tracker=tracker,
        checkpoints=checkpoints,
        device=device,
        seed=cfg.seed,
        config_hash=config_hash,
        data_digest=data.digest,
        max_steps=cfg.max_steps,
        accumulate=cfg.accumulate,
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


def _go_on(
    cfg: DictConfig, run_dir: Path, trainer: Trainer, newest: Saved, evaluated_on: dict[str, Any], label: labels.Label
) -> dict[str, Any] | None:
    """Load the run's newest checkpoint into the Trainer, and say so. A collective.

    Returns:
        the summary of a run that is finished already; None if there is something left to do.
    Raises:
        UserError: the run has been evaluated on other images so far.
    """
    state, path = newest
    trainer.load_state_dict(state)
    total = trainer.course.total_steps
    known = read_json(run_dir / "summary.json")
    is_done = trainer.step == total and bool(known) and not metrics.missing_at_the_end(known)
    main = distributed.is_main()
    refused = other_images(read_json(run_dir / "images.json"), evaluated_on, is_done=is_done) if main else None
    if refused := distributed.shared_object(refused):
        raise UserError(refused)
    if main:
        message = f"caco: going on from {path}, step {trainer.step} of {total}"
        if is_done:
            close_left_open(run_dir)
            when = path.stat().st_mtime
            message = ended_before(
                known,
                when=when,
                run_dir=run_dir,
                evaluators=evaluators_again(label, cfg),
                epochs=cfg.epochs,
                settings=set_otherwise(cfg, evaluators_again(label, cfg)),
            )
        print(message, file=sys.stderr)
    return known if is_done else None


def _beginning(cfg: DictConfig, run_dir: Path, data: Data, trainer: Trainer, label: labels.Label) -> str:
    splits = data.splits
    return beginning(
        data=splits.pretrain.name, num_train=len(splits.pretrain),
        num_test=len(splits.test or ()) if cfg.eval else 0, choices=label.choices,
        bank_rows=0 if cfg.bank is None else cfg.bank.size or len(splits.pretrain),
        batch=cfg.batch, epochs=cfg.epochs,
        warm_start_steps=trainer.course.training_starts, steps_per_epoch=trainer.run.steps_per_epoch,
        processes=distributed.world(), device=trainer.device.type, run_dir=run_dir,
        total_steps=trainer.course.total_steps,
    )  # fmt: skip


def _write_what_it_is(cfg: DictConfig, run_dir: Path, data: Data, evaluated_on: dict[str, Any]) -> dict[str, Any]:
    """Write the files that say what this run is; returns its environment."""
    directory.write_config(run_dir, cfg)  # not earlier: a run that goes on may still have been refused
    images_file = run_dir / "images.json"
    write_json(images_file, {**read_json(images_file), **evaluated_on})
    note(data.views, run_dir)
    # Written again: now that PyTorch is imported, the file can name the GPUs and the processor's instructions.
    return directory.write_environment(run_dir, folders.record())
