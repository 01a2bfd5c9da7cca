"""The bank's Triton kernels, as they run on the GPU. caco/banks/kernels/triton_passes.py launches them.

A Triton program owns a block of queries and a share of the rows (`forward`, `nearest`), one query and a share of the
rows (`exact`), or a block of rows and all queries (`update`). The shares are summed in a fixed order and nothing is
added atomically, so the same GPU gives the same bits again.

With bfloat16 factors the products have float32 sums. Otherwise they are tf32x3: three tensor-core products that
together keep float32's rounding, at two and a half times the peak of the plain float32 units (published figures: A100
156/3 against 19.5 TFLOP/s, H100 495/3 against 67). Float32 factors take two times four bytes an element, so their first
product goes over the width in chunks; with bfloat16 it takes the whole width at once.

Shapes: N queries, S rows in one block, R rows, D width, D2 the next power of two, C columns in one chunk, T candidates.
"""

import triton
import triton.language as tl


@triton.jit
def _block(x_ptr, first, last, ROWS: tl.constexpr, D: tl.constexpr, start, COLUMNS: tl.constexpr):
    """Pointers to a block of x's rows and columns, and a mask of those that lie inside x."""
    row_S, column_C = tl.arange(0, ROWS), start + tl.arange(0, COLUMNS)
    there_SC = (row_S < last - first)[:, None] & (column_C < D)[None, :]
    return x_ptr + tl.cast(first, tl.int64) * D + (row_S[:, None] * D + column_C[None, :]), there_SC


@triton.jit
def _load(x_ptr, first, last, ROWS: tl.constexpr, D: tl.constexpr, start, COLUMNS: tl.constexpr):
    at_SC, there_SC = _block(x_ptr, first, last, ROWS, D, start, COLUMNS)
    return tl.load(at_SC, mask=there_SC, other=0.0)


