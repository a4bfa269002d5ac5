"""The selection: gather_topk, gather_topk_fuse and its backward.

Every score becomes an integer key that orders as the contract does. The K-th largest key t is
found by counting, for each key, those ahead of it (n <= 512: n * n comparisons take less time than
the barriers of anything cleverer), or bit by bit, by counting the keys that are not below a
candidate (32 passes over keys held in registers). Kept is what lies above t and, lower positions
first, as many as are still wanted of what equals t; prefix sums turn that into ordered rows.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipvit_kernels import reference
from skipvit_kernels.backends.triton import launch as shared
from skipvit_kernels.backends.triton.launch import (
    block,
    cdiv,
    image_and_tile,
    image_row_column,
    launch,
    move_tile,
    ptrs_at,
    sum_dtype,
    sum_tile,
)
from skipvit_kernels.backends.triton.rows import gather_rows, rows_moved_to

# Above this one program cannot hold an image's keys in registers: plain PyTorch takes over.
MAX_PATCHES = 16384
# Up to this many patches, n * n comparisons.
MAX_RANKED = 512
# Up to this many programs, each selects for itself and moves its rows at once: they all run at the
# same time on any data-centre GPU, and a launch (2 us and more) is saved. Above, the repeated
# selection would cost more than it saves.
MAX_SELECTING = 128


@triton.jit
def _over_heads(b_sum, HEADS: tl.constexpr):
    """An IEEE division, which Triton's `/` is not in float32 on NVIDIA."""
    if HEADS > 1:
        if b_sum.dtype == tl.float64:
            b_sum = b_sum / HEADS
        else:
            b_sum = tl.div_rn(b_sum, tl.full([], HEADS, tl.float32))
    return b_sum


@triton.jit
def _head_mean(scores_ptr, o_i, m_i, scores_strides, HEADS: tl.constexpr):
    """The heads of an image's positions o_i added in order: the bits of `reference.head_mean`."""
    MEAN: tl.constexpr = sum_dtype(scores_ptr)
    scores_ptrs = ptrs_at(scores_ptr, (o_i,), scores_strides[2:])
    b_sum = tl.load(scores_ptrs, mask=m_i, other=0).to(MEAN)
    for _ in tl.static_range(1, HEADS):
        scores_ptrs += scores_strides[1]
        b_sum += tl.load(scores_ptrs, mask=m_i, other=0).to(MEAN)
    return _over_heads(b_sum, HEADS)


@triton.jit
def _key(b_score, m_i):
    """int32 (of float64: int64) that orders as the scores do: NaN above all, -0 as +0.

    Where m_i is not set: below every key of a score.
    """
    if b_score.dtype == tl.float64:
        INT: tl.constexpr = tl.int64
        LARGEST: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    else:
        INT: tl.constexpr = tl.int32
        LARGEST: tl.constexpr = 0x7FFFFFFF
    b_bits = tl.where(b_score == 0, 0.0, b_score).to(INT, bitcast=True)
    b_key = b_bits ^ ((b_bits >> (INT.primitive_bitwidth - 1)) & LARGEST)
    b_key = tl.where(b_score == b_score, b_key, LARGEST)
    return tl.where(m_i, b_key, -LARGEST - 1)


