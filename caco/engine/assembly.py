"""Builds the parts of a training or an evaluation from a checked configuration, and runs the training."""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from caco import distributed, metrics
from caco.banks.base import Bank
from caco.config import folders, signatures, views_needed
from caco.config.channels_needed import channels_of
from caco.config.composition import instantiate, target
from caco.config.no_effect import settings_of
from caco.data.loaders.bound import BoundLoader, Loader
from caco.data.loaders.images import Images
from caco.data.sets import unfit
from caco.data.sets.sources import Source, Splits
from caco.data.views.augmentation import Views
from caco.engine.channels import backbone_of, note, views_of
from caco.engine.continuing import last_state, taken_over
from caco.engine.optimizers import Optimisation, OptimizerSchedule
from caco.engine.preemption import Stop, Stopped
from caco.engine.progress import beginning, ended_before, ending
from caco.engine.same_images import images_read, other_images
from caco.engine.starting import Start
from caco.engine.trainer import Trainer
from caco.errors import UserError, require_contract
from caco.evals.evaluation import Evaluation
from caco.launch import labels
from caco.methods.base import Method, Needs
from caco.methods.treatments import Treatment
from caco.nn import backbones, weights
from caco.nn.backbones import feature_width
from caco.nn.heads import Encoder
from caco.nn.norm import in_groups
from caco.runs import directory
from caco.runs.checkpoint import Checkpoints
from caco.runs.files import read_json, write_json
from caco.runs.identity import flat, plain, run_hash
from caco.runs.paths import expanded
from caco.saying import Sometimes, doing
from caco.schedules import RunShape
from caco.tracking.base import Tracker


def pick_device(name: str) -> torch.device:
    """The torch device of the setting `device`; "auto" takes CUDA if torch sees a CUDA device.

    Raises:
        UserError: "cuda" was asked for and torch sees no CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device=cuda, but torch sees no CUDA device here; use device=cpu or device=auto")
        # The modulo: some clusters show each process only its own GPU, as number 0.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device(name)


def refuse_unfit_backbone(cfg: DictConfig) -> None:
    """Check a timm backbone against the sizes of the views.

    Raises:
        UserError: the timm model cannot compute features of images of a size that the views have.
    """
    channels = channels_of(cfg)
    settings = dict(cfg.backbone) | ({} if channels is None else {"in_channels": channels})
    if settings.pop("_target_") == "caco.nn.backbones.timm_backbone":
        views: Views = instantiate(cfg.augmentation)
        backbones.refuse_unfit([views.size, *views.sizes], **settings)


def build_encoder(cfg: DictConfig) -> Encoder:
    """Backbone and projector with random weights, drawn from torch's global generator."""
    refuse_unfit_backbone(cfg)
    backbone = backbone_of(cfg.backbone, channels_of(cfg))
    return Encoder(backbone=backbone, projector=instantiate(cfg.projector, in_dim=feature_width(backbone)))


def counts_images(cfg: DictConfig) -> bool:
    """Whether the method or its bank keeps something for each training image, and so must be told their number."""
    return (cfg.bank is not None and cfg.bank.size is None) or getattr(target(cfg.method), "needs", Needs()).indices


def build_method(cfg: DictConfig, num_images: int | None = None) -> Method:
    """Encoder, bank and objective. `seed` alone decides weights and rows, so they are the same on every rank.

    Args:
        num_images: number of training images. None: count them if the method or its bank keeps something for each.
    """
    if num_images is None and counts_images(cfg):
        num_images = len(build_splits(cfg).pretrain)
    torch.manual_seed(cfg.seed)
    return method_on(build_encoder(cfg), cfg, num_images)[0]


def method_on(encoder: Encoder, cfg: DictConfig, num_images: int | None) -> tuple[Method, Bank | None]:
    """The objective on this encoder, and its bank. A part that the configuration does not have is not passed at all, so
    a method that knows no banks or no treatments of negatives needs no argument for them.

    Args:
        num_images: number of training images; needed if `counts_images`.
    """
    parts: dict[str, Any] = {}
    if cfg.get("negatives") is not None:
        parts["treatment"] = instantiate(cfg.negatives)
        require_contract("negatives", parts["treatment"], Treatment)
    if cfg.bank is not None:
        parts["bank"] = instantiate(cfg.bank, **({"size": num_images} if cfg.bank.size is None else {}))
        require_contract("bank", parts["bank"], Bank)
    if getattr(target(cfg.method), "needs", Needs()).indices:
        parts["num_images"] = num_images
    return instantiate(cfg.method, encoder=encoder, **parts), parts.get("bank")


def build_tracker(cfg: DictConfig) -> Tracker:
    tracker = instantiate(cfg.tracking)
    require_contract("tracking", tracker, Tracker)
    return tracker


def build_splits(cfg: DictConfig) -> Splits:
    splits = instantiate(cfg.data)
    for name in ("pretrain", "train", "test"):
        if (source := getattr(splits, name)) is not None:
            require_contract(f"data: {name}", source, Source)
    return splits


