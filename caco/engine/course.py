"""The course of a run: which phase and epoch each step lies in, and the values of its schedules there."""

from caco.engine.optimizers import Optimisation
from caco.methods.base import Method, Now, Phase
from caco.saying import amount
from caco.schedules import RunShape


class Course:
    """Knows the place of every step of a run.

    Steps are numbered from 0 over the whole run. Those of a method's earlier phases (a warm start) come first; epoch 0
    follows them.

    Args:
        method: whose phases and schedules they are.
        run: epochs, steps of an epoch, global batch.
        optimisation: knows the learning rate of each step.
        max_steps: the number of steps after which to stop (earlier phases included), or None.
    """

    def __init__(self, method: Method, run: RunShape, optimisation: Optimisation, *, max_steps: int | None) -> None:
        self.run, self.optimisation = run, optimisation
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

    def place(self, step: int) -> list[str | int | None]:
        """The place of a step: phase, step in the phase, epoch, step in the epoch."""
        now = self.now(min(step, self.training_starts + self.run.steps - 1))
        return [now.phase, now.step_in_phase, now.epoch, now.step_in_epoch]

    # What is over after a number of steps.

    def epochs_done(self, steps: int) -> float:
        return max(0, steps - self.training_starts) / self.run.steps_per_epoch

    def phase_ended(self, steps: int) -> Phase | None:
        """The phase that has just ended, such as a warm start; None after an epoch."""
        return next((phase for phase, end in zip(self.phases, self.first_step[1:], strict=False) if end == steps), None)

    def done(self, steps: int) -> str:
        """The part of the run that is over, in words."""
        ended = self.phase_ended(steps)
        if ended is not None:
            return f"the {ended.name}"
        return f"{round(self.epochs_done(steps), 2):g} of {amount(self.run.epochs, 'epoch')}"
