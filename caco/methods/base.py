"""The contract between a method and the Trainer, and nothing else.

The Trainer knows steps, precision, the optimiser, cadence and saving. Everything that has a method's word in it (bank,
twin, teacher, centre, queue, temperature, prototypes) is the method's, behind the members of `Method`. A method that
nobody here wrote is a class that derives from it and defines `forward`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor, nn

from caco.data.loaders.batches import Batch
from caco.data.loaders.images import Images
from caco.methods import diagnostics
from caco.schedules import RunShape, Table

TRAINING = "training"  # the phase that the epochs are


@dataclass(frozen=True)
class Needs:
    """What a method needs of a batch and of the images; read before anything is built and by the Trainer.

    A class that says it in plain keywords, as `needs = Needs(patches="shuffled")`, is read without being imported, so
    that views which do not fit are refused at once; an instance may add to it.

    whole_batch: the images of a batch meet one another in the loss, so that cutting it into parts (`accumulate`) would
    change it. indices: something is kept for each training image, found by the batch's `index`; the constructor is
    given `num_images`, how many
        these are. (An unreadable image's stand-in has the other image's index, so that an image may be twice in a
        batch.)
    patches: whether one view of an image is cut into patches, and whether they come row by row or in a random order;
        "none" refuses them.
    num_patches: how many of an image; None: any square number.
    lightness_first: the first channel is lightness, the two others colour (Lab, YDbDr, YCbCr), of images that have
    some.
    """

    whole_batch: bool = False
    indices: bool = False
    patches: Literal["none", "row by row", "shuffled"] = "none"
    num_patches: int | None = None
    lightness_first: bool = False


@dataclass(frozen=True)
class Phase:
    """A part of a run. The last one is the training, whose steps are the epochs'.

    Args:
        name: shown to people and in the record.
        steps: how many; None for the training alone.
        values: of the method's schedules, constant in this phase; the training's come from `Method.schedules`.
        lr_factor: of the optimiser's rates, constant in this phase; the training's is the configured schedule's.
    """

    name: str
    steps: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    lr_factor: float = 1.0


@dataclass(frozen=True)
class Now:
    """Where a run is, and this step's value of each of the method's schedules: `now["bank_lr"]`.

    Args:
        step: of the run, counted from 0.
        phase: its name.
        step_in_phase: counted from 0.
        last_of_phase: whether the phase ends with this step.
        epoch, step_in_epoch: counted from 0; None before the training.
        values: name -> value.
        lr: the optimiser's rate, for what moves beside it as its parameters do (PIC's class weights).
    """

    step: int
    phase: str
    step_in_phase: int
    last_of_phase: bool
    epoch: int | None
    step_in_epoch: int | None
    values: Mapping[str, float]
    lr: float = 0.0

    def __getitem__(self, name: str) -> float:
        return self.values[name]


@dataclass(frozen=True)
class Costs:
    """What a step takes beside the encoders' own arithmetic; for `caco.plan`.

    Args:
        encoded, followed: views that an encoder with gradient embeds, and a twin without.
        terms: of the loss, each a row of logits a query.
        bank_terms: of these over the bank's rows; searches, lookups: passes of all keys over the bank for a row, and
            for its vector.
        sums: of exponentials over the rows that a bank term's loss has where it is another than InfoNCE, else 0;
            left_out: whether each query leaves one row out of them, which PyTorch does, in blocks, and no kernel.
        candidates: rows that each query of a bank term looks for, drawn: of these, to make further negatives of them,
            synthetic: so many.
        columns_per_image: of a term, for each image of the global batch, beyond the bank's; columns: whatever the
            batch.
        drawn_terms, drawn_rows: terms that meet, instead of all rows of the bank, so many that are drawn for a query.
        gathers, gathers_with_gradient: of one embedding of all ranks' images.
        prototypes: columns of the scores that each encoded view has.
        matrices: of products of all images' embeddings, D x D, that the loss takes.
        summed_bytes: of what the ranks add up besides gradients and BatchNorm.
        pass_bytes: for each of a device's images of the training set, in a pass over all of them (SeLa).
        together: whether the views of one size go through the backbone at once, and all through the projector.
        patch_network: from patches [B, P, 3, h, w] to what the loss takes of them, with gradient; None where there are
            none. plan runs it.
    """

    encoded: list[int]
    followed: list[int] = field(default_factory=list)
    terms: int = 1
    bank_terms: int = 0
    searches: int = 0
    lookups: int = 0
    sums: int = 0
    left_out: bool = False
    candidates: int = 0
    drawn: int = 0
    synthetic: int = 0
    columns_per_image: int = 0
    columns: int = 0
    drawn_terms: int = 0
    drawn_rows: int = 0
    gathers: int = 0
    gathers_with_gradient: int = 0
    prototypes: int = 0
    matrices: int = 0
    summed_bytes: int = 0
    pass_bytes: int = 0
    together: bool = False
    patch_network: nn.Module | None = None


class Outputs(NamedTuple):
    loss: Tensor  # scalar, this rank's part; the ranks' mean is the batch's loss
    metrics: dict[str, Tensor]  # scalars without gradient
    embedding: Tensor | None = (
        None  # [B, D] of the first view, by the encoder that learns, of any norm: signs of collapse are read there
    )


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimiser treats alike.

    Args:
        rate: a factor on the scheduled learning rate; or the name of a schedule whose value takes the place of its
            factor.
        decay: whether weight decay applies (where the optimiser excludes biases and norms, to the others).
        decay_one_dimensional: whether it applies to biases and norms too, where the optimiser does not exclude them
            (not in DINO).
        frozen_steps: at the run's start, in which they do not move.
        frozen_epochs: so, in epochs of the training (DINO's last layer).
    """

    parameters: list[nn.Parameter]
    rate: float | str = 1.0
    decay: bool = True
    decay_one_dimensional: bool = True
    frozen_steps: int = 0
    frozen_epochs: int = 0


