"""The contract between a method and the Trainer, and nothing else.

The Trainer is responsible for steps, precision, the optimiser, logging intervals and saving. Everything particular to a
method (bank, twin, teacher, centre, queue, temperature, prototypes) belongs to the method, and the Trainer reaches it
only through the members of `Method`. A method of your own is a class that derives from `Method` and defines `forward`.
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

TRAINING = "training"  # name of the phase that consists of the epochs


@dataclass(frozen=True)
class Needs:
    """What a method needs of its batches and images. The validation reads it before anything is built, and so does the
    Trainer.

    A class that writes it in plain keywords, as `needs = Needs(patches="shuffled")`, is read without being imported, so
    that unfit views are refused at once. An instance may add further needs.

    whole_batch: the loss compares the images of a batch with one another, so cutting the batch into parts
        (`accumulate`) would change the loss.
    indices: the method keeps something for each training image, found by the batch's `index`. Its constructor is then
        given `num_images`, the number of training images. (An unreadable image is replaced by another image with that
        one's index, so an index may occur twice in a batch.)
    patches: whether one view of each image is cut into patches, and whether the patches come row by row or in a random
        order; "none" refuses patches.
    num_patches: the number of patches of an image; None: any square number.
    lightness_first: the images' first channel must be lightness and the two others colour (Lab, YDbDr, YCbCr).
    classes: each training image must have a label below this number; None: labels are not looked at. Only a study of
        what labels would be worth sets it.
    """

    whole_batch: bool = False
    indices: bool = False
    patches: Literal["none", "row by row", "shuffled"] = "none"
    num_patches: int | None = None
    lightness_first: bool = False
    classes: int | None = None


@dataclass(frozen=True)
class Phase:
    """A part of a run. The last phase is the training, which consists of the epochs.

    Args:
        name: shown to users and written to the ledger.
        steps: number of steps; None for the training, and only for it.
        values: the values of the method's schedules, constant in this phase; in the training they come from
            `Method.schedules`.
        lr_factor: a factor on the optimiser's learning rates, constant in this phase; in the training the configured
            schedule gives it.
    """

    name: str
    steps: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    lr_factor: float = 1.0


@dataclass(frozen=True)
class Now:
    """The place of a step in the run, and this step's value of each of the method's schedules: `now["bank_lr"]`.

    Args:
        step: of the run, counted from 0.
        phase: name of the phase.
        step_in_phase: counted from 0.
        last_of_phase: whether the phase ends with this step.
        epoch, step_in_epoch: counted from 0; None before the training.
        values: schedule's name -> its value.
        lr: the optimiser's learning rate, for a part that the method itself moves at that rate (PIC's class weights).
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
    """What a step computes, holds and sends beside the encoders' own arithmetic. `caco.plan` estimates time and memory
    from it.

    Args:
        encoded: the views that an encoder embeds with gradient.
        followed: the views that a twin embeds without gradient.
        terms: number of terms in the loss; each has one row of logits for every query.
        bank_terms: how many of these terms have the bank's rows among their logits.
        searches: how many times all keys of a view search the bank for a row.
        lookups: how many times all keys of a view fetch a row's vector from the bank.
        sums: number of sums of exponentials over the rows in a bank term of a loss other than InfoNCE; 0 for InfoNCE.
        left_out: whether each query leaves one row out of these sums; no kernel can do that, so PyTorch does, in
            blocks.
        candidates: number of nearest rows that each query of a bank term looks for, to make negatives from them.
        drawn: number of draws from these candidates for each query.
        synthetic: number of negatives made from the drawn rows for each query.
        columns_per_image: columns of a term's logits beside the bank's rows, for each image of the global batch.
        columns: columns of a term's logits beside the bank's rows, independent of the batch.
        drawn_terms: number of terms in which a query meets drawn rows instead of all rows of the bank.
        drawn_rows: number of rows that are drawn for a query in such a term.
        gathers: how many times one embedding of each image is gathered from all ranks.
        gathers_with_gradient: how many of these gathers pass a gradient back.
        prototypes: columns of the scores that each encoded view has.
        matrices: number of D x D matrices of products, over all images' embeddings, in the loss.
        summed_bytes: bytes that the ranks sum, beside gradients and BatchNorm statistics.
        pass_bytes: bytes held for each training image of a device in a pass over the whole set (SeLa).
        together: whether views of one size go through the backbone at once, and all views through the projector.
        patch_network: a module from patches [B, P, 3, h, w] to all that the loss takes of them, with gradient;
            `caco.plan` runs it. None where there are no patches.
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
    loss: Tensor  # scalar, the loss of this rank's images; the mean over the ranks is the batch's loss
    metrics: dict[str, Tensor]  # scalars without gradient
    embedding: Tensor | None = (
        None  # [B, D], the learning encoder's embedding of the first view, of any norm; it is watched for collapse
    )


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimiser treats alike.

    Args:
        parameters: the parameters.
        rate: a factor on the scheduled learning rate; or the name of a schedule whose value takes the place of the
            learning-rate schedule's factor.
        decay: whether weight decay applies. An optimiser that excludes biases and norms still excludes them.
        decay_one_dimensional: whether weight decay applies to biases and norms too, if the optimiser does not exclude
            them (DINO: no).
        frozen_steps: number of steps at the start of the run in which the parameters do not move.
        frozen_epochs: number of epochs at the start of the training in which they do not move (DINO's last layer).
    """

    parameters: list[nn.Parameter]
    rate: float | str = 1.0
    decay: bool = True
    decay_one_dimensional: bool = True
    frozen_steps: int = 0
    frozen_epochs: int = 0