@triton.jit
def _kth_key(
    scores_ptr, num_patches, num_keep, scores_strides,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(t, ties, keys): kept is every key above t, and the first `ties` of those that equal t.

    scores_ptr is the image's. CHUNK: keys at once against all others; 0: bit by bit.
    """
    o_i = tl.arange(0, BLOCK)
    m_i = o_i < num_patches
    b_key = _key(_head_mean(scores_ptr, o_i, m_i, scores_strides, HEADS), m_i)
    LARGEST: tl.constexpr = 0x7FFFFFFF if b_key.dtype == tl.int32 else 0x7FFFFFFFFFFFFFFF
    if CHUNK > 0:
        b_rank = tl.zeros([BLOCK], tl.int32)
        for start in range(0, num_patches, CHUNK):
            o_j = start + tl.arange(0, CHUNK)
            m_j = o_j < num_patches
            b_mean = _head_mean(scores_ptr, o_j, m_j, scores_strides, HEADS)
            b_other = _key(b_mean, m_j)[:, None]
            # Ahead is a larger key, or an equal one at a lower position.
            b_bar = b_key[None, :] - (o_j[:, None] < o_i[None, :]).to(b_key.dtype)
            # Summed along the first axis, which stays inside a thread: no shuffle.
            b_rank += tl.sum((b_other > b_bar).to(tl.int32), axis=0)
        t = tl.min(tl.where(m_i & (b_rank < num_keep), b_key, LARGEST))
    else:
        one = tl.full([], 1, b_key.dtype)
        at_least = tl.sum((b_key >= 0).to(tl.int32))
        t = tl.where(at_least >= num_keep, one * 0, -LARGEST - 1).to(b_key.dtype)
        for step in range(1, b_key.dtype.primitive_bitwidth):
            candidate = t | (one << (b_key.dtype.primitive_bitwidth - 1 - step))
            at_least = tl.sum((b_key >= candidate).to(tl.int32))
            t = tl.where(at_least >= num_keep, candidate, t)
    return t, num_keep - tl.sum((b_key > t).to(tl.int32)), b_key


@triton.jit
def _rows_of(
    o_n, t, ties, ties_seen, kept_seen,
    scores_ptr, num_tokens, num_patches, scores_strides, HEADS: tl.constexpr,
):  # fmt: skip
    """Which of the consecutive positions o_n move, and to which rows.

    (m_moved, b_row, b_mean, m_dropped, ties_seen, kept_seen); ties_seen keys that equal t, and
    kept_seen kept ones, lie before o_n, then before what follows it.
    """
    num_prefix = num_tokens - num_patches
    o_p = o_n - num_prefix
    m_p = (o_p >= 0) & (o_n < num_tokens)
    b_mean = _head_mean(scores_ptr, o_p, m_p, scores_strides, HEADS)
    b_key = _key(b_mean, m_p)
    b_tie = (m_p & (b_key == t)).to(tl.int32)
    b_tie_rank = ties_seen + tl.cumsum(b_tie, 0)
    b_kept = (m_p & ((b_key > t) | ((b_tie > 0) & (b_tie_rank <= ties)))).to(tl.int32)
    b_row = tl.where(o_p < 0, o_n, num_prefix + kept_seen + tl.cumsum(b_kept, 0) - 1)
    m_moved = (b_kept > 0) | (o_p < 0)
    m_dropped = m_p & (b_kept == 0)
    return m_moved, b_row, b_mean, m_dropped, ties_seen + tl.sum(b_tie), kept_seen + tl.sum(b_kept)


# ------------------------------------------------------- gather_topk and gather_topk_fuse


@triton.jit(do_not_specialize=["num_tokens", "num_patches", "num_keep"])
def _select_kernel(
    scores_ptr,  # (B, H, n)
    index_ptr,  # (B, P + K), contiguous
    num_tokens,
    num_patches,
    num_keep,
    scores_strides,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_b = tl.program_id(0).to(tl.int64)
    scores_ptr = ptrs_at(scores_ptr, (o_b,), scores_strides[:1])
    index_ptr += o_b * (num_tokens - num_patches + num_keep)
    t, ties, _keys = _kth_key(
        scores_ptr, num_patches, num_keep, scores_strides, HEADS, BLOCK, CHUNK
    )
    ties_seen, kept_seen = 0, 0
    for start in range(0, num_tokens, ROWS):
        o_n = start + tl.arange(0, ROWS)
        m_moved, b_row, _, _, ties_seen, kept_seen = _rows_of(
            o_n, t, ties, ties_seen, kept_seen,
            scores_ptr, num_tokens, num_patches, scores_strides, HEADS,
        )  # fmt: skip
        tl.store(index_ptr + b_row, o_n.to(tl.int64), mask=m_moved)


@triton.jit(do_not_specialize=["num_tokens", "num_patches", "num_keep"])
def _select_and_move_kernel(
    x_ptr,  # (B, N, C)
    scores_ptr,  # (B, H, n)
    tokens_ptr,  # (B, P + K, C), contiguous; with FUSE (B, P + K + 1, C)
    index_ptr,  # (B, P + K), contiguous
    num_tokens,
    num_patches,
    num_keep,
    num_columns,
    x_strides,
    scores_strides,
    FUSE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program finds t for itself, then passes over its rows of x and counts what is kept."""
    if FUSE:  # one program passes over all rows and sums its columns
        o_b, tile = image_and_tile(tl.cdiv(num_columns, COLUMNS))
        first, end, column = 0, num_tokens, tile * COLUMNS
    else:
        o_b, first, column = image_row_column(num_tokens, num_columns, ROWS, COLUMNS)
        end = first + ROWS
    num_prefix = num_tokens - num_patches
    num_kept = num_prefix + num_keep
    x_ptr = ptrs_at(x_ptr, (o_b,), x_strides[:1])
    scores_ptr = ptrs_at(scores_ptr, (o_b,), scores_strides[:1])
    index_ptr += o_b * num_kept
    tokens_ptr += o_b * (num_kept + 1 if FUSE else num_kept) * num_columns

    t, ties, b_key = _kth_key(
        scores_ptr, num_patches, num_keep, scores_strides, HEADS, BLOCK, CHUNK
    )
    ties_seen, kept_seen = 0, 0
    if not FUSE:
        m_before = tl.arange(0, BLOCK) < first - num_prefix
        ties_seen = tl.sum((m_before & (b_key == t)).to(tl.int32))
        kept_seen = tl.sum((m_before & (b_key > t)).to(tl.int32)) + tl.minimum(ties_seen, ties)

    o_c = column + tl.arange(0, COLUMNS)
    m_c = o_c < num_columns
    SUM: tl.constexpr = sum_dtype(x_ptr, scores_ptr)
    b_sum = tl.zeros([ROWS, COLUMNS], SUM)
    for start in range(first, end, ROWS):
        o_n = start + tl.arange(0, ROWS)
        m_moved, b_row, b_mean, m_dropped, ties_seen, kept_seen = _rows_of(
            o_n, t, ties, ties_seen, kept_seen,
            scores_ptr, num_tokens, num_patches, scores_strides, HEADS,
        )  # fmt: skip
        x_ptrs = ptrs_at(x_ptr, (o_n[:, None], o_c[None, :]), x_strides[1:])
        m_x = ((o_n < num_tokens) if FUSE else m_moved)[:, None] & m_c[None, :]
        b_x = tl.load(x_ptrs, mask=m_x, other=0)
        tokens_ptrs = ptrs_at(tokens_ptr, (b_row[:, None], o_c[None, :]), (num_columns, 1))
        tl.store(tokens_ptrs, b_x, mask=m_moved[:, None] & m_c[None, :])
        if column == 0:
            tl.store(index_ptr + b_row, o_n.to(tl.int64), mask=m_moved)
        if FUSE:
            # Never times zero: a NaN in a kept row must not reach the sum.
            b_sum += tl.where(m_dropped[:, None], b_mean.to(SUM)[:, None] * b_x.to(SUM), 0)

    if FUSE:
        b_fused = tl.sum(b_sum, axis=0).to(tokens_ptr.dtype.element_ty)
        tl.store(ptrs_at(tokens_ptr, (num_kept, o_c), (num_columns, 1)), b_fused, mask=m_c)


def _heads_and_strides(scores: Tensor) -> tuple[int, tuple[int, ...]]:
    """H and the strides (B, H, n); scores (B, n) have one head."""
    if scores.dim() == 3:
        return scores.shape[1], scores.stride()
    stride_b, stride_n = scores.stride()
    return 1, (stride_b, 0, stride_n)


def _block_chunk_threads(num_patches: int) -> tuple[int, int, int]:
    size = block(num_patches)
    # 16 keys at once against all others; on AMD 8, whose scalar registers hold the comparisons.
    chunk = 512 // shared.WARP_SIZE if num_patches <= MAX_RANKED else 0
    # A key a thread for the short sequences, 32 for the longest.
    return size, chunk, max(128, min(256, size), size // 32)


def _select_and_move(
    x: Tensor, scores: Tensor, index: Tensor, num_keep: int, fuse: bool, programs: int, *tile: int
) -> Tensor:
    """Fills the index; returns the tokens."""
    batch, num_tokens, columns = x.shape
    tokens = x.new_empty((batch, index.shape[1] + fuse, columns))
    heads, strides = _heads_and_strides(scores)
    size, chunk, threads = _block_chunk_threads(scores.shape[-1])
    launch(
        _select_and_move_kernel, programs, index, threads=threads,
        x_ptr=x, scores_ptr=scores, tokens_ptr=tokens, index_ptr=index,
        num_tokens=num_tokens, num_patches=scores.shape[-1], num_keep=num_keep, num_columns=columns,
        x_strides=x.stride(), scores_strides=strides, FUSE=fuse,
        HEADS=heads, BLOCK=size, CHUNK=chunk, ROWS=tile[0], COLUMNS=tile[1],
    )  # fmt: skip
    return tokens


def gather_topk(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, columns = x.shape
    num_patches = scores.shape[-1]
    if num_patches > MAX_PATCHES:
        return reference.gather_topk(x, scores, num_keep, num_prefix_tokens=num_prefix_tokens)
    index = x.new_empty((batch, num_prefix_tokens + num_keep), dtype=torch.int64)
    rows, width = move_tile(columns, x.element_size())
    programs = batch * cdiv(num_tokens, rows) * cdiv(columns, width)
    if num_patches <= MAX_RANKED and 0 < programs <= MAX_SELECTING:
        return _select_and_move(x, scores, index, num_keep, False, programs, rows, width), index
    heads, strides = _heads_and_strides(scores)
    size, chunk, threads = _block_chunk_threads(num_patches)
    launch(
        _select_kernel, batch if index.shape[1] else 0, index, threads=threads,
        scores_ptr=scores, index_ptr=index,
        num_tokens=num_tokens, num_patches=num_patches, num_keep=num_keep, scores_strides=strides,
        HEADS=heads, BLOCK=size, CHUNK=chunk, ROWS=block(min(num_tokens, 1024)),
    )  # fmt: skip
    return gather_rows(x, index), index


def gather_topk_fuse(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    batch, _, columns = x.shape
    num_patches = scores.shape[-1]
    if num_patches > MAX_PATCHES or columns == 0:
        return reference.gather_topk_fuse(x, scores, num_keep, num_prefix_tokens=num_prefix_tokens)
    index = x.new_empty((batch, num_prefix_tokens + num_keep), dtype=torch.int64)
    rows, width = sum_tile(columns, x.element_size())
    # 16 bytes for each thread at least, where a long image brought many.
    rows = max(rows, _block_chunk_threads(num_patches)[2] * 16 // (width * x.element_size()))
    programs = batch * cdiv(columns, width)
    return _select_and_move(x, scores, index, num_keep, True, programs, rows, width), index


# ---------------------------------------------------------- gather_topk_fuse's backward


@triton.jit(do_not_specialize=["num_tokens", "num_patches", "num_rows"])
def _gather_topk_fuse_backward_kernel(
    grad_ptr,  # (B, M + 1, C)
    x_ptr,  # (B, N, C)
    scores_ptr,  # (B, H, n)
    index_ptr,  # (B, M)
    grad_x_ptr,  # (B, N, C), contiguous
    grad_scores_ptr,  # (B, H, n), contiguous
    num_tokens,
    num_patches,
    num_rows,
    num_columns,
    grad_strides,
    x_strides,
    scores_strides,
    index_strides,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program has whole rows: the gradient of a score is the product of two of them."""
    o_b, tile = image_and_tile(tl.cdiv(num_tokens, ROWS))
    o_n = tile * ROWS + tl.arange(0, ROWS)
    o_p = o_n - (num_tokens - num_patches)
    m_n = o_n < num_tokens
    m_p = m_n & (o_p >= 0)
    b_r = rows_moved_to(index_ptr, o_b, o_n, num_rows, index_strides)
    m_kept = (b_r >= 0)[:, None]
    m_dropped = m_p & (b_r < 0)
    scores_ptr = ptrs_at(scores_ptr, (o_b,), scores_strides[:1])
    b_mean = _head_mean(scores_ptr, o_p, m_dropped, scores_strides, HEADS)
    m_dropped = m_dropped[:, None]
    grad_ptr = ptrs_at(grad_ptr, (o_b,), grad_strides[:1])
    x_ptr = ptrs_at(x_ptr, (o_b,), x_strides[:1])
    grad_x_ptr += o_b * num_tokens * num_columns

    SUM: tl.constexpr = sum_dtype(x_ptr, scores_ptr)
    b_dot = tl.zeros([ROWS, COLUMNS], SUM)
    for start in range(0, num_columns, COLUMNS):
        o_c = start + tl.arange(0, COLUMNS)
        m_c = o_c < num_columns
        fused_ptrs = ptrs_at(grad_ptr, (num_rows, o_c), grad_strides[1:])
        b_fused = tl.load(fused_ptrs, mask=m_c, other=0).to(SUM)[None, :]
        x_ptrs = ptrs_at(x_ptr, (o_n[:, None], o_c[None, :]), x_strides[1:])
        b_x = tl.load(x_ptrs, mask=m_dropped & m_c[None, :], other=0).to(SUM)
        b_dot += tl.where(m_dropped, b_x * b_fused, 0)
        kept_ptrs = ptrs_at(grad_ptr, (b_r[:, None], o_c[None, :]), grad_strides[1:])
        b_kept = tl.load(kept_ptrs, mask=m_kept & m_c[None, :], other=0)
        b_grad_x = tl.where(m_dropped, b_mean.to(SUM)[:, None] * b_fused, 0)
        b_grad_x = tl.where(m_kept, b_kept, b_grad_x.to(b_kept.dtype))
        grad_x_ptrs = ptrs_at(grad_x_ptr, (o_n[:, None], o_c[None, :]), (num_columns, 1))
        tl.store(grad_x_ptrs, b_grad_x, mask=m_n[:, None] & m_c[None, :])

    b_grad = _over_heads(tl.sum(b_dot, axis=1), HEADS).to(grad_scores_ptr.dtype.element_ty)
    for h in range(HEADS):
        tl.store(grad_scores_ptr + (o_b * HEADS + h) * num_patches + o_p, b_grad, mask=m_p)


def gather_topk_fuse_backward(
    grad: Tensor, x: Tensor, scores: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients to x and to scores; an index entry out of range kept no row."""
    batch, num_tokens, columns = x.shape
    grad_x = x.new_empty((batch, num_tokens, columns))
    grad_scores = scores.new_empty(scores.shape)
    heads, strides = _heads_and_strides(scores)
    rows, width = move_tile(columns, x.element_size())
    width = max(1, width // 2)  # two tensors are read: the whole width takes 40 % more registers
    launch(
        _gather_topk_fuse_backward_kernel, batch * cdiv(num_tokens, rows), grad_x,
        grad_ptr=grad, x_ptr=x, scores_ptr=scores, index_ptr=index,
        grad_x_ptr=grad_x, grad_scores_ptr=grad_scores, num_tokens=num_tokens,
        num_patches=scores.shape[-1], num_rows=index.shape[1], num_columns=columns,
        grad_strides=grad.stride(), x_strides=x.stride(), scores_strides=strides,
        index_strides=index.stride(), HEADS=heads, ROWS=rows, COLUMNS=width,
    )  # fmt: skip
    return grad_x, grad_scores