@triton.jit
def _products(
    a_ptr, first_a, last_a, A: tl.constexpr, b_ptr, first_b, last_b, B: tl.constexpr,
    D: tl.constexpr, D2: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Products of a block of a's rows with a block of b's rows, [A, B], and the squared norms of b's rows, [B]."""
    dot_AB = tl.zeros((A, B), tl.float32)
    square_B = tl.zeros((B,), tl.float32)
    for start in range(0, D2, C):
        a_AC = _load(a_ptr, first_a, last_a, A, D, start, C)
        b_BC = _load(b_ptr, first_b, last_b, B, D, start, C)
        square_B += tl.sum(b_BC * b_BC, 1)
        dot_AB = tl.dot(a_AC.to(TYPE), tl.trans(b_BC.to(TYPE)), dot_AB, input_precision=PRECISION)
    return dot_AB, square_B


@triton.jit(do_not_specialize=["N", "R", "rows_of_share"])
def forward_kernel(
    q_ptr, w_ptr, z_ptr, z2_ptr, peak_ptr, sums_ptr, N, R, rows_of_share, scale, shift, scale2, shift2,
    D: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
    SECOND: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    share, first_query = tl.program_id(1), tl.program_id(0) * BLOCK_N
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    z_N = tl.zeros((BLOCK_N,), tl.float64)
    z2_N = tl.zeros((BLOCK_N,), tl.float64)
    peak_N = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    sums_ND = tl.zeros((BLOCK_N, D2), tl.float32)
    first_row = share * rows_of_share
    for row in range(first_row, tl.minimum(first_row + rows_of_share, R), BLOCK_R):
        there_S = row + tl.arange(0, BLOCK_R) < R
        dot_NS, square_S = _products(q_ptr, first_query, N, BLOCK_N, w_ptr, row, R, BLOCK_R, D, D2, C, PRECISION, TYPE)
        inverse_S, beyond_S = tl.where(there_S, tl.rsqrt(square_S), 0.0), tl.where(there_S, 0.0, float("-inf"))
        # Mask and shift are joined into one number for each row, which is added as the logits are scaled.
        logit_NS = dot_NS * (inverse_S * scale)[None, :] + (beyond_S - shift)[None, :]
        peak_N = tl.maximum(peak_N, tl.max(logit_NS, 1))
        e_NS = tl.exp2(logit_NS)
        z_N += tl.sum(e_NS, 1)
        if SECOND:
            z2_N += tl.sum(tl.exp2(dot_NS * (inverse_S * scale2)[None, :] + (beyond_S - shift2)[None, :]), 1)
        if SUMS:
            w_SD = _load(w_ptr, row, R, BLOCK_R, D, 0, D2).to(TYPE)
            sums_ND = tl.dot((e_NS * inverse_S[None, :]).to(TYPE), w_SD, sums_ND, input_precision=PRECISION)
    query_N = first_query + tl.arange(0, BLOCK_N)
    at_N, there_N = share * N + query_N, query_N < N
    tl.store(z_ptr + at_N, z_N, mask=there_N)
    tl.store(peak_ptr + at_N, (peak_N + shift) / scale, mask=there_N)
    if SECOND:
        tl.store(z2_ptr + at_N, z2_N, mask=there_N)
    if SUMS:
        at_ND, there_ND = _block(
            sums_ptr + tl.cast(share, tl.int64) * N * D, first_query, N, BLOCK_N, D, tl.program_id(2), D2
        )
        tl.store(at_ND, sums_ND, mask=there_ND)


@triton.jit(do_not_specialize=["N", "R", "rows_of_share"])
def nearest_kernel(
    q_ptr, w_ptr, value_ptr, row_ptr, bound_ptr, count_ptr, N, R, rows_of_share,
    D: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Each place in a block keeps its best row. Stored are the best T of these rows, and as a bound the largest cosine
    of all other rows. Only the blocks that hold some of the first `count` queries are searched.
    """
    share, first_query = tl.program_id(1), tl.program_id(0) * BLOCK_N
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    best_NS = tl.full((BLOCK_N, BLOCK_R), float("-inf"), tl.float32)
    row_NS = tl.full((BLOCK_N, BLOCK_R), -1, tl.int32)
    lost_N = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    first_row = share * rows_of_share
    last_row = tl.minimum(first_row + rows_of_share, R)
    for row in range(first_row, tl.where(first_query < tl.load(count_ptr), last_row, first_row), BLOCK_R):
        there_S = row + tl.arange(0, BLOCK_R) < R
        dot_NS, square_S = _products(q_ptr, first_query, N, BLOCK_N, w_ptr, row, R, BLOCK_R, D, D2, C, PRECISION, TYPE)
        inverse_S, beyond_S = tl.where(there_S, tl.rsqrt(square_S), 0.0), tl.where(there_S, 0.0, float("-inf"))
        cosine_NS = dot_NS * inverse_S[None, :] + beyond_S[None, :]
        lost_N = tl.maximum(lost_N, tl.max(tl.minimum(cosine_NS, best_NS), 1))
        row_NS = tl.where(cosine_NS > best_NS, (row + tl.arange(0, BLOCK_R))[None, :], row_NS)
        best_NS = tl.maximum(best_NS, cosine_NS)
    query_N = first_query + tl.arange(0, BLOCK_N)
    at_N, there_N = share * N + query_N, query_N < N
    for t in tl.static_range(T):
        value_N = tl.max(best_NS, 1)
        row_N = tl.min(tl.where(best_NS == value_N[:, None], row_NS, 2147483647), 1)
        tl.store(value_ptr + at_N * T + t, value_N, mask=there_N)
        tl.store(row_ptr + at_N * T + t, row_N, mask=there_N)
        best_NS = tl.where(row_NS == row_N[:, None], float("-inf"), best_NS)
    tl.store(bound_ptr + at_N, tl.maximum(lost_N, tl.max(best_NS, 1)), mask=there_N)


@triton.jit(do_not_specialize=["N", "R", "rows_of_share"])
def exact_kernel(
    k_ptr, w_ptr, cosine_ptr, row_ptr, wanted_ptr, N, R, rows_of_share,
    D: tl.constexpr, D2: tl.constexpr, BLOCK_R: tl.constexpr, TIE: tl.constexpr,
):  # fmt: skip
    """The nearest row of a key in float64, the first one among equals, for the keys for which it is wanted."""
    key, share = tl.program_id(0), tl.program_id(1)
    column_D = tl.arange(0, D2)
    k_D = tl.load(k_ptr + key * D + column_D, mask=column_D < D, other=0.0).to(tl.float64)
    best_S = tl.full((BLOCK_R,), float("-inf"), tl.float64)
    row_S = tl.full((BLOCK_R,), -1, tl.int32)
    first_row = share * rows_of_share
    last_row = tl.minimum(first_row + rows_of_share, R)
    for row in range(first_row, tl.where(tl.load(wanted_ptr + key) != 0, last_row, first_row), BLOCK_R):
        w_SD = _load(w_ptr, row, R, BLOCK_R, D, 0, D2).to(tl.float64)
        cosine_S = tl.sum(w_SD * k_D[None, :], 1) / tl.sqrt(tl.sum(w_SD * w_SD, 1))
        cosine_S = tl.where(row + tl.arange(0, BLOCK_R) < R, cosine_S, float("-inf"))
        nearer_S = cosine_S > best_S + TIE
        row_S = tl.where(nearer_S, row + tl.arange(0, BLOCK_R), row_S)
        best_S = tl.where(nearer_S, cosine_S, best_S)
    cosine = tl.max(best_S, 0)
    tl.store(cosine_ptr + share * N + key, cosine)
    tl.store(row_ptr + share * N + key, tl.min(tl.where(best_S >= cosine - TIE, row_S, 2147483647), 0))


@triton.jit(do_not_specialize=["N", "R"])
def update_kernel(
    q_ptr, positive_ptr, log_sum_ptr, weight_ptr, w_ptr, v_ptr, N, R, inverse_tau, scale, pull, push, lr, momentum,
    weight_decay,
    D: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALISE: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * BLOCK_R
    row_S = first_row + tl.arange(0, BLOCK_R)
    w_SD = _load(w_ptr, first_row, R, BLOCK_R, D, 0, D2)
    inverse_S = tl.where(row_S < R, tl.rsqrt(tl.sum(w_SD * w_SD, 1)), 0.0)
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    toward_SD = tl.zeros((BLOCK_R, D2), tl.float32)
    for query in range(0, N, BLOCK_N):
        query_N = query + tl.arange(0, BLOCK_N)
        there_N = query_N < N
        log_sum_N = tl.load(log_sum_ptr + query_N, mask=there_N, other=float("inf"))  # makes p 0 after the last query
        weight_N = tl.load(weight_ptr + query_N, mask=there_N, other=0.0)
        positive_N = tl.load(positive_ptr + query_N, mask=there_N, other=-1)
        q_ND = _load(q_ptr, query, N, BLOCK_N, D, 0, D2)
        dot_SN, _ = _products(w_ptr, first_row, R, BLOCK_R, q_ptr, query, N, BLOCK_N, D, D2, C, PRECISION, TYPE)
        p_SN = tl.exp2(dot_SN * (inverse_S * scale)[:, None] - log_sum_N[None, :])
        move_SN = tl.where(
            row_S[:, None] == positive_N[None, :],
            (pull * weight_N)[None, :] * (1 - p_SN),
            (push * weight_N)[None, :] * p_SN,
        )
        toward_SD = tl.dot(move_SN.to(TYPE), q_ND, toward_SD, input_precision=PRECISION)
    # A zero that the compiler cannot know to be one: otherwise it would hold the addresses from before the loop in
    # registers throughout the loop. The barriers keep it from reading everything at once, which would take registers
    # too.
    zero = tl.program_id(2)
    w_at_SD, there_SD = _block(w_ptr, first_row, R, BLOCK_R, D, zero, D2)
    v_at_SD, _ = _block(v_ptr, first_row, R, BLOCK_R, D, zero, D2)
    tl.debug_barrier()
    w_SD = tl.load(w_at_SD, mask=there_SD, other=0.0)
    # sum_i w_ij (I - m m^T) q_i needs only the sum of the weighted queries: the projection is linear.
    along_S = tl.sum(toward_SD * w_SD, 1) * inverse_S * inverse_S
    descent_SD = (toward_SD - along_S[:, None] * w_SD) * (inverse_S * inverse_tau)[:, None] - weight_decay * w_SD
    tl.debug_barrier()
    v_SD = momentum * tl.load(v_at_SD, mask=there_SD, other=0.0) - descent_SD
    tl.store(v_at_SD, v_SD, mask=there_SD)
    tl.debug_barrier()
    w_SD = tl.load(w_at_SD, mask=there_SD, other=0.0) - lr * v_SD
    if NORMALISE:
        w_SD *= tl.rsqrt(tl.sum(w_SD * w_SD, 1))[:, None]
    tl.store(w_at_SD, w_SD, mask=there_SD)


KERNELS = {"forward": forward_kernel, "nearest": nearest_kernel, "exact": exact_kernel, "update": update_kernel}