class Method(nn.Module):
    """What the Trainer trains. Subclasses define `forward` and `backbone`; every other member has a default.

    All of a method's state that a step changes is in parameters and buffers, so that a checkpoint holds it.
    """

    needs = Needs()
    backbone: nn.Module  # what evaluators and exports see
    against_collapse = "a lower optimizer.lr, a longer warm-up (schedule.warmup_epochs)"  # what helps, for `warning`

    def phases(self, run: RunShape) -> list[Phase]:
        """The parts of a run, in order; the training is the last."""
        return [Phase(TRAINING)]

    def schedules(self, run: RunShape) -> dict[str, Table]:
        """Name -> one number for each step of the training, such as {"twin_momentum": cosine(run, 0.99, 1.0)}. All are
        logged.
        """
        return {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """What the optimiser moves: by default all that takes a gradient, alike."""
        return [ParameterGroup([p for p in self.parameters() if p.requires_grad])]

    def order(self, epoch: int) -> np.ndarray | None:
        """The images of an epoch, int64, in an order of the method's own, the same on every rank; None: the
        loader's.
        """
        return None

    def before_epoch(self, now: Now, images: Images) -> None:
        """Before the first step of an epoch, and not again when a run goes on in the middle of it."""

    def before_step(self, now: Now, images: Images) -> None:
        """Before the forward pass: a twin that moves before the keys are computed, labels made anew in the middle of an
        epoch.
        """

    def forward(self, batch: Batch, now: Now) -> Outputs:
        """The loss of a batch (or of a part of it, see `needs.whole_batch`) and named scalars. Changes nothing but
        statistics.
        """
        raise NotImplementedError

    def after_step(self, now: Now) -> None:
        """After the optimiser's step: bank, queue, centre, a twin that moves after. Only a finite loss is followed by
        it; on a GPU one step with another may be, before the run ends (caco/engine/losses.py).
        """

    def after_phase(self, now: Now) -> None:
        """After the last step of a phase: the twin becomes a copy at the end of a warm start."""

    def overwritten(self) -> set[str]:
        """Parts, by the names of children, that the run fills before it uses what they hold: weights from elsewhere
        leave them out.
        """
        return set()

    def statistics(self) -> dict[str, float]:
        """Once an epoch, of what has happened since the last call. A collective."""
        return {}

    def warning(self, statistics: Mapping[str, Any]) -> str | None:
        """What an epoch's values say of a training that has collapsed, and what helps; None where nothing is wrong.

        Args:
            statistics: those of `statistics`, and the epoch's means of loss, metrics and signs of collapse.
        """
        return diagnostics.collapse(statistics, self.against_collapse)

    def costs(self, sizes: list[int]) -> Costs:
        """Of a step on views of these sizes, in pixels; by default every view is encoded once."""
        return Costs(list(range(len(sizes))))
