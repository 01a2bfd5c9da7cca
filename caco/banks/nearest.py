"""Find each key's nearest row of the bank, its most probable one, without ever holding a B x K matrix.

On a CPU a fused kernel searches where it was built (caco/banks/kernels/fused.py), on CUDA Triton kernels where Triton
works; elsewhere PyTorch searches block by block. Whatever rounding leaves undecided is decided in float64.

Shapes: B this rank's keys, G all ranks' keys, R this rank's rows, S rows in one block, D width, T candidates of a key,
F some of the keys, P pairs of a key and a candidate.
"""

import torch
from torch import Tensor

from caco import devices, distributed
from caco.banks.kernels import fused
from caco.banks.scoring import blocks, unit_rows

TIE = 1e-12  # float64 cosines that are as near as this count as equal


def most_probable_row(k_BD: Tensor, w_RD: Tensor, first_row: int) -> Tensor:
    """The index over the whole bank of the row with the largest cosine in float64; the lowest index among equals. A
    collective.

    Rows that a pass in the given precision cannot tell apart are scored again in float64.

    Source: Eq. 11, chosen by the key as in Figure 2.
    Args:
        k_BD: this rank's keys, unit norm, float32.
        w_RD: this rank's rows, of any norm but zero.
        first_row: the index of this rank's first row in the whole bank.
    Returns:
        int64 [B].
    """
    with torch.no_grad(), torch.autocast(k_BD.device.type, enabled=False):
        k_GD = distributed.gather(k_BD)
        row_G = _nearest_here(k_GD, w_RD)
        if distributed.world() == 1:
            return row_G + first_row
        m_GD = unit_rows(w_RD[row_G].double())[0]
        best_G = (k_GD.double() * m_GD).sum(1)
        top_G = distributed.max_(best_G.clone())
        # A rank without the maximum bids "beyond the bank", so the lowest index wins among equals.
        bid_G = (-(row_G + first_row)).masked_fill(~(best_G >= top_G - TIE), torch.iinfo(torch.int64).min)
        return distributed.own(-distributed.max_(bid_G), len(k_BD))


def _nearest_here(k_GD: Tensor, w_RD: Tensor) -> Tensor:
    """The nearest of this rank's rows, int64 [G]. Float64 compares rows whose order rounding may have changed."""
    # Rounding may change the order of two rows whose cosines differ by less than twice the worst error of a cosine.
    supported = fused.supports(k_GD, w_RD)
    if supported and (found_G := fused.nearest_row(k_GD, w_RD)) is not None:
        return found_G
    if not supported:
        row_G, many = _search(k_GD, w_RD, 2 * (k_GD.shape[1] + 8) * torch.finfo(k_GD.dtype).eps)
    else:
        value_GT, row_GT, error_G = fused.nearest(k_GD, w_RD)
        row_G = row_GT[:, 0].clamp(min=0)  # all scores of a key may be NaN, which `score` will refuse
        near_GT = (value_GT >= value_GT[:, :1] - 2 * error_G[:, None]) & (row_GT >= 0)
        doubtful = near_GT[:, 1].nonzero()[:, 0]
        few, many = doubtful[~near_GT[doubtful, -1]], doubtful[near_GT[doubtful, -1]]
        # The nearest row of these few keys is among their candidates; 128 keys at a time limit the memory.
        for some in few.split(128):
            key_P, slot_P = near_GT[some].nonzero(as_tuple=True)
            m_PD = unit_rows(w_RD[row_GT[some[key_P], slot_P]].double())[0]
            exact_FT = m_PD.new_full((len(some), near_GT.shape[1]), -torch.inf)
            exact_FT[key_P, slot_P] = (k_GD[some[key_P]].double() * m_PD).sum(1)
            ties_FT = exact_FT >= exact_FT.amax(1, keepdim=True) - TIE
            row_G[some] = torch.where(ties_FT, row_GT[some], torch.iinfo(torch.int64).max).amin(1)
    if len(many):
        row_G[many] = _search_exactly(k_GD[many].double(), w_RD)
    return row_G


def _search(k_GD: Tensor, w_RD: Tensor, close: float) -> tuple[Tensor, Tensor]:
    """The nearest row of each key, int64 [G], and the keys whose second nearest row comes within `close` of its
    cosine. The host waits for a GPU once, to see whether there are such keys.
    """
    best_G2 = k_GD.new_full((len(k_GD), 2), -torch.inf)
    row_G = torch.zeros(len(k_GD), dtype=torch.int64, device=k_GD.device)
    for block in blocks(len(w_RD), len(k_GD)):
        cosine_GS = k_GD @ unit_rows(w_RD[block])[0].T
        near: slice | Tensor = slice(None)
        if not devices.runs_ahead(k_GD.device):
            # Only these keys' nearest rows can change, and after some blocks they are few. Finding the place of a
            # maximum takes far longer than finding the maximum.
            near = (cosine_GS.amax(1) >= best_G2[:, 0] - close).nonzero()[:, 0]
        value_F2, index_F2 = cosine_GS[near].topk(min(2, cosine_GS.shape[1]), dim=1)
        row_G[near] = torch.where(value_F2[:, 0] > best_G2[near, 0], index_F2[:, 0] + block.start, row_G[near])
        best_G2[near] = torch.cat([best_G2[near], value_F2], 1).topk(2, dim=1).values
    return row_G, (best_G2[:, 0] - best_G2[:, 1] <= close).nonzero()[:, 0]


def _search_exactly(k_GD: Tensor, w_RD: Tensor) -> Tensor:
    """The nearest row of each key in float64, the first of equals, int64 [G]."""
    best_G = k_GD.new_full((len(k_GD),), -torch.inf)
    row_G = torch.zeros(len(k_GD), dtype=torch.int64, device=k_GD.device)
    for block in blocks(len(w_RD), len(k_GD)):
        cosine_GS = k_GD @ unit_rows(w_RD[block].double())[0].T
        top_G = cosine_GS.amax(1)
        nearer = (top_G > best_G + TIE).nonzero()[:, 0]
        best_G[nearer] = top_G[nearer]
        equal_FS = cosine_GS[nearer] >= top_G[nearer, None] - TIE
        row_G[nearer] = equal_FS.to(torch.uint8).argmax(1) + block.start  # torch promises the first of equals
    return row_G
