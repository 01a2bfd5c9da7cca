"""The bank with a row for each training image, a running mean of its embeddings, written by index (InstDisc, PIRL,
CMC).
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
    """N rows, of which row i is image i's: V_i <- n(m V_i + (1 - m) v_i), once an optimiser step. The rows count as
    they are stored.

    Before they are written for the first time they are as they were drawn, so that their norms may be about 1; then
    they are unit.

    Args:
        size: rows, N; None in a configuration, where it is the number of training images.
        dim: width D of the embedding.
        seed: of the rows as they were drawn.
        momentum: m.
        norms: of the rows as they were drawn, see `rows.random_rows`: "uniform" (InstDisc's and CMC's code), "unit"
            (PIRL's),
            "normal".
        parts: how many embeddings of an image a row holds side by side, each dim / parts wide, with a norm and a Z of
            its own; a bank for each of CMC's inputs.

    Source: arXiv 1805.01978; published code, lib/NCEAverage.py and lib/LinearAverage.py: rows, their motion and Z.
    """

    by_image = True
    filled_by_keys = False
    default_warm_start_passes = 0

    normaliser: Tensor  # of each part Z of `contrast`, of the first step for ever; 0 before it

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
            raise UserError("a bank by image needs size, the number of images; in a configuration null stands for it")
        if dim % parts:
            raise UserError(f"bank.parts: expected a divisor of dim, {dim}; got {parts}")
        self.rows = Rows(size=size, dim=dim, seed=seed, learnable=False, norms=norms)
        self.size, self.momentum, self.parts, self.width = size, momentum, parts, dim // parts
        if parts > 1 and norms != "normal":
            with torch.no_grad():  # norms are a part's, not a row's
                drawn = self.rows.weight * parts**0.5
                self.rows.weight.copy_(self._unit(drawn) if norms == "unit" else drawn)
        self.register_buffer("normaliser", torch.zeros(parts, dtype=torch.float64))
        self.normaliser_of_step: dict[int, float] = {}  # by part, of the first step, until `update` keeps it
        self._known = devices.Known([0.0] * parts)  # `normaliser`
        self._are_unit = False  # whether the rows were found to be: then they stay it
        self.register_load_state_dict_post_hook(_read_anew)

    def _unit(self, row_PD: Tensor) -> Tensor:
        """Rows whose parts are each of norm 1."""
        return F.normalize(row_PD.unflatten(1, (self.parts, self.width)), dim=2).flatten(1)

    def rates(self, run: RunShape) -> Table:
        """Rows that are written have no rate: 0 for every step."""
        return constant(run, 0.0)

    def fill(self, keys_GD: Tensor, step: int) -> None:
        """Keys of a warm start become no rows: they come without their images."""

    def score(
        self, q_BD: Tensor, positive_B: Tensor, *, temperature: float, extra_BE: Tensor | None = None,
        objective: Objective | None = None, learn: bool = True,
    ) -> scoring.Score:  # fmt: skip
        """Loss of each query over all N rows and extra columns; see `scoring.score`. The rows take no gradient. A
        collective.

        Args:
            positive_B: the queries' images.
            objective: None; its negatives are not treated.
            learn: not used; the learnable bank's score takes it.
        """
        assert objective is None, "no method treats the negatives of a bank by image"
        if self.parts > 1:
            raise UserError(
                "a bank whose rows have several parts is contrasted with drawn rows alone; expected"
                " method.num_noise=NUMBER, got null"
            )
        # Once all rows are unit, which the fused kernels make them anyway, the rounding of a norm is all that is
        # between the two.
        return scoring.score(
            q_BD, self.rows.weight, positive_B, first_row=self.rows.first, size=self.size, tau=temperature,
            extra_BE=extra_BE,
            as_stored=not self._all_unit(),
        )  # fmt: skip

    def _all_unit(self) -> bool:
        """Whether every row is. A GPU is waited for until it is so, which it is once each image was seen."""
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
        """Loss of each query against (a part of) its image's row and `num_noise` drawn ones; see `noise.contrast`. A
        collective.

        Of "nce", the first step's first call estimates Z, as N times the mean of exp(q.V_j / tau) over all ranks'
        queries and what was drawn for them; the step's `update` keeps it.
        """
        w_RD = self.rows.weight.detach()[:, part * self.width : (part + 1) * self.width]
        where = noise.Draw(self.rows.first, self.size, temperature, num_noise, stream)
        known = self._known.of(self.normaliser, Tensor.tolist)
        normaliser = known[part] or self.normaliser_of_step.get(part, 0.0)
        if form == "nce" and not normaliser:
            self.normaliser_of_step[part] = normaliser = self.size * noise.mean_exponential(q_BD, w_RD, image_B, where)
        return noise.contrast(q_BD, w_RD, image_B, where, form=form, normaliser=normaliser or 1.0, epsilon=epsilon)

    def statistics(self) -> dict[str, float]:
        """Of the rows since the last call, see `Rows.statistics`; and normaliser, Z, of several parts by their
        numbers.
        """
        names = ["normaliser"] if self.parts == 1 else [f"normaliser_{number + 1}" for number in range(self.parts)]
        return self.rows.statistics() | dict(zip(names, self.normaliser.tolist(), strict=True))

    @torch.no_grad()
    def update(self, *, lr: float, keys_GD: Tensor, index_G: Tensor | None = None) -> None:
        """Move the rows of these images towards the keys; of several keys of one image the last counts.

        Args:
            lr: not used; the learnable bank's update takes it.
            keys_GD: all ranks' unit embeddings; of several parts side by side.
            index_G: int64, whose embeddings `keys_GD` are; all ranks'.
        """
        if index_G is None:
            raise UserError(
                "a bank by image is written by index, which this method does not give; expected method=instdisc, pirl"
                " or cmc"
            )
        local_G = index_G - self.rows.first
        own_G = (local_G >= 0) & (local_G < len(self.rows.weight))
        place_G = torch.arange(len(own_G), device=own_G.device)
        if len(self.rows.weight) < self.size:  # a key of another rank's row writes what the last own one writes
            last = len(own_G) - 1 - own_G.flip(0).byte().argmax(0, keepdim=True)
            source_G = torch.where(own_G, place_G, last)
            local_G, keys_GD = local_G[source_G].clamp(0, len(self.rows.weight) - 1), keys_GD[source_G]
        last_R = place_G.new_zeros(len(self.rows.weight)).scatter_reduce_(0, local_G, place_G, "amax")
        keys_GD = keys_GD[last_R[local_G]].to(self.rows.weight.dtype)
        old_GD = self.rows.weight[local_G]
        moved_GD = self._unit(old_GD.mul(self.momentum).add(keys_GD, alpha=1 - self.momentum))
        # The keys of one image write the same.
        self.rows.weight[local_G] = torch.where(own_G.any(), moved_GD, old_GD)
        known = list(self._known.of(self.normaliser, Tensor.tolist))
        for part, normaliser in self.normaliser_of_step.items():
            self.normaliser[part] = known[part] = normaliser
        self._known.note(self.normaliser, known)
        self.normaliser_of_step.clear()


def _read_anew(bank: ImageBank, _: object) -> None:
    bank._known.forget()
    bank._are_unit = False
