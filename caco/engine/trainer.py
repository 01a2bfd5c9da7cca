"""The training loop, written to be read from top to bottom.

The order in a step: rates, before_step, forward, backward, check that the loss is finite (on a GPU the loss of the step
before, see caco/engine/losses.py), optimiser, after_step, log, save, evaluate.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from caco import distributed
from caco.banks.unusable import Held
from caco.data.loaders.batches import Batch
from caco.data.loaders.bound import BoundLoader
from caco.data.loaders.images import Images
from caco.engine.course import Course
from caco.engine.instruments import instruments, parts_of_a_step
from caco.engine.losses import Losses, refused_at
from caco.engine.optimizers import Optimisation
from caco.engine.preemption import Stop, Stopped
from caco.engine.progress import Progress
from caco.engine.recording import Recording
from caco.errors import UserError
from caco.evals.evaluation import Evaluation
from caco.methods.base import Method, Now, Outputs
from caco.methods.diagnostics import Signs
from caco.runs.checkpoint import Checkpoints
from caco.saying import amount, doing
from caco.schedules import RunShape
from caco.tracking.base import Tracker


class Trainer:
    """Trains a method on the batches of a loader. Owns the step counter, the precision, the intervals of logging,
    saving and evaluation, and the run's state. Where each step lies is the Course's, and what is written down the
    Recording's.

    Args:
        method, loader, optimisation, images, evaluation, tracker, checkpoints: the parts.
        run: epochs, steps of an epoch, global batch.
        seed: for all random numbers drawn in the model.
        config_hash, data_digest: a run goes on only from a checkpoint with the same two values.
        max_steps: the number of steps after which to stop (earlier phases included), or None.
        accumulate: number of parts of a batch that go forward and backward one by one, to fit a small memory; None is
            1. Gradients, positives and the bank's motion are those of the whole batch; BatchNorm sees the parts.
        precision: "bf16" runs the encoders under autocast; embeddings, bank and parameters stay float32.
        log_every_steps, eval_every_epochs, save_every_epochs, save_every_steps, milestone_epochs: the intervals.
        anomaly: whether torch looks for the operation that made a NaN, which is slow.
        profile_to: a folder for a torch profiler trace of a few steps, or None.
        stop: its `requested` tells whether this process received a signal to stop.
    """

    def __init__(
        self,
        *,
        method: Method,
        loader: BoundLoader,
        images: Images,
        optimisation: Optimisation,
        run: RunShape,
        evaluation: Evaluation,
        tracker: Tracker,
        checkpoints: Checkpoints,
        device: torch.device,
        seed: int,
        config_hash: str,
        data_digest: str,
        max_steps: int | None = None,
        accumulate: int | None = None,
        precision: Literal["bf16", "fp32"] = "bf16",
        log_every_steps: int = 10,
        eval_every_epochs: int = 1,
        save_every_epochs: int = 1,
        save_every_steps: int | None = None,
        milestone_epochs: Sequence[int] = (),
        anomaly: bool = False,
        profile_to: Path | None = None,
        stop: Stop | None = None,
    ):
        self.method, self.loader, self.images, self.optimisation, self.run = method, loader, images, optimisation, run
        self.evaluation, self.checkpoints = evaluation, checkpoints
        self.device, self.config_hash, self.data_digest = device, config_hash, data_digest
        self.precision, self.anomaly, self.profile_to = precision, anomaly, profile_to
        self.log_every_steps, self.eval_every_epochs, self.save_every_epochs = (
            log_every_steps,
            eval_every_epochs,
            save_every_epochs,
        )
        self.save_every_steps, self.milestone_epochs, self.stop = (
            save_every_steps,
            set(milestone_epochs),
            stop or Stop(),
        )

        self.accumulate = accumulate or 1
        own = run.batch // distributed.world()
        if own % self.accumulate or own // self.accumulate < 2:
            raise UserError(
                f"accumulate: expected a divisor of the {own} images of a process that leaves at least 2 in each part; "
                f"got {accumulate}"
            )
        if self.accumulate > 1 and method.needs.whole_batch:
            raise UserError(
                "accumulate: this method's loss compares the images of a batch with one another, and a part of a batch"
                f" has fewer of them; expected null, got {accumulate}"
            )
        self.course = Course(method, run, optimisation, max_steps=max_steps)
        self.step, self.signs, self.losses = 0, Signs(), Losses(device)
        self.recording = Recording(tracker, method, self.signs, self.course)
        # Saved before the evaluation is made, so that a run that goes on makes it.
        self.evaluation_due: Literal["epoch", "end"] | None = "epoch"
        self.time = {"steps": 0, "seconds": 0.0}  # of all timed steps, over all processes that made the run
        torch.manual_seed(seed * 1_000_003 + distributed.rank())  # for dropout and the like, from now on

    # The loop.

    def batches(self) -> Iterator[tuple[Now, Batch]]:
        """The batches from the current step to the end of the run, each with its place."""
        step = self.step
        while step < self.course.total_steps:
            now = self.course.now(step)
            order: np.ndarray | None = None
            if now.epoch is None or now.step_in_epoch is None:
                # A phase outside the epochs uses negative numbers, whose image orders and augmentations no epoch has.
                passes, first = divmod(step, self.run.steps_per_epoch)
                epoch, end = -1 - passes, self.course.training_starts
            else:
                epoch, first, end = now.epoch, now.step_in_epoch, self.course.total_steps
                if first == 0:
                    self.method.before_epoch(now, self.images)
                order = self.method.order(epoch)
            end = min(end, self.course.total_steps, step - first + self.run.steps_per_epoch)
            for batch in self.loader.epoch(epoch, first, order):
                yield self.course.now(step), batch
                step += 1
                if step == end:
                    break

    def fit(self) -> dict[str, Any]:
        """Train from the current step to the end; returns the final metrics.

        Raises:
            NonFiniteLossError: the loss is not finite; the last checkpoint stays good.
            Stopped: a rank received a signal to stop; all ranks have ended the same step and saved.
        """
        progress = Progress(
            total=self.course.total_steps, done=self.step, batch=self.run.batch, enabled=distributed.is_main()
        )
        before = self.time
        self.stop.has_begun = True
        self.evaluate_if_due(progress)
        with (
            contextlib.closing(progress),
            instruments(
                anomaly=self.anomaly, profile_to=self.profile_to, parts=parts_of_a_step(self), device=self.device
            ) as profile,
        ):
            for now, batch in self.batches():
                progress.computing()
                self.optimisation.prepare(now, None if now.epoch is not None else self.course.phase(now.step).lr_factor)
                self.method.train()
                self.method.before_step(now, self.images)
                where = f"step {now.step + 1} ({self.course.described(now)})"
                with refused_at(where), self.losses.watching() as held:
                    outputs = self._forward_and_backward(batch, now)
                values = self._averaged(outputs, where, held)
                distributed.mean_gradients(self.optimisation.parameters)
                self.optimisation.step(now)
                self.method.after_step(now)
                if now.last_of_phase:
                    self.method.after_phase(now)
                self.step += 1
                self.time = {
                    "steps": before["steps"] + self.step - progress.first,
                    "seconds": before["seconds"] + progress.seconds_of_training(),
                }
                if profile is not None:
                    profile.step()

                last = self.step == self.course.total_steps
                # The epoch that ends with this step, if any.
                ended = now.epoch if now.step_in_epoch == self.run.steps_per_epoch - 1 else None
                phase_over = now.epoch is None and now.last_of_phase
                saving = self.save_every_steps and self.step % self.save_every_steps == 0
                due = last or (now.step + 1) % self.log_every_steps == 0
                if due or ended is not None or phase_over or saving or self.losses.stop:
                    self.losses.settle()
                stopping = self.losses.stop  # some rank received a signal: all stop now
                self.recording.log_step(
                    now, values, progress, numbers=self.losses.numbers, lr=self.optimisation.lr, due=due
                )
                if ended is not None:
                    self.recording.log_epoch(self.step, ended, progress)
                if phase_over:
                    progress.say(
                        f"{now.phase.capitalize()} finished: {amount(now.step_in_phase + 1, 'step')}. Training starts"
                        " with epoch 1."
                    )
                    self.recording.epoch_sums.clear()
                if last or phase_over or (ended is not None and (ended + 1) % self.eval_every_epochs == 0):
                    self.evaluation_due = "end" if last else "epoch"
                milestone = ended is not None and ended + 1 in self.milestone_epochs
                if (
                    last
                    or stopping
                    or phase_over
                    or milestone
                    or self.evaluation_due is not None  # an evaluation may end the process, so save first
                    or (ended is not None and (ended + 1) % self.save_every_epochs == 0)
                    or saving
                ):
                    self.save(milestone=milestone)
                if stopping and not last:
                    raise Stopped(f"after step {self.step} of {self.course.total_steps}", self.stop.signum)
                self.evaluate_if_due(progress)
            for line in profile.lines() if profile is not None else ():
                progress.say(f"caco: {line}")
        # Over all processes that made the run, because the last one may have had no step left to make.
        timed = self.time["steps"] > 0
        failed = self.recording.failed_evaluations
        return {
            **self.recording.latest,
            "steps": self.step,
            "epochs": self.course.epochs_done(self.step),
            **({"failed_evaluations": failed} if failed else {}),
            **({"images_per_second": self.time["steps"] * self.run.batch / self.time["seconds"]} if timed else {}),
        }

    def _forward_and_backward(self, batch: Batch, now: Now) -> Outputs:
        """The batch's loss and metrics. Leaves gradients in the parameters, and in the bank what its update needs."""
        parts: list[Outputs] = []
        for part in batch.parts(self.accumulate):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                outputs = self.method(part, now)
            (outputs.loss / self.accumulate).backward()
            parts.append(Outputs(outputs.loss.detach(), outputs.metrics, outputs.embedding))
        loss = torch.stack([part.loss for part in parts]).mean()
        metrics = {name: torch.stack([part.metrics[name] for part in parts]).mean() for name in parts[0].metrics}
        embeddings = [part.embedding.detach() for part in parts if part.embedding is not None]
        return Outputs(loss, metrics | self.signs.of_step(torch.cat(embeddings) if embeddings else None))

    def _averaged(self, outputs: Outputs, where: str, held: list[Held]) -> dict[str, torch.Tensor]:
        """Loss and metrics as means over the ranks, from one all-reduce that also takes "stop", the share of ranks to
        stop. `losses` looks at them in their turn; the ranks share these means, so all raise or stop together.
        """
        names = ["loss", *outputs.metrics, "stop"]
        stop = torch.full((), float(self.stop.requested()), dtype=torch.float64, device=self.device)
        together = torch.stack([outputs.loss.detach().double(), *(v.double() for v in outputs.metrics.values()), stop])
        together = distributed.sum_(together) / distributed.world()
        self.losses.add(names, together, where, held)
        return dict(zip(names[:-1], together[:-1], strict=True))

    def evaluate_if_due(self, progress: Progress) -> None:
        """Run the evaluators that are due on the backbone. A collective. If an evaluator fails, this is reported, and
        the training goes on.
        """
        if self.evaluation_due is None:
            return
        failed = functools.partial(self.recording.log_failed_evaluation, self.step, progress=progress)
        with progress.pause():
            results = self.evaluation.run(self.method.backbone, self.evaluation_due, failed)
        self.evaluation_due = None
        if results:
            self.recording.log_evaluation(self.step, results, progress)

    # The state.

    def _name_of_backbone(self) -> str:
        """The name of the evaluated backbone among the method's parts, for the checkpoint: in DINO it is the
        teacher's.
        """
        return next(
            (name for name, module in self.method.named_modules() if module is self.method.backbone), "encoder.backbone"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on. A collective, which gathers the bank's shards."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "version": 1,
            "config_hash": self.config_hash,
            "data_digest": self.data_digest,
            "step": self.step,
            "place": self.course.place(self.step),  # follows from the step, but is easier to read
            "evaluation_due": self.evaluation_due,
            "has_warned": self.recording.has_warned,
            "failed_evaluations": list(self.recording.failed_evaluations),
            "time": dict(self.time),
            "method": self.method.state_dict(),
            "backbone": self._name_of_backbone(),
            "optimizer": self.optimisation.optimizer.state_dict(),
            "epoch_sums": dict(self.recording.epoch_sums),
            "latest": dict(self.recording.latest),
            "random": distributed.all_objects(random),
            "tracker": self.recording.tracker.state_dict() if distributed.is_main() else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of this run.

        Raises:
            UserError: the checkpoint is of another configuration, or of other data.
        """
        if state["config_hash"] != self.config_hash:
            raise UserError(
                f"expected a checkpoint of configuration {self.config_hash}; got one of {state['config_hash']}"
            )
        if state["data_digest"] != self.data_digest:
            raise UserError(
                f"expected a checkpoint made with these data (digest {self.data_digest}); got one made with other data "
                f"(digest {state['data_digest']}): point data.root to those, or choose another hydra.run.dir"
            )
        self.step = state["step"]
        assert state["place"] == self.course.place(self.step), "the same data and configuration give the same steps"
        self.evaluation_due, self.recording.has_warned = state["evaluation_due"], state["has_warned"]
        # Checkpoints of earlier versions lack these two.
        self.time, self.recording.failed_evaluations = (
            dict(state.get("time", self.time)),
            list(state.get("failed_evaluations", [])),
        )
        self.method.load_state_dict(state["method"])
        self.optimisation.optimizer.load_state_dict(state["optimizer"])
        self.recording.epoch_sums, self.recording.latest = dict(state["epoch_sums"]), dict(state["latest"])
        if len(state["random"]) == distributed.world():  # with another number of ranks no saved state fits
            random = state["random"][distributed.rank()]
            torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda" and "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], self.device)

    def save(self, *, milestone: bool = False) -> None:
        with doing(f"saving step {self.step} below {self.checkpoints.directory}"):
            state = self.state_dict()
            if distributed.is_main():
                self.checkpoints.save(state, self.step, milestone=milestone)
            distributed.barrier()