def refuse_unfit(method: Method, views: Views, source: Source) -> None:
    """Raise UserError if the views, or the images that they are made from, do not meet the method's needs."""
    views_needed.refuse(dataclasses.asdict(method.needs), views.patches, views.colours)
    if method.needs.patches != "none":
        unfit.refuse_too_small_for_patches(source)
    if method.needs.lightness_first:
        unfit.refuse_grey(source)
    if method.needs.classes is not None:
        unfit.refuse_other_labels(source, method.needs.classes)


def final_backbone(cfg: DictConfig, method: Method) -> torch.nn.Module:
    """A new backbone with the weights of the method's, on the CPU and in eval mode. Its BatchNorm communicates with no
    other rank.
    """
    backbone = backbone_of(cfg.backbone, channels_of(cfg))
    backbone.load_state_dict(method.backbone.state_dict())
    return backbone.eval()


def refuse_different_steps(step: int | None, run_dir: Path) -> None:
    """Check that all ranks loaded the same checkpoint. Each rank reads the checkpoints itself, and on one machine a
    file may still be missing or be damaged. A collective.

    Args:
        step: the step of the checkpoint that this rank has loaded, or None.
    Raises:
        UserError: the ranks have loaded different checkpoints; the steps are listed by rank.
    """
    steps = distributed.all_objects(step)
    if len(set(steps)) > 1:
        loaded = ", ".join(
            f"rank {rank} {'none' if step is None else f'step {step}'}" for rank, step in enumerate(steps)
        )
        raise UserError(
            f"every rank must load the same checkpoint; got {loaded}. Nothing was changed: make sure that all machines"
            f" can read the same files in {run_dir / 'checkpoints'}, then start the same command again"
        )


def refuse_other_groups(saved_by: int) -> None:
    """With norm_groups=rank, check that as many ranks go on as saved the checkpoint.

    Raises:
        UserError: the number of ranks differs, so that BatchNorm would work on other groups than before.
    """
    if saved_by != distributed.world():
        raise UserError(
            f"norm_groups=rank: this run's BatchNorm had {saved_by} groups, one for each process, and would have"
            f" {distributed.world()} from here on; start {saved_by} processes (a run with norm_groups={saved_by} can"
            " also go on with fewer)"
        )


def _again(label: labels.Label, cfg: DictConfig) -> list[str]:
    """The run's options of `eval` that caco.evaluate can repeat; it has only the backbone, not the method."""
    return [
        option
        for option in label.evaluators
        if option not in cfg.eval or not signatures.declared(cfg.eval[option]["_target_"], "needs_method")
    ]


