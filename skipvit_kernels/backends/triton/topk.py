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
    launch,
    move_tile,
    sum_tile,
)
from skipvit_kernels.backends.triton.rows import LOOKUP, gather_rows, rows_moved_to

# Above this one program cannot hold an image's keys in registers: plain PyTorch takes over.
MAX_PATCHES = 16384
# Up to this many patches, n * n comparisons.
MAX_RANKED = 512
# Up to this many programs, each selects for itself and moves its rows at once: they all run at the
# same time on any data-centre GPU, and a launch (2 us and more) is saved. Above, the repeated
# selection would cost more than it saves.
MAX_SELECTING = 128


@triton.constexpr_function
def _sum_dtype(x_ptr, scores_ptr):
    """float32, or float64 where an input has it."""
    types = x_ptr.dtype.element_ty, scores_ptr.dtype.element_ty
    return tl.float64 if tl.float64 in types else tl.float32


@triton.jit
def _head_mean(
    scores_ptr,  # (H, n) of one image
    o_i,  # positions
    m_i,
    stride_h,
    stride_n,
    HEADS: tl.constexpr,
):
    """The heads added in order, then an IEEE division: the bits of `reference.head_mean`."""
    MEAN: tl.constexpr = tl.float64 if scores_ptr.dtype.element_ty == tl.float64 else tl.float32
    ptrs = scores_ptr + o_i.to(tl.int64) * stride_n
    b_sum = tl.load(ptrs, mask=m_i, other=0).to(MEAN)
    for _ in tl.static_range(1, HEADS):
        ptrs += stride_h
        b_sum += tl.load(ptrs, mask=m_i, other=0).to(MEAN)
    if HEADS > 1:
        if tl.float64 == MEAN:
            b_sum = b_sum / HEADS
        else:
            b_sum = tl.div_rn(b_sum, tl.full([], HEADS, tl.float32))
    return b_sum


@triton.jit
def _key(score, m_i):
    """int32 (of float64: int64) that orders as the scores do: NaN above all, -0 as +0.

    Where m_i is not set: below every key of a score.
    """
    if score.dtype == tl.float64:
        INT: tl.constexpr = tl.int64
        LARGEST: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    else:
        INT: tl.constexpr = tl.int32
        LARGEST: tl.constexpr = 0x7FFFFFFF
    bits = tl.where(score == 0, 0.0, score).to(INT, bitcast=True)
    key = bits ^ ((bits >> (INT.primitive_bitwidth - 1)) & LARGEST)
    key = tl.where(score == score, key, LARGEST)
    return tl.where(m_i, key, -LARGEST - 1)


@triton.jit
def _kth_key(
    scores_ptr,  # (H, n) of the image
    num_patches,
    num_keep,
    stride_h,
    stride_n,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,  # 0: bit by bit
):
    """(t, ties, keys): kept is every key above t, and the first `ties` of those that equal t."""
    o_i = tl.arange(0, BLOCK)
    m_i = o_i < num_patches
    b_key = _key(_head_mean(scores_ptr, o_i, m_i, stride_h, stride_n, HEADS), m_i)
    LARGEST: tl.constexpr = 0x7FFFFFFF if b_key.dtype == tl.int32 else 0x7FFFFFFFFFFFFFFF
    if CHUNK > 0:
        b_rank = tl.zeros([BLOCK], tl.int32)
        for start in range(0, num_patches, CHUNK):
            o_j = start + tl.arange(0, CHUNK)
            m_j = o_j < num_patches
            mean = _head_mean(scores_ptr, o_j, m_j, stride_h, stride_n, HEADS)
            b_other = _key(mean, m_j)[:, None]
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
    o_n,  # [ROWS] consecutive positions in the image
    t,
    ties,
    ties_seen,  # keys equal to t, and keys kept, before these positions
    kept_seen,
    scores_ptr,  # (H, n) of the image
    num_tokens,
    num_patches,
    stride_h,
    stride_n,
    HEADS: tl.constexpr,
):
    """(moved, row, mean, dropped, ties_seen, kept_seen): what is kept, and which row it becomes."""
    num_prefix = num_tokens - num_patches
    o_p = o_n - num_prefix
    m_p = (o_p >= 0) & (o_n < num_tokens)
    mean = _head_mean(scores_ptr, o_p, m_p, stride_h, stride_n, HEADS)
    b_key = _key(mean, m_p)
    tie = (m_p & (b_key == t)).to(tl.int32)
    tie_rank = ties_seen + tl.cumsum(tie, 0)
    kept = (m_p & ((b_key > t) | ((tie > 0) & (tie_rank <= ties)))).to(tl.int32)
    row = tl.where(o_p < 0, o_n, num_prefix + kept_seen + tl.cumsum(kept, 0) - 1)
    moved = (kept > 0) | (o_p < 0)
    dropped = m_p & (kept == 0)
    return moved, row, mean, dropped, ties_seen + tl.sum(tie), kept_seen + tl.sum(kept)


