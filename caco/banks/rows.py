"""The part that all banks have in common: the rows, this rank's shard of them, and statistics of their use."""

import os
from typing import Any, Literal

import torch
from torch import Tensor, nn

from caco import distributed
from caco.banks import scoring
from caco.banks.nearest import most_probable_row
from caco.errors import UserError

INIT_BLOCK = 4096  # rows drawn from one seed, so that no row depends on the number of ranks
TWIN_SAMPLE = 512  # rows compared with all others when near-duplicates are counted
TWIN_COSINE = 0.99  # two rows with a larger cosine are near-duplicates
FEWEST_CHOSEN = 5.0  # percent of the rows that an epoch's keys could have chosen; with fewer the bank has collapsed
MOST_NEAR_DUPLICATES = 50.0  # percent of the rows; with more the bank has collapsed


BY_ROW = ("weight", "uses", "velocity", "idle")  # entries of the state with one line for each row: they are sharded
Norms = Literal["unit", "normal", "uniform"]


def random_rows(first: int, last: int, dim: int, seed: int, *, norms: Norms = "unit") -> Tensor:
    """Random rows `first` to `last` - 1 of a bank, [last - first, dim]. Each row is the same for any number of ranks.

    Args:
        norms: "normal" draws independent standard normal numbers, so a row's norm is about sqrt(dim); "unit" scales
            these rows to norm 1, which is uniform on the sphere; "uniform" draws independent numbers between
            -sqrt(3 / dim) and sqrt(3 / dim), so a row's norm is about 1 (InstDisc's and CMC's code).
    """
    parts = []
    for block in range(first // INIT_BLOCK, -(-last // INIT_BLOCK)):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + block) % 2**63)
        draw = torch.rand if norms == "uniform" else torch.randn
        rows = draw(INIT_BLOCK, dim, generator=generator)
        start = block * INIT_BLOCK
        parts.append(rows[max(first - start, 0) : last - start])
    drawn = torch.cat(parts)
    if norms == "uniform":
        return (2 * drawn - 1) * (3 / dim) ** 0.5
    return torch.nn.functional.normalize(drawn, dim=1) if norms == "unit" else drawn


def _refuse_more_than_memory(rows: int, dim: int) -> None:
    """Before they are drawn: a kernel that hands out more memory than it has ends processes, others too, when it is
    written to.
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = 2 * 4 * rows * dim  # drawn in parts, which are then joined
    if needed > there and torch.get_default_device().type != "meta":
        raise UserError(
            f"bank.size: {rows:,} rows of {dim} numbers take {needed / 2**30:,.0f} GiB of memory while they are made,"
            f" and this machine has {there / 2**30:,.0f}; take fewer, or more machines, whose processes share them out"
        )


def few_rows_chosen(statistics: dict[str, float]) -> str | None:
    """A warning, as a part of a sentence, if an epoch's keys chose too small a share of the rows that they could have
    chosen (see `Rows.statistics`); else None.
    """
    percent = statistics.get("rows_used_of_possible")
    if percent is None or percent >= FEWEST_CHOSEN:
        return None
    return (
        f"the keys chose only {percent:.1f} % of the rows that they could have chosen, so most images share a few"
        " positives"
    )


def many_near_duplicates(statistics: dict[str, float]) -> str | None:
    """A warning, as a part of a sentence, if most rows nearly coincide with another row (see `Rows.statistics`); else
    None.
    """
    percent = statistics["near_duplicates"]
    if percent <= MOST_NEAR_DUPLICATES:
        return None
    return (
        f"{percent:.0f} % of the rows have another row within a cosine of {TWIN_COSINE}, so the rows have run into one"
        " another"
    )


def _gather_rows(rows: "Rows", state: dict[str, Any], prefix: str, metadata: object) -> None:
    """Put the rows of all ranks into rank 0's state, so that a checkpoint does not depend on the number of ranks. A
    collective.
    """
    for name in BY_ROW:
        if prefix + name in state:
            state[prefix + name] = distributed.gather_on_main(state[prefix + name])
    if rows.renewed_after_steps:
        state[prefix + "renewed"] = distributed.sum_(state[prefix + "renewed"].clone())


def _take_shard(rows: "Rows", state: dict[str, Any], prefix: str, *_: object) -> None:
    for name in BY_ROW:
        if prefix + name in state:
            state[prefix + name] = state[prefix + name][rows.first : rows.last]
    if prefix + "renewed" in state and not distributed.is_main():
        state[prefix + "renewed"] = torch.zeros_like(
            state[prefix + "renewed"]
        )  # the saved count is that of all ranks together, so rank 0 alone goes on from it


class Rows(nn.Module):
    """`size` vectors of width `dim`, sharded over the ranks, and how often each was chosen as a positive. Every bank
    owns one object of this class.

    Shapes: B this rank's keys, G all ranks' keys, R this rank's rows, S rows of a sample or a block, D width.

    Args:
        size: rows of the whole bank, K. Where the number of ranks does not divide it, the first ranks have one row more
            than the others.
        dim: width D of the embedding.
        seed: of the random initial rows.
        learnable: whether the rows learn and so have velocities.
        norms: how the initial rows are drawn; see `random_rows`.
        renewed_after_steps: see `renew`; None: rows are never renewed.
    Raises:
        UserError: fewer than 2 rows, a width below 1, fewer rows than ranks, or a size, dim or seed that differs
            between ranks.
    """

    uses: Tensor  # int64 [R], how often each of this rank's rows was chosen since the last `statistics`
    velocity: Tensor  # [R, D], momentum of the rows' SGD; only rows that learn have it
    idle: Tensor  # int64 [R], steps since each row was chosen; only rows that are renewed have it
    renewed: Tensor  # int64, how many of this rank's rows were renewed since the last `statistics`

    def __init__(
        self,
        *,
        size: int,
        dim: int,
        seed: int,
        learnable: bool,
        norms: Norms = "unit",
        renewed_after_steps: int | None = None,
    ):
        super().__init__()
        if size < 2:
            raise UserError(f"a bank needs at least 2 rows; got size={size}")
        if dim < 1:
            raise UserError(f"a bank's rows need a width of at least 1; got dim={dim}")
        by_rank = distributed.all_objects((size, dim, seed))
        if len(set(by_rank)) > 1:
            raise UserError(
                f"every rank must have the same bank; got (size, dim, seed) by rank: {', '.join(map(str, by_rank))}"
            )
        self.size, self.learnable = size, learnable
        self.first, self.last = distributed.shard(size)
        _refuse_more_than_memory(self.last - self.first, dim)
        self.weight = nn.Parameter(random_rows(self.first, self.last, dim, seed, norms=norms), requires_grad=learnable)
        self.register_buffer("uses", torch.zeros(self.last - self.first, dtype=torch.int64))
        if learnable:
            self.register_buffer("velocity", torch.zeros_like(self.weight))
        self.renewed_after_steps = renewed_after_steps
        if renewed_after_steps:
            self.register_buffer("idle", torch.zeros(self.last - self.first, dtype=torch.int64))
            self.register_buffer("renewed", torch.zeros((), dtype=torch.int64))
        self.register_state_dict_post_hook(_gather_rows)
        self.register_load_state_dict_pre_hook(_take_shard)

    def most_probable(self, k_BD: Tensor) -> Tensor:
        """The index over the whole bank of each key's nearest row (Eq. 11), int64 [B]. In training mode the choices
        count in the statistics of use. A collective.

        Args:
            k_BD: this rank's unit keys.
        """
        row_B = most_probable_row(k_BD, self.weight, self.first)
        self.note_chosen(row_B)
        return row_B

    def note_chosen(self, row_B: Tensor) -> None:
        """Count in the statistics, in training mode, that all ranks' keys have chosen these rows. A collective.

        Args:
            row_B: int64, indices over the whole bank.
        """
        if self.training:
            local_G = distributed.gather(row_B) - self.first
            here_G = (local_G >= 0) & (local_G < len(self.uses))
            at_G = local_G.clamp(0, len(self.uses) - 1)
            self.uses.index_add_(0, at_G, here_G.long())
            if self.renewed_after_steps:  # the chosen rows get -1; `renew` adds 1 after the step, which makes it 0
                self.idle.scatter_reduce_(0, at_G, torch.where(here_G, -here_G.long(), self.idle[at_G]), "amin")

    @torch.no_grad()
    def renew(self, k_GD: Tensor) -> None:
        """Called after a step: replace each row that no key has chosen for `renewed_after_steps` steps by a key of the
        step, with velocity 0. A collective.

        The rows take the keys in order, and each key replaces at most one row. Where there are more such rows than
        keys, the remaining rows wait for the next step.

        Args:
            k_GD: all ranks' unit keys of the step.
        """
        assert self.renewed_after_steps is not None
        self.idle += 1
        old_R = self.idle >= self.renewed_after_steps
        # The first old rows, as many as there are keys, then -1 if there are fewer: only the device knows their number.
        row_G = torch.nonzero_static(old_R, size=len(k_GD))[:, 0]
        before = distributed.gather(old_R.sum()[None])[: distributed.rank()].sum()
        key_G = torch.arange(len(k_GD), device=k_GD.device) + before
        taken_G = (row_G >= 0) & (key_G < len(k_GD))
        # An entry without a row or key writes what the first entry writes. If the first has none either, row 0 is
        # written as it is.
        row_G = torch.where(taken_G, row_G, row_G[:1].clamp(min=0))
        vector_GD = k_GD[torch.where(taken_G, key_G, before).clamp(max=len(k_GD) - 1)].to(self.weight.dtype)
        some = taken_G[:1]
        self.weight[row_G] = torch.where(some, vector_GD, self.weight[row_G])
        self.velocity[row_G] = self.velocity[row_G].masked_fill(some, 0.0)
        self.idle[row_G] = self.idle[row_G].masked_fill(some, 0)
        self.renewed += taken_G.sum()

    def lookup(self, row_B: Tensor, *, as_stored: bool = False) -> Tensor:
        """The rows with these indices, [B, D], as unit vectors or, with `as_stored`, as they are stored. No gradient
        flows into them. A collective.

        Args:
            row_B: int64, indices over the whole bank; every rank asks for equally many.
        """
        row_G = distributed.gather(row_B)
        here_G = (row_G >= self.first) & (row_G < self.last)
        w_GD = self.weight.detach()[(row_G - self.first).masked_fill(~here_G, 0)]
        m_GD = w_GD if as_stored else scoring.unit_rows(w_GD)[0]
        return distributed.own(distributed.sum_(m_GD.masked_fill(~here_G[:, None], 0.0)), len(row_B))

    @torch.no_grad()
    def write(self, k_GD: Tensor, start: int) -> None:
        """Overwrite rows start, start + 1, ... (from the last row on to row 0) with unit keys. Every rank passes all
        ranks' keys, [G, D].
        """
        done = 0
        while done < len(k_GD):
            row = (start + done) % self.size
            count = min(len(k_GD) - done, self.size - row)  # up to the bank's end
            first, last = max(row, self.first), min(row + count, self.last)
            if first < last:
                self.weight[first - self.first : last - self.first] = k_GD[done + first - row : done + last - row]
            done += count

    @torch.no_grad()
    def are_unit(self) -> bool:
        """Whether the rows of all ranks have norm 1 up to the rounding of a norm. A collective."""
        off = (self.weight.norm(dim=1) - 1).abs().amax()
        return distributed.max_(off).item() <= 8 * torch.finfo(self.weight.dtype).eps

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """How the rows were used since the last call, and how they are distributed. A collective, which compares a
        sample of the rows with all rows.

        rows_used: percent of the rows that were chosen as a positive at least once. rows_used_of_possible: the number
        of these rows as a percentage of the smaller of K and the number of choices, since n choices reach at most n
        rows. use_entropy: entropy of the choices over the rows, in percent of its largest possible value. The first
        three are missing where no choice was made. row_norm_mean, row_norm_std: of the stored rows' norms.
        near_duplicates: percent of a fixed sample of rows that have a cosine above 0.99 with another row.
        rows_renewed: percent of the rows that were renewed (`renew`); only a bank that renews rows has it.
        """
        total = distributed.sum_(self.uses.sum().double()).item()
        used = distributed.sum_((self.uses > 0).sum().double()).item()
        values = {}
        if total:
            share = self.uses.double() / total
            entropy = distributed.sum_(-torch.special.xlogy(share, share).sum()).item()
            values["rows_used"] = 100 * used / self.size
            values["rows_used_of_possible"] = 100 * used / min(self.size, total)
            values["use_entropy"] = 100 * entropy / torch.tensor(float(min(self.size, total))).log().item()
        norm_R = self.weight.norm(dim=1).double()
        moments = distributed.sum_(torch.stack([norm_R.sum(), norm_R.square().sum()])) / self.size
        values["row_norm_mean"] = moments[0].item()
        values["row_norm_std"] = max(moments[1].item() - moments[0].item() ** 2, 0.0) ** 0.5
        values["near_duplicates"] = self._near_duplicates()
        if self.renewed_after_steps:
            values["rows_renewed"] = 100 * distributed.sum_(self.renewed.double()).item() / self.size
            self.renewed.zero_()
        self.uses.zero_()
        return values

    def _near_duplicates(self) -> float:
        stride = -(-self.size // TWIN_SAMPLE)
        sample_S = torch.arange(0, self.size, stride, device=self.weight.device)
        m_SD = self.rows_of_all(sample_S)
        close_S = torch.zeros(len(sample_S), device=self.weight.device)
        for block in scoring.blocks(len(self.weight), len(sample_S)):
            cosine = m_SD @ scoring.unit_rows(self.weight[block])[0].T
            index = torch.arange(block.start, block.stop, device=cosine.device) + self.first
            cosine.masked_fill_(index[None, :] == sample_S[:, None], -1.0)
            close_S = torch.maximum(close_S, (cosine > TWIN_COSINE).any(1).float())
        return 100 * distributed.max_(close_S).mean().item()

    def rows_of_all(self, row_S: Tensor) -> Tensor:
        """The unit rows with these indices, [S, D]. A collective; unlike in `lookup`, all ranks ask for the same rows.

        Args:
            row_S: int64, indices over the whole bank, the same on every rank.
        """
        here_S = (row_S >= self.first) & (row_S < self.last)
        m_SD = scoring.unit_rows(self.weight.detach()[(row_S - self.first).masked_fill(~here_S, 0)])[0]
        return distributed.sum_(m_SD.masked_fill(~here_S[:, None], 0.0))