def _set_otherwise(cfg: DictConfig, options: list[str]) -> list[str]:
    """The settings of these options of `eval` that this run has not as their files say, as overrides: a command that
    names the options alone would ask for another evaluation, or for one that does not go with the images.
    """
    leaves = flat({"eval": plain(cfg)["eval"]})
    of_files = {
        key: value
        for option in options
        if (file := folders.option_file("eval", option)) is not None
        for key, value in settings_of("eval", file)
    }
    return [
        f"{key}={leaves[key]}"
        for key, wanted in of_files.items()
        if isinstance(wanted, int | float) and isinstance(leaves.get(key), int | float) and leaves[key] != wanted
    ]


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
    config_hash = run_hash(cfg)
    hashes = distributed.all_objects(config_hash)
    if len(set(hashes)) > 1:
        raise UserError(f"every rank must have the same configuration; got the hashes {', '.join(hashes)}, by rank")
    tracker = build_tracker(cfg)
    say = Sometimes(main)
    start = Start()
    with start.part("reading the images"):
        splits = build_splits(cfg)
    with start.part("looking at the images"):
        splits.pretrain.look(say)  # on all ranks together, because the digest of a large set takes long
    with start.part("measuring the images"):
        views = views_of(cfg, splits, run_dir=run_dir, say=say)
    with start.part("the digest of the images"):
        data_digest = distributed.together(lambda: splits.pretrain.digest() if main else "")[0]

    settings: Loader = instantiate(cfg.loader)

    def bind_loader() -> BoundLoader:
        return settings.bind(
            splits.pretrain,
            views,
            batch=cfg.batch,
            seed=cfg.seed,
            rank=distributed.rank(),
            world=distributed.world(),
            device=device,
        )

    with start.part("starting the loader"):
        loader = bind_loader()
    images = Images(
        splits.pretrain, views, bind_loader, batch=max(1, min(cfg.batch, 512)), device=device, rank=distributed.rank(),
        world=distributed.world(), num_workers=settings.num_workers, corrupt=settings.corrupt,
    )  # fmt: skip
    with start.part("preparing the evaluators"):
        evaluation = Evaluation(
            {name: instantiate(node) for name, node in cfg.eval.items()},
            splits,
            views,
            batch=max(1, min(cfg.batch, 512)),
            device=device,
            precision=cfg.precision,
            seed=cfg.seed,
            loader=settings,
            folder=run_dir / "evaluations",
            passing=True,
            say=say,
        )
    images_file = run_dir / "images.json"
    evaluated_on = images_read(evaluation) if main else {}
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=cfg.checkpoint.keep)
    with start.part("looking for a checkpoint"):
        newest = checkpoints.load_newest()
    refuse_different_steps(None if newest is None else newest[0]["step"], run_dir)
    before = last_state(cfg, expanded(cfg.continue_from)) if cfg.continue_from is not None and newest is None else None
    if before is not None:
        refuse_different_steps(before[0]["step"], expanded(cfg.continue_from))
    if cfg.norm_groups == "rank" and (begun := newest or before) is not None:
        refuse_other_groups(len(begun[0]["random"]))
    with start.part("building the network"):
        method = build_method(cfg, len(splits.pretrain))
    refuse_unfit(method, views, splits.pretrain)
    evaluation.require(method.backbone, method)
    if cfg.weights is not None and newest is None:
        message = weights.initialise(method, expanded(cfg.weights), cfg.format)
        if main:
            print(f"caco: {message}", file=sys.stderr)
    at_once = cfg.batch // distributed.world() // (cfg.accumulate or 1)
    method = in_groups(method, device, cfg.norm_groups, images=at_once, shuffle_keys=cfg.shuffle_keys)
    with start.part("moving the network and its bank to the device"):
        method = method.to(device).to(memory_format=torch.channels_last)
    if cfg.compile:
        method.get_submodule("encoder").compile()
    schedule = dict(cfg.schedule)
    restart_epoch = int(cfg.continued_epochs) if cfg.continued_schedule == "restart" else 0
    run = RunShape(cfg.epochs, loader.steps_per_epoch, cfg.batch, schedule.pop("unit"), restart_epoch)
    trainer = Trainer(
        method=method,
        loader=loader,
        images=images,
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
        data_digest=data_digest,
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
    if newest is not None:
        state, path = newest
        trainer.load_state_dict(state)
        known = read_json(run_dir / "summary.json")
        is_done = trainer.step == trainer.course.total_steps and bool(known) and not metrics.missing_at_the_end(known)
        refused = other_images(read_json(images_file), evaluated_on, is_done=is_done) if main else None
        if refused := distributed.shared_object(refused):
            raise UserError(refused)
        if main:
            message = f"caco: going on from {path}, step {trainer.step} of {trainer.course.total_steps}"
            if is_done:
                when = path.stat().st_mtime
                message = ended_before(
                    known,
                    when=when,
                    run_dir=run_dir,
                    evaluators=_again(label, cfg),
                    epochs=cfg.epochs,
                    settings=_set_otherwise(cfg, _again(label, cfg)),
                )
            print(message, file=sys.stderr)
        if is_done:
            loader.close()
            images.close()
            distributed.stop()
            return known

    elif before is not None:
        trainer.load_state_dict(
            taken_over(before[0], place=trainer.course.place(before[0]["step"]), config_hash=config_hash)
        )
        if main:
            print(
                f"caco: continues {before[1]} ({cfg.continued_schedule}), step {trainer.step} of {trainer.course.total_steps}",
                file=sys.stderr,
            )

    of_parent = (
        {} if cfg.continue_from is None else {"continued_from": cfg.continue_from, "continued_run": cfg.continued_run}
    )
    status = "FAILED"
    summary: dict = {}
    started = time.monotonic()
    if main:
        rows = 0 if cfg.bank is None else cfg.bank.size or len(splits.pretrain)
        message = beginning(
            data=splits.pretrain.name, num_train=len(splits.pretrain),
            num_test=len(splits.test or ()) if cfg.eval else 0,
            choices=label.choices, bank_rows=rows, batch=cfg.batch, epochs=cfg.epochs,
            warm_start_steps=trainer.course.training_starts, steps_per_epoch=run.steps_per_epoch,
            processes=distributed.world(), device=device.type, run_dir=run_dir, total_steps=trainer.course.total_steps,
        )  # fmt: skip
        print(message, file=sys.stderr)
        start.say(always=cfg.profile)
        directory.write_config(run_dir, cfg)  # not earlier: a run that goes on may still have been refused
        write_json(images_file, {**read_json(images_file), **evaluated_on})
        note(views, run_dir)
        # Written again: now that PyTorch is imported, the file can name the GPUs and the processor's instructions.
        environment = directory.write_environment(run_dir, folders.record())
        tracker.start(
            run_dir,
            params={**label.choices, **flat(cfg)},
            tags={
                **environment,
                "config_hash": config_hash,
                "data": splits.pretrain.name,
                "data_digest": data_digest,
                **of_parent,
            },
            run_name=label.name,
            state=newest[0]["tracker"] if newest else None,
            sweep=label.sweep,
        )
    try:
        final = trainer.fit()
        about = {"config_hash": config_hash, "data": splits.pretrain.name, "data_digest": data_digest, **of_parent}
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
                evaluators=_again(label, cfg),
                settings=_set_otherwise(cfg, _again(label, cfg)),
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
        loader.close()
        images.close()
        distributed.stop()
    return summary