class Method(nn.Module):
    """What the Trainer trains. Subclasses define `forward` and `backbone`; every other member has a default.

    All state that a step changes must be in parameters and buffers, so that a checkpoint holds it.
    """

    needs = Needs()
    backbone: nn.Module  # the network that evaluators and exports take
    against_collapse = "a lower optimizer.lr, a longer warm-up (schedule.warmup_epochs)"  # remedies shown by `warning`

    def phases(self, run: RunShape) -> list[Phase]:
        """The phases of a run, in order; the training is the last."""
        return [Phase(TRAINING)]

    def schedules(self, run: RunShape) -> dict[str, Table]:
        """A table with one number for each step of the training, by name, such as
        {"twin_momentum": cosine(run, 0.99, 1.0)}. All of them are logged.
        """
        return {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The parameters that the optimiser moves. By default one group of all that require a gradient."""
        return [ParameterGroup([p for p in self.parameters() if p.requires_grad])]

    def order(self, epoch: int) -> np.ndarray | None:
        """The indices of an epoch's images, int64, in an order that the method chooses, the same on every rank. None
        leaves the order to the loader.
        """
        return None

    def before_epoch(self, now: Now, images: Images) -> None:
        """Called before the first step of an epoch. A run that resumes in the middle of an epoch does not call it
        again.
        """

    def before_step(self, now: Now, images: Images) -> None:
        """Called before the forward pass, for example to move a twin before it computes keys, or to make new labels in
        the middle of an epoch.
        """

    def forward(self, batch: Batch, now: Now) -> Outputs:
        """The loss of a batch, or of a part of it unless `needs.whole_batch`, and named scalars. Nothing but statistics
        may change in it.
        """
        raise NotImplementedError

    def after_step(self, now: Now) -> None:
        """Called after the optimiser's step: a bank, a queue, a centre, or a twin that follows the optimiser's step is
        updated here. The step is made only if the loss is finite; but on a GPU one step may be made with a loss that is
        not, before the run ends (caco/engine/losses.py).
        """

    def after_phase(self, now: Now) -> None:
        """Called after the last step of a phase, for example to make the twin a copy at the end of a warm start."""

    def overwritten(self) -> set[str]:
        """Names of child modules that the run overwrites before it reads them. Weights from a file are not loaded into
        these.
        """
        return set()

    def statistics(self) -> dict[str, float]:
        """Named numbers about the time since the last call; called once an epoch. A collective."""
        return {}

    def warning(self, statistics: Mapping[str, Any]) -> str | None:
        """A warning, with remedies, if an epoch's values show that the training has collapsed; None where nothing is
        wrong.

        Args:
            statistics: the values of `statistics`, and the epoch's means of loss, metrics and signs of collapse.
        """
        return diagnostics.collapse(statistics, self.against_collapse)

    def costs(self, sizes: list[int]) -> Costs:
        """The costs of a step on views of these sizes in pixels. By default every view is encoded once."""
        return Costs(list(range(len(sizes))))
