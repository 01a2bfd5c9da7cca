"""The training loop, written to be read from top to bottom.

The order in a step: rates, before_step, forward, backward, check that the loss is finite (on a GPU the loss of the step
before, see caco/engine/losses.py), optimiser, after_step, log, save, evaluate.
"""

import contextlib
import traceback
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
from caco.engine.instruments import instruments, parts_of_a_step
from caco.engine.losses import Losses, refused_at
from caco.engine.optimizers import Optimisation
from caco.engine.preemption import Stop, Stopped
from caco.engine.progress import Progress
from caco.errors import UserError, is_for_user
from caco.evals.evaluation import Evaluation
from caco.methods.base import Method, Now, Outputs, Phase
from caco.methods.diagnostics import Signs
from caco.runs.checkpoint import Checkpoints
from caco.saying import amount, clock, doing
from caco.schedules import RunShape
from caco.tracking.base import Row, Tracker


class Trainer:
    """Trains a method on the batches of a loader. Owns the step counter, the rates, the precision, the intervals of
    logging, saving and evaluation, and the run's state.

    Steps are numbered from 0 over the whole run. Those of a method's earlier phases (a warm start) come first; epoch 0
    follows them.

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
        self.evaluation, self.tracker, self.checkpoints = evaluation, tracker, checkpoints
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
        self.phases = method.phases(run)
        self.tables = {name: run.placed(table) for name, table in method.schedules(run.of_schedules()).items()}
        self._check_phases()
        self.first_step = [
            sum(phase.steps or 0 for phase in self.phases[:number]) for number in range(len(self.phases))
        ]
        self.training_starts = self.first_step[-1]
        self.total_steps = self.training_starts + run.steps
        if max_steps is not None:
            self.total_steps = min(self.total_steps, max_steps)

        self.step, self.signs, self.losses = 0, Signs(), Losses(device)
        self.epoch_sums: dict[str, torch.Tensor] = {}
        self.latest: dict[str, float] = {}  # the newest value of each metric of an epoch or an evaluation
        # Saved before the evaluation is made, so that a run that goes on makes it.
        self.evaluation_due: Literal["epoch", "end"] | None = "epoch"
        self.failed_evaluations: list[dict[str, Any]] = []  # each with its evaluator, step and message
        self.has_warned = False
        self.time = {"steps": 0, "seconds": 0.0}  # of all timed steps, over all processes that made the run
        torch.manual_seed(seed * 1_000_003 + distributed.rank())  # for dropout and the like, from now on

    # Where a step lies.

    def _check_phases(self) -> None:
        """Check that the phases and schedules of a method fit together, before anything starts."""
        *earlier, last = self.phases
        assert last.steps is None and all(phase.steps for phase in earlier), "the training is the last phase"
        for phase in earlier:
            assert phase.values.keys() == self.tables.keys(), f"{phase.name}: one value of each schedule"
        for name, table in self.tables.items():
            assert len(table) == self.run.steps, f"{name}: one number for each step of the training"

    def phase(self, step: int) -> Phase:
        return self.phases[max(number for number, first in enumerate(self.first_step) if first <= step)]

    def now(self, step: int) -> Now:
        """Phase, epoch, schedule values and learning rate of step number `step`, counted from 0."""
        phase = self.phase(step)
        in_phase = step - self.first_step[self.phases.index(phase)]
        if phase.steps is not None:
            lr = self.optimisation.rate(0, phase.lr_factor)
            return Now(step, phase.name, in_phase, in_phase + 1 == phase.steps, None, None, phase.values, lr)
        epoch, in_epoch = divmod(in_phase, self.run.steps_per_epoch)
        values = {name: table[in_phase] for name, table in self.tables.items()}
        lr = self.optimisation.rate(in_phase, None)
        return Now(step, phase.name, in_phase, in_phase + 1 == self.run.steps, epoch, in_epoch, values, lr)

    def described(self, now: Now) -> str:
        """The place of a step in words."""
        if now.epoch is None or now.step_in_epoch is None:
            return f"{now.phase}, step {now.step_in_phase + 1} of {self.phase(now.step).steps}"
        return f"epoch {now.epoch + 1} of {self.run.epochs}, step {now.step_in_epoch + 1} of {self.run.steps_per_epoch}"

    def batches(self) -> Iterator[tuple[Now, Batch]]:
        """The batches from the current step to the end of the run, each with its place."""
        step = self.step
        while step < self.total_steps:
            now = self.now(step)
            order: np.ndarray | None = None
            if now.epoch is None or now.step_in_epoch is None:
                # A phase outside the epochs uses negative numbers, whose image orders and augmentations no epoch has.
                passes, first = divmod(step, self.run.steps_per_epoch)
                epoch, end = -1 - passes, self.training_starts
            else:
                epoch, first, end = now.epoch, now.step_in_epoch, self.total_steps
                if first == 0:
                    self.method.before_epoch(now, self.images)
                order = self.method.order(epoch)
            end = min(end, self.total_steps, step - first + self.run.steps_per_epoch)
            for batch in self.loader.epoch(epoch, first, order):
                yield self.now(step), batch
                step += 1
                if step == end:
                    break

    # The loop.

    def fit(self) -> dict[str, Any]:
        """Train from the current step to the end; returns the final metrics.

        Raises:
            NonFiniteLossError: the loss is not finite; the last checkpoint stays good.
            Stopped: a rank received a signal to stop; all ranks have ended the same step and saved.
        """
        progress = Progress(total=self.total_steps, done=self.step, batch=self.run.batch, enabled=distributed.is_main())
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
                self.optimisation.prepare(now, None if now.epoch is not None else self.phase(now.step).lr_factor)
                self.method.train()
                self.method.before_step(now, self.images)
                where = f"step {now.step + 1} ({self.described(now)})"
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

                last = self.step == self.total_steps
                # The epoch that ends with this step, if any.
                ended = now.epoch if now.step_in_epoch == self.run.steps_per_epoch - 1 else None
                phase_over = now.epoch is None and now.last_of_phase
                saving = self.save_every_steps and self.step % self.save_every_steps == 0
                due = last or (now.step + 1) % self.log_every_steps == 0
                if due or ended is not None or phase_over or saving or self.losses.stop:
                    self.losses.settle()
                stopping = self.losses.stop  # some rank received a signal: all stop now
                self._log(now, values, progress, due)
                if ended is not None:
                    self._log_epoch(ended, progress)
                if phase_over:
                    progress.say(
                        f"{now.phase.capitalize()} finished: {amount(now.step_in_phase + 1, 'step')}. Training starts"
                        " with epoch 1."
                    )
                    self.epoch_sums.clear()
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
                    raise Stopped(f"after step {self.step} of {self.total_steps}", self.stop.signum)
                self.evaluate_if_due(progress)
            for line in profile.lines() if profile is not None else ():
                progress.say(f"caco: {line}")
        # Over all processes that made the run, because the last one may have had no step left to make.
        timed = self.time["steps"] > 0
        return {
            **self.latest,
            "steps": self.step,
            "epochs": self.epochs_done(),
            **({"failed_evaluations": self.failed_evaluations} if self.failed_evaluations else {}),
            **({"images_per_second": self.time["steps"] * self.run.batch / self.time["seconds"]} if timed else {}),
        }

    def epochs_done(self) -> float:
        return max(0, self.step - self.training_starts) / self.run.steps_per_epoch

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

    # What is written down.

    def _record(self, row: Row, kind: str) -> None:
        if distributed.is_main():
            self.tracker.log(self.step, row, kind=kind)

    def _log(self, now: Now, values: dict[str, torch.Tensor], progress: Progress, due: bool) -> None:
        for name, value in values.items():
            self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + value
        self.epoch_sums["count"] = self.epoch_sums.get("count", 0.0) + torch.ones((), dtype=torch.float64)
        newest = self.losses.numbers.get("loss")
        progress.step(self.step, self.described(now), newest if due or progress.bar is None else None)
        if due:
            row = {
                **({} if now.epoch is None else {"epoch": now.epoch}),
                **self.losses.numbers,
                "lr": self.optimisation.lr,
                **now.values,
                "images_per_second": progress.images_per_second(self.step),
            }
            self._record(row, "train" if now.epoch is not None else now.phase.replace(" ", "_"))

    def _log_epoch(self, epoch: int, progress: Progress) -> None:
        count = self.epoch_sums.pop("count").item()
        row = (
            {name: value.item() / count for name, value in self.epoch_sums.items()}
            | self.method.statistics()
            | self.signs.of_epoch()
        )
        self.epoch_sums.clear()
        self.latest |= row
        self._record({"epoch": epoch, **row}, "epoch")
        if not self.has_warned and (warning := self.method.warning(row)):
            self.has_warned = True
            progress.say(f"caco: warning: after epoch {epoch + 1} of {self.run.epochs}: {warning}")
            self._record({"epoch": epoch, "message": warning}, "warning")

    def evaluate_if_due(self, progress: Progress) -> None:
        """Run the evaluators that are due on the backbone; accuracies are in percent. A collective. If an evaluator
        fails, this is reported, and the training goes on.
        """
        if self.evaluation_due is None:
            return
        # The phase that has just ended, such as a warm start; None after an epoch.
        ended = next(
            (p for p, first in zip(self.phases, self.first_step[1:], strict=False) if first == self.step), None
        )
        after = (
            f"the {ended.name}" if ended else f"{round(self.epochs_done(), 2):g} of {amount(self.run.epochs, 'epoch')}"
        )

        def failed(name: str, error: Exception) -> None:
            if distributed.is_main() and not is_for_user(error):
                traceback.print_exception(error)
            message = f"eval.{name} failed after {after}: {str(error) or type(error).__name__}"
            self.failed_evaluations.append({"evaluator": name, "step": self.step, "message": message})
            progress.say(f"caco: {message}")
            self._record({"epochs": self.epochs_done(), "message": message}, "warning")

        with progress.pause():
            results = self.evaluation.run(self.method.backbone, self.evaluation_due, failed)
        self.evaluation_due = None
        if results:
            self.latest |= results
            self._record({"epochs": self.epochs_done(), **({"phase": ended.name} if ended else {}), **results}, "eval")
            shown = ", ".join(f"{name} {value:.2f}" for name, value in results.items())
            progress.say(f"after {after} ({clock(progress.elapsed())}): {shown}")

    def place(self, step: int) -> list[str | int | None]:
        """The place of a step: phase, step in the phase, epoch, step in the epoch."""
        now = self.now(min(step, self.training_starts + self.run.steps - 1))
        return [now.phase, now.step_in_phase, now.epoch, now.step_in_epoch]

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
            "place": self.place(self.step),  # follows from the step, but is easier to read
            "evaluation_due": self.evaluation_due,
            "has_warned": self.has_warned,
            "failed_evaluations": list(self.failed_evaluations),
            "time": dict(self.time),
            "method": self.method.state_dict(),
            "backbone": self._name_of_backbone(),
            "optimizer": self.optimisation.optimizer.state_dict(),
            "epoch_sums": dict(self.epoch_sums),
            "latest": dict(self.latest),
            "random": distributed.all_objects(random),
            "tracker": self.tracker.state_dict() if distributed.is_main() else {},
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
        assert state["place"] == self.place(self.step), "the same data and configuration give the same steps"
        self.evaluation_due, self.has_warned = state["evaluation_due"], state["has_warned"]
        # Checkpoints of earlier versions lack these two.
        self.time, self.failed_evaluations = (
            dict(state.get("time", self.time)),
            list(state.get("failed_evaluations", [])),
        )
        self.method.load_state_dict(state["method"])
        self.optimisation.optimizer.load_state_dict(state["optimizer"])
        self.epoch_sums, self.latest = dict(state["epoch_sums"]), dict(state["latest"])
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