# --------------------------------------------------------------------------- gather_topk


@triton.jit(do_not_specialize=["num_tokens", "num_patches", "num_keep"])
def _select_kernel(
    scores_ptr,  # (B, H, n)
    index_ptr,  # (B, P + K), contiguous
    num_tokens,
    num_patches,
    num_keep,
    stride_b,
    stride_h,
    stride_n,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    scores_ptr += b * stride_b
    index_ptr += b * (num_tokens - num_patches + num_keep)
    t, ties = _kth_key(scores_ptr, num_patches, num_keep, stride_h, stride_n, HEADS, BLOCK, CHUNK)[
        :2
    ]
    ties_seen = 0
    kept_seen = 0
    for start in range(0, num_tokens, ROWS):
        o_n = start + tl.arange(0, ROWS)
        moved, row, _, _, ties_seen, kept_seen = _rows_of(
            *(o_n, t, ties, ties_seen, kept_seen),
            *(scores_ptr, num_tokens, num_patches, stride_h, stride_n, HEADS),
        )
        tl.store(index_ptr + row, o_n.to(tl.int64), mask=moved)


@triton.jit(do_not_specialize=["num_tokens", "num_patches", "num_keep", "tiles"])
def _select_and_move_kernel(
    x_ptr,  # (B, N, C)
    scores_ptr,  # (B, H, n)
    tokens_ptr,  # (B, P + K, C), contiguous; with FUSE (B, P + K + 1, C)
    index_ptr,  # (B, P + K), contiguous
    num_tokens,
    num_patches,
    num_keep,
    num_columns,
    tiles,  # per image
    x_stride_b,
    x_stride_n,
    x_stride_c,
    scores_stride_b,
    scores_stride_h,
    scores_stride_n,
    FUSE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program finds t for itself, then passes over its rows of x and counts what is kept."""
    b, tile = image_and_tile(tiles)
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    column_tile = tile % column_tiles
    first = tile // column_tiles * ROWS
    # With FUSE one program passes over all rows and sums its columns.
    end = num_tokens if FUSE else first + ROWS
    num_prefix = num_tokens - num_patches
    num_kept = num_prefix + num_keep
    scores_ptr += b * scores_stride_b
    x_ptr += b * x_stride_b
    index_ptr += b * num_kept
    tokens_ptr += b * (num_kept + 1 if FUSE else num_kept) * num_columns

    t, ties, b_key = _kth_key(
        scores_ptr, num_patches, num_keep, scores_stride_h, scores_stride_n, HEADS, BLOCK, CHUNK
    )
    before = tl.arange(0, BLOCK) < first - num_prefix
    ties_seen = tl.sum((before & (b_key == t)).to(tl.int32))
    kept_seen = tl.sum((before & (b_key > t)).to(tl.int32)) + tl.minimum(ties_seen, ties)

    o_c = column_tile * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    m_c = o_c < num_columns
    SUM: tl.constexpr = _sum_dtype(x_ptr, scores_ptr)
    b_sum = tl.zeros([ROWS, COLUMNS], SUM)
    for start in range(first, end, ROWS):
        o_n = start + tl.arange(0, ROWS)
        moved, row, mean, dropped, ties_seen, kept_seen = _rows_of(
            *(o_n, t, ties, ties_seen, kept_seen),
            *(scores_ptr, num_tokens, num_patches, scores_stride_h, scores_stride_n, HEADS),
        )
        x_ptrs = x_ptr + o_n.to(tl.int64)[:, None] * x_stride_n + o_c[None, :] * x_stride_c
        m_x = ((o_n < num_tokens) if FUSE else moved)[:, None] & m_c[None, :]
        b_x = tl.load(x_ptrs, mask=m_x, other=0)
        tokens_ptrs = tokens_ptr + row.to(tl.int64)[:, None] * num_columns + o_c[None, :]
        tl.store(tokens_ptrs, b_x, mask=moved[:, None] & m_c[None, :])
        if column_tile == 0:
            tl.store(index_ptr + row, o_n.to(tl.int64), mask=moved)
        if FUSE:
            # Never times zero: a NaN in a kept row must not reach the sum.
            b_sum += tl.where(dropped[:, None], mean.to(SUM)[:, None] * b_x.to(SUM), 0)

    if FUSE:
        b_fused = tl.sum(b_sum, axis=0).to(tokens_ptr.dtype.element_ty)
        tl.store(tokens_ptr + num_kept.to(tl.int64) * num_columns + o_c, b_fused, mask=m_c)


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


def gather_topk(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, columns = x.shape
    num_patches = scores.shape[-1]
    if num_patches > MAX_PATCHES:
        return reference.gather_topk(x, scores, num_keep, num_prefix_tokens=num_prefix_tokens)
    num_kept = num_prefix_tokens + num_keep
    index = x.new_empty((batch, num_kept), dtype=torch.int64)
    heads, strides = _heads_and_strides(scores)
    size, chunk, threads = _block_chunk_threads(num_patches)
    rows, width = move_tile(columns, x.element_size())
    tiles = cdiv(num_tokens, rows) * cdiv(columns, width)
    if num_patches > MAX_RANKED or batch * tiles > MAX_SELECTING or columns == 0:
        rows = block(min(num_tokens, 1024))
        scalars = num_tokens, num_patches, num_keep, *strides, heads, size, chunk, rows
        launch(_select_kernel, batch if num_kept else 0, index, (scores, index), scalars, threads)
        return gather_rows(x, index), index
    tokens = x.new_empty((batch, num_kept, columns))
    sizes = num_tokens, num_patches, num_keep, columns, tiles
    scalars = *sizes, *x.stride(), *strides, False, heads, size, chunk, rows, width
    pointers = x, scores, tokens, index
    launch(_select_and_move_kernel, batch * tiles, index, pointers, scalars, threads)
    return tokens, index


# ---------------------------------------------------------------------- gather_topk_fuse


def gather_topk_fuse(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, columns = x.shape
    num_patches = scores.shape[-1]
    if num_patches > MAX_PATCHES:
        return reference.gather_topk_fuse(x, scores, num_keep, num_prefix_tokens=num_prefix_tokens)
    num_kept = num_prefix_tokens + num_keep
    index = x.new_empty((batch, num_kept), dtype=torch.int64)
    tokens = x.new_empty((batch, num_kept + 1, columns))
    heads, strides = _heads_and_strides(scores)
    size, chunk, threads = _block_chunk_threads(num_patches)
    rows, width = sum_tile(columns, x.element_size())
    # 16 bytes for each thread at least, where a long image brought many.
    rows = max(rows, threads * 16 // (width * x.element_size()))
    tiles = max(1, cdiv(columns, width))
    sizes = num_tokens, num_patches, num_keep, columns, tiles
    scalars = *sizes, *x.stride(), *strides, True, heads, size, chunk, rows, width
    pointers = x, scores, tokens, index
    launch(_select_and_move_kernel, batch * tiles, index, pointers, scalars, threads)
    return tokens, index


@triton.jit(do_not_specialize=["num_tokens", "num_patches", "num_rows", "tiles"])
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
    tiles,  # per image
    grad_stride_b,
    grad_stride_r,
    grad_stride_c,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    scores_stride_b,
    scores_stride_h,
    scores_stride_n,
    index_stride_b,
    index_stride_r,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program has whole rows: the gradient of a score is the product of two of them."""
    b, tile = image_and_tile(tiles)
    o_n = tile * ROWS + tl.arange(0, ROWS)
    o_p = o_n - (num_tokens - num_patches)
    m_n = o_n < num_tokens
    m_p = m_n & (o_p >= 0)
    b_r = rows_moved_to(o_n, index_ptr + b * index_stride_b, index_stride_r, num_rows, ROWS, CHUNK)
    kept = b_r >= 0
    dropped = m_p & (b_r < 0)
    scores_ptr += b * scores_stride_b
    mean = _head_mean(scores_ptr, o_p, dropped, scores_stride_h, scores_stride_n, HEADS)

    SUM: tl.constexpr = _sum_dtype(x_ptr, scores_ptr)
    b_dot = tl.zeros([ROWS, COLUMNS], SUM)
    for start in range(0, num_columns, COLUMNS):
        o_c = start + tl.arange(0, COLUMNS).to(tl.int64)
        m_c = o_c < num_columns
        grad_ptrs = grad_ptr + b * grad_stride_b + o_c * grad_stride_c
        fused_ptrs = grad_ptrs + num_rows.to(tl.int64) * grad_stride_r
        b_fused = tl.load(fused_ptrs, mask=m_c, other=0).to(SUM)[None, :]
        kept_ptrs = grad_ptrs[None, :] + b_r.to(tl.int64)[:, None] * grad_stride_r
        b_kept = tl.load(kept_ptrs, mask=kept[:, None] & m_c[None, :], other=0)
        x_ptrs = x_ptr + b * x_stride_b + o_n.to(tl.int64)[:, None] * x_stride_n
        x_ptrs += o_c[None, :] * x_stride_c
        b_x = tl.load(x_ptrs, mask=dropped[:, None] & m_c[None, :], other=0).to(SUM)
        b_dot += tl.where(dropped[:, None], b_x * b_fused, 0)
        b_grad_x = tl.where(dropped[:, None], mean.to(SUM)[:, None] * b_fused, 0)
        b_grad_x = tl.where(kept[:, None], b_kept, b_grad_x.to(b_kept.dtype))
        grad_x_ptrs = grad_x_ptr + (b * num_tokens + o_n)[:, None] * num_columns + o_c[None, :]
        tl.store(grad_x_ptrs, b_grad_x, mask=m_n[:, None] & m_c[None, :])

    b_grad = tl.sum(b_dot, axis=1)
    if HEADS > 1:
        if tl.float64 == SUM:
            b_grad = b_grad / HEADS
        else:
            b_grad = tl.div_rn(b_grad, tl.full([], HEADS, tl.float32))
    b_grad = b_grad.to(grad_scores_ptr.dtype.element_ty)
    for h in range(HEADS):
        tl.store(grad_scores_ptr + (b * HEADS + h) * num_patches + o_p, b_grad, mask=m_p)


def gather_topk_fuse_backward(
    grad: Tensor, x: Tensor, scores: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, columns = x.shape
    grad_x = x.new_empty((batch, num_tokens, columns))
    grad_scores = scores.new_empty(scores.shape)
    heads, strides = _heads_and_strides(scores)
    rows, width = move_tile(columns, x.element_size())
    tiles = cdiv(num_tokens, rows)
    pointers = grad, x, scores, index, grad_x, grad_scores
    sizes = num_tokens, scores.shape[-1], index.shape[1], columns, tiles
    strides = *grad.stride(), *x.stride(), *strides, *index.stride()
    scalars = *sizes, *strides, heads, rows, width, LOOKUP // rows
    launch(_gather_topk_fuse_backward_kernel, batch * tiles, grad_x, pointers, scalars)
    return grad_x, grad_scores
