"""The bank with one row for each training image: a running mean of the image's embeddings, found by the image's index
(InstDisc, PIRL, CMC).
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import devices
from caco.banks import noise, scoring
from caco.banks.base import Bank
from caco.banks.reweighted import Objective
from caco.banks.rows import Norms, Rows
from caco.errors import UserError
from caco.ranges import Layers, Seed, Several, ShareBelowOne, Width, held
from caco.schedules import RunShape, Table, constant


class ImageBank(nn.Module, Bank):
    """N rows, of which row V_i belongs to image i: V_i <- n(m V_i + (1 - m) v_i) once an optimiser step, where v_i is
    the image's embedding and n(x) = x / |x|. Products with queries take the rows as they are stored.

    Until a row is written for the first time it is as it was drawn, and its norm may differ from 1. From then on it is
    a unit vector.

    Args:
        size: number of rows N, one for each training image; null in a configuration stands for that number.
        dim: width D of the embedding.
        seed: of the random rows that the bank starts with.
        momentum: m, the share of the old row that is kept.
        norms: how the random rows are drawn, see `rows.random_rows`: "uniform" as InstDisc's and CMC's code does,
            "unit" as PIRL's does, or "normal".
        parts: number of embeddings of an image that a row holds side by side, each dim / parts wide and with a norm and
            a normaliser Z of its own. CMC has 2 parts, one for each of its inputs.

    Source: arXiv 1805.01978; rows, their motion and Z as in the published code, lib/NCEAverage.py and
        lib/LinearAverage.py.
    Raises:
        UserError: no size, or a dim that `parts` does not divide.
    """

    by_image = True
    filled_by_keys = False
    default_warm_start_passes = 0

    normaliser: Tensor  # float64 [parts], each part's Z of `contrast`: fixed in the first step, 0 before it

    @held
    def __init__(
        self,
        *,
        size: Several | None,
        dim: Width,
        seed: Seed,
        momentum: ShareBelowOne = 0.5,
        norms: Norms = "uniform",
        parts: Layers = 1,
    ):
        super().__init__()
        if size is None:
            raise UserError(
                "a bank by image needs size, the number of images; in a configuration size=null stands for that number"
            )
        if dim % parts:
            raise UserError(f"bank.parts: expected a divisor of dim, {dim}; got {parts}")
        self.rows = Rows(size=size, dim=dim, seed=seed, learnable=False, norms=norms)
        self.size, self.momentum, self.parts, self.width = size, momentum, parts, dim // parts
        if parts > 1 and norms != "normal":
            with torch.no_grad():  # each part has the norm that `random_rows` gives to a whole row
                drawn = self.rows.weight * parts**0.5
                self.rows.weight.copy_(self._unit(drawn) if norms == "unit" else drawn)
        self.register_buffer("normaliser", torch.zeros(parts, dtype=torch.float64))
        self.normaliser_of_step: dict[int, float] = {}  # part -> Z of the first step, until `update` keeps it
        self._known = devices.Known([0.0] * parts)  # the values of `normaliser`
        self._are_unit = False  # whether all rows have been found to be unit; once they are, they stay so
        self.register_load_state_dict_post_hook(_read_anew)

    def _unit(self, row_PD: Tensor) -> Tensor:
        """The rows with each of their parts scaled to norm 1."""
        return F.normalize(row_PD.unflatten(1, (self.parts, self.width)), dim=2).flatten(1)

    def rates(self, run: RunShape) -> Table:
        """0 for every step: these rows are written, so they have no learning rate."""
        return constant(run, 0.0)

    def fill(self, keys_GD: Tensor, step: int) -> None:
        """Does nothing: a warm start's keys come without the indices of their images, so they cannot become rows."""

    def score(
        self, q_BD: Tensor, positive_B: Tensor, *, temperature: float, extra_BE: Tensor | None = None,
        objective: Objective | None = None, learn: bool = True,
    ) -> scoring.Score:  # fmt: skip
        """The loss of each query, [B], over all N rows and extra columns; see `scoring.score`. The rows take no
        gradient. A collective.

        Args:
            positive_B: int64, the index of each query's image.
            objective: must be None: this bank knows no other loss than InfoNCE.
            learn: ignored, as these rows do not learn; it is part of the contract.
        Raises:
            UserError: the rows have several parts.
        """
        assert objective is None, "no method treats the negatives of a bank by image"
        if self.parts > 1:
            raise UserError(
                "a bank whose rows have several parts can be contrasted with drawn rows only; expected"
                " method.num_noise=NUMBER, got null"
            )
        # The fused kernels normalise the rows themselves. Once all rows are unit, that differs from taking the rows as
        # stored by no more than the rounding of a norm, so the kernels may serve.
        return scoring.score(
            q_BD, self.rows.weight, positive_B, first_row=self.rows.first, size=self.size, tau=temperature,
            extra_BE=extra_BE,
            as_stored=not self._all_unit(),
        )  # fmt: skip

    def _all_unit(self) -> bool:
        """Whether every row is a unit vector. The host waits for a GPU here until all rows are, which is once each
        image has been seen.
        """
        if not (self._are_unit and devices.runs_ahead(self.rows.weight.device)):
            self._are_unit = self.rows.are_unit()
        return self._are_unit

    def contrast(
        self,
        q_BD: Tensor,
        image_B: Tensor,
        *,
        temperature: float,
        num_noise: int,
        stream: int,
        form: Literal["nce", "softmax"] = "nce",
        epsilon: float = 1e-7,
        part: int = 0,
    ) -> noise.Contrast:
        """The loss of each query against its image's row and `num_noise` drawn rows, or against one part of these rows;
        see `noise.contrast`. A collective.

        With form "nce" the first call of the first step estimates Z for the part: N times the mean of exp(q.V_j / tau)
        over all ranks' queries, each with its own image's row and its drawn ones. The step's `update` keeps this Z.

        Args:
            q_BD: unit queries, D the width of one part.
            image_B: int64, the index of each query's image.
            temperature: tau.
            num_noise: rows drawn for each image.
            stream: what the draws depend on besides the image.
            form: the loss, "nce" or "softmax".
            epsilon: added to the denominators of "nce".
            part: which of the rows' parts the queries are compared with, counted from 0.
        """
        w_RD = self.rows.weight.detach()[:, part * self.width : (part + 1) * self.width]
        where = noise.Draw(self.rows.first, self.size, temperature, num_noise, stream)
        known = self._known.of(self.normaliser, Tensor.tolist)
        normaliser = known[part] or self.normaliser_of_step.get(part, 0.0)
        if form == "nce" and not normaliser:
            self.normaliser_of_step[part] = normaliser = self.size * noise.mean_exponential(q_BD, w_RD, image_B, where)
        return noise.contrast(q_BD, w_RD, image_B, where, form=form, normaliser=normaliser or 1.0, epsilon=epsilon)

    def statistics(self) -> dict[str, float]:
        """The values of `Rows.statistics` since the last call, and the normaliser Z as "normaliser"; with several parts
        as "normaliser_1", "normaliser_2" and so on.
        """
        names = ["normaliser"] if self.parts == 1 else [f"normaliser_{number + 1}" for number in range(self.parts)]
        return self.rows.statistics() | dict(zip(names, self.normaliser.tolist(), strict=True))

    @torch.no_grad()
    def update(self, *, lr: float, keys_GD: Tensor, index_G: Tensor | None = None) -> None:
        """Move the rows of these images towards the images' keys. Where an image has several keys, the last one counts.

        Args:
            lr: ignored, as these rows have no learning rate; it is part of the contract.
            keys_GD: all ranks' unit embeddings; with several parts, the parts side by side.
            index_G: int64, the index of each key's image, for all ranks' keys.
        Raises:
            UserError: no `index_G`: the method keeps nothing by image.
        """
        if index_G is None:
            raise UserError(
                "a bank by image is updated by the images' indices, which this method does not pass to it; expected"
                " method=instdisc, pirl or cmc"
            )
        local_G = index_G - self.rows.first
        own_G = (local_G >= 0) & (local_G < len(self.rows.weight))
        place_G = torch.arange(len(own_G), device=own_G.device)
        if len(self.rows.weight) < self.size:  # a key of another rank's row writes what the last key of an own row does
            last = len(own_G) - 1 - own_G.flip(0).byte().argmax(0, keepdim=True)
            source_G = torch.where(own_G, place_G, last)
            local_G, keys_GD = local_G[source_G].clamp(0, len(self.rows.weight) - 1), keys_GD[source_G]
        sorted_G, order_G = local_G.sort(stable=True)
        last_G = order_G[torch.searchsorted(sorted_G, local_G, right=True) - 1]  # of the keys of each key's image
        keys_GD = keys_GD[last_G].to(self.rows.weight.dtype)
        old_GD = self.rows.weight[local_G]
        moved_GD = self._unit(old_GD.mul(self.momentum).add(keys_GD, alpha=1 - self.momentum))
        # All keys of one image write the same row.
        self.rows.weight[local_G] = torch.where(own_G.any(), moved_GD, old_GD)
        known = list(self._known.of(self.normaliser, Tensor.tolist))
        for part, normaliser in self.normaliser_of_step.items():
            self.normaliser[part] = known[part] = normaliser
        self._known.note(self.normaliser, known)
        self.normaliser_of_step.clear()


def _read_anew(bank: ImageBank, _: object) -> None:
    bank._known.forget()
    bank._are_unit = False
