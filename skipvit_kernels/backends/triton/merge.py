"""Patches that merge and come back: match_higher, match_kept, merge_rows, restore_rows, backwards.

What sums over the rows of an owner has them in order: one launch finds, for every row of an image,
how many rows go before it (those of lower owners, and those before it of its own), which is n * n
comparisons and no atomic; the next one walks through each owner's rows, from the first to the last.

An owner out of [0, M) names no row: `merge_rows` leaves such a row out and its gradient is zero,
`restore_rows` leaves it as it is. An owner that no row has: NaN merged, zeros of its gradients.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipvit_kernels.backends.triton.launch import (
    cdiv,
    image_and_tile,
    image_row_column,
    launch,
    move_tile,
    ptrs_at,
    sum_dtype,
)
from skipvit_kernels.backends.triton.rows import LOOKUP, rows_moved_to
from skipvit_kernels.backends.triton.topk import _key, _over_heads

# ---------------------------------------------------------------------- products of features


@triton.jit
def _features(features_ptr, o_n, o_d, m_n, num_columns, features_strides, HEADS: tl.constexpr):
    """[TOKENS, WIDTH] of an image, averaged over the heads as scores are."""
    features_ptrs = ptrs_at(features_ptr, (o_n[:, None], o_d[None, :]), features_strides[2:])
    mask = m_n[:, None] & (o_d < num_columns)[None, :]
    b_features = tl.load(features_ptrs, mask=mask, other=0)
    if HEADS > 1:
        b_features = b_features.to(sum_dtype(features_ptr))
        for _ in tl.static_range(1, HEADS):
            features_ptrs += features_strides[1]
            b_features += tl.load(features_ptrs, mask=mask, other=0).to(b_features.dtype)
        b_features = _over_heads(b_features, HEADS)
    return b_features


@triton.jit
def _cosines(
    features_ptr, o_n, m_n, o_k, m_k, num_columns, features_strides,
    HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """[ROWS, KEPT] products of rows o_n with the unit vectors of rows o_k of an image."""
    SUM: tl.constexpr = sum_dtype(features_ptr)
    b_dot = tl.zeros([o_n.shape[0], o_k.shape[0]], SUM)
    b_square = tl.zeros([o_k.shape[0]], SUM)
    # With heads the copies that a pipeline keeps of them fill half of the shared memory.
    for column in tl.range(0, num_columns, WIDTH, num_stages=1 if HEADS > 1 else 2):
        o_d = column + tl.arange(0, WIDTH)
        b_x = _features(features_ptr, o_n, o_d, m_n, num_columns, features_strides, HEADS)
        b_kept = _features(features_ptr, o_k, o_d, m_k, num_columns, features_strides, HEADS)
        if SUM.primitive_bitwidth == 64:
            b_dot += tl.sum(b_x[:, None, :] * b_kept[None, :, :], axis=2)
        else:
            b_dot = tl.dot(b_x, tl.trans(b_kept), b_dot, input_precision="ieee")
        b_kept = b_kept.to(SUM)
        b_square += tl.sum(b_kept * b_kept, axis=1)
    b_norm = tl.sqrt(b_square)
    return b_dot / tl.where(b_norm > 0, b_norm, 1.0)[None, :]


def _head_strides(features: Tensor) -> tuple[int, tuple[int, ...]]:
    """H, and the strides of (B, H, N, D), of which (B, N, D) is one head."""
    if features.dim() == 4:
        return features.shape[1], features.stride()
    return 1, (features.stride(0), 0, *features.stride()[1:])


def _tile(features: Tensor, heads: int) -> tuple[int, int]:
    """Rows by rows, and the channels of a step."""
    # A product in float32 holds whole tiles in registers, one in float64 each of its terms.
    rows = 16 if features.dtype == torch.float64 else 32
    return rows, 32 if heads == 1 and features.element_size() == 2 else 16


# -------------------------------------------------------------------------- match_higher


@triton.jit(do_not_specialize=["num_patches", "num_prefix"])
def _match_higher_kernel(
    features_ptr,  # (B, H, P + n, D)
    ranks_ptr,  # (B, n)
    out_ptr,  # (B, n), contiguous
    num_patches,
    num_prefix,
    num_columns,
    features_strides,
    ranks_strides,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each program compares its patches with all others; no cosine is written."""
    o_b, tile = image_and_tile(tl.cdiv(num_patches, ROWS))
    o_n = tile * ROWS + tl.arange(0, ROWS)
    m_n = o_n < num_patches
    SUM: tl.constexpr = sum_dtype(features_ptr)
    KEY: tl.constexpr = tl.int64 if SUM.primitive_bitwidth == 64 else tl.int32
    LOWEST: tl.constexpr = -(2 ** (KEY.primitive_bitwidth - 1))
    features_ptr = ptrs_at(features_ptr, (o_b,), features_strides[:1])
    features_ptr = ptrs_at(features_ptr, (num_prefix,), features_strides[2:3])
    b_rank = tl.load(ptrs_at(ranks_ptr, (o_b, o_n), ranks_strides), mask=m_n, other=0)
    b_rank = _key(b_rank, m_n)
    b_largest = tl.full([ROWS], LOWEST, KEY)
    b_square = tl.zeros([ROWS], SUM)
    for column in range(0, num_columns, WIDTH):
        o_d = column + tl.arange(0, WIDTH)
        b_x = _features(features_ptr, o_n, o_d, m_n, num_columns, features_strides, HEADS).to(SUM)
        b_square += tl.sum(b_x * b_x, axis=1)
    for start in range(0, num_patches, ROWS):
        o_k = start + tl.arange(0, ROWS)
        m_k = o_k < num_patches
        b_other = tl.load(ptrs_at(ranks_ptr, (o_b, o_k), ranks_strides), mask=m_k, other=0)
        b_cosine = _cosines(
            features_ptr, o_n, m_n, o_k, m_k, num_columns, features_strides, HEADS, WIDTH
        )
        b_key = _key(b_cosine, _key(b_other, m_k)[None, :] > b_rank[:, None])
        b_largest = tl.maximum(tl.max(b_key, axis=1), b_largest)
    # The cosine that the key was made of; that of NaN has the bits of one.
    b_bits = b_largest ^ ((b_largest >> (KEY.primitive_bitwidth - 1)) & (-(LOWEST + 1)))
    b_norm = tl.sqrt(b_square)
    b_cosine = b_bits.to(SUM, bitcast=True) / tl.where(b_norm > 0, b_norm, 1.0)
    b_out = tl.where(b_largest == LOWEST, float("-inf"), b_cosine).to(tl.float32)
    tl.store(out_ptr + o_b * num_patches + o_n, b_out, mask=m_n)


def match_higher(features: Tensor, ranks: Tensor, *, num_prefix_tokens: int = 1) -> Tensor:
    batch, num_patches = ranks.shape
    heads, strides = _head_strides(features)
    rows, width = _tile(features, heads)
    out = ranks.new_empty(ranks.shape)
    launch(
        _match_higher_kernel, batch * cdiv(num_patches, rows), out,
        features_ptr=features, ranks_ptr=ranks, out_ptr=out, num_patches=num_patches,
        num_prefix=num_prefix_tokens, num_columns=features.shape[-1], features_strides=strides,
        ranks_strides=ranks.stride(), HEADS=heads, ROWS=rows, WIDTH=width,
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------------- match_kept


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_prefix"])
def _match_kept_kernel(
    features_ptr,  # (B, H, N, D)
    index_ptr,  # (B, M)
    owner_ptr,  # (B, N), contiguous
    num_tokens,
    num_rows,
    num_prefix,
    num_columns,
    features_strides,
    index_strides,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each program compares its rows with all kept patches; no cosine is written."""
    o_b, tile = image_and_tile(tl.cdiv(num_tokens, ROWS))
    o_n = tile * ROWS + tl.arange(0, ROWS)
    m_n = o_n < num_tokens
    SUM: tl.constexpr = sum_dtype(features_ptr)
    KEY: tl.constexpr = tl.int64 if SUM.primitive_bitwidth == 64 else tl.int32
    LOWEST: tl.constexpr = -(2 ** (KEY.primitive_bitwidth - 1))
    b_largest = tl.full([ROWS], LOWEST, KEY)
    b_owner = tl.zeros([ROWS], tl.int32) + num_prefix
    features_ptr = ptrs_at(features_ptr, (o_b,), features_strides[:1])
    for start in range(num_prefix, num_rows, KEPT):
        o_r = start + tl.arange(0, KEPT)
        index_ptrs = ptrs_at(index_ptr, (o_b, o_r), index_strides)
        b_k = tl.load(index_ptrs, mask=o_r < num_rows, other=-1)
        m_k = (b_k >= 0) & (b_k < num_tokens)
        b_cosine = _cosines(
            features_ptr, o_n, m_n, b_k, m_k, num_columns, features_strides, HEADS, WIDTH
        )
        b_key = _key(b_cosine, m_k[None, :])
        b_top = tl.max(b_key, axis=1)
        b_first = tl.min(tl.where(b_key == b_top[:, None], o_r[None, :], num_rows), axis=1)
        b_owner = tl.where(b_top > b_largest, b_first, b_owner)
        b_largest = tl.maximum(b_top, b_largest)
    b_own = rows_moved_to(index_ptr, o_b, o_n, num_rows, index_strides)
    b_owner = tl.where(b_own >= 0, b_own, b_owner).to(tl.int64)
    tl.store(owner_ptr + o_b * num_tokens + o_n, b_owner, mask=m_n)


def match_kept(features: Tensor, index: Tensor, *, num_prefix_tokens: int = 1) -> Tensor:
    """An entry of the index out of range is no kept patch."""
    batch, num_tokens, columns = features.shape[0], features.shape[-2], features.shape[-1]
    heads, strides = _head_strides(features)
    rows, width = _tile(features, heads)
    owner = index.new_empty((batch, num_tokens))
    launch(
        _match_kept_kernel, batch * cdiv(num_tokens, rows), owner,
        features_ptr=features, index_ptr=index, owner_ptr=owner,
        num_tokens=num_tokens, num_rows=index.shape[1], num_prefix=num_prefix_tokens,
        num_columns=columns, features_strides=strides, index_strides=index.stride(),
        HEADS=heads, ROWS=rows, KEPT=rows, WIDTH=width,
    )  # fmt: skip
    return owner


# ------------------------------------------------------------------- the rows of an owner


@triton.jit
def _owners(owner_ptr, o_b, o_n, num_tokens, num_rows, owner_strides):
    """int32: an owner out of range is num_rows, what is no row num_rows + 1."""
    m_n = o_n < num_tokens
    b_owner = tl.load(ptrs_at(owner_ptr, (o_b, o_n), owner_strides), mask=m_n, other=-1)
    b_owner = tl.where((b_owner >= 0) & (b_owner < num_rows), b_owner, num_rows).to(tl.int32)
    return tl.where(m_n, b_owner, num_rows + 1)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _group_rows_kernel(
    owner_ptr,  # (B, N)
    starts_ptr,  # (B, M + 1), contiguous: the rows of owners below m
    rows_ptr,  # (B, N), contiguous: the rows of owner 0, of owner 1, ..., of none
    num_tokens,
    num_rows,
    owner_strides,
    ROWS: tl.constexpr,
):
    CHUNK: tl.constexpr = LOOKUP // ROWS
    o_b, tile = image_and_tile(tl.cdiv(tl.maximum(num_tokens, num_rows + 1), ROWS))
    o_n = tile * ROWS + tl.arange(0, ROWS)
    b_owner = _owners(owner_ptr, o_b, o_n, num_tokens, num_rows, owner_strides)
    b_place = tl.zeros([ROWS], tl.int32)
    b_below = tl.zeros([ROWS], tl.int32)
    for start in range(0, num_tokens, CHUNK):
        o_j = start + tl.arange(0, CHUNK)
        b_other = _owners(owner_ptr, o_b, o_j, num_tokens, num_rows, owner_strides)[None, :]
        # Of the same owner those of a lower position.
        b_bar = b_owner[:, None] + (o_j[None, :] < o_n[:, None]).to(tl.int32)
        b_place += tl.sum((b_other < b_bar).to(tl.int32), axis=1)
        b_below += tl.sum((b_other < o_n[:, None]).to(tl.int32), axis=1)
    rows_ptrs = rows_ptr + o_b * num_tokens + b_place
    tl.store(rows_ptrs, o_n, mask=o_n < num_tokens)
    starts_ptrs = starts_ptr + o_b * (num_rows + 1) + o_n
    tl.store(starts_ptrs, b_below, mask=o_n <= num_rows)


def _group_rows(owner: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """starts (B, M + 1) and rows (B, N), int32."""
    batch, num_tokens = owner.shape
    starts = owner.new_empty((batch, num_rows + 1), dtype=torch.int32)
    rows = owner.new_empty((batch, num_tokens), dtype=torch.int32)
    launch(
        _group_rows_kernel, batch * cdiv(max(num_tokens, num_rows + 1), 16), starts,
        owner_ptr=owner, starts_ptr=starts, rows_ptr=rows, num_tokens=num_tokens,
        num_rows=num_rows, owner_strides=owner.stride(), ROWS=16,
    )  # fmt: skip
    return starts, rows


@triton.jit
def _groups(starts_ptr, o_b, o_m, num_tokens, num_rows):
    """Where the rows of each owner start, and how many they are; owner M stands for no owner."""
    starts_ptrs = starts_ptr + o_b * (num_rows + 1) + o_m
    b_start = tl.load(starts_ptrs, mask=o_m <= num_rows, other=num_tokens)
    b_end = tl.load(starts_ptrs + 1, mask=o_m < num_rows, other=num_tokens)
    return b_start, b_end - b_start


@triton.jit
def _divide(x, y):
    """An IEEE division: Triton's `/` is none in float32 on NVIDIA."""
    return x / y if y.dtype == tl.float64 else tl.div_rn(x, y)


# ---------------------------------------------------------------------------- merge_rows


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _merge_rows_kernel(
    x_ptr,  # (B, N, C)
    sizes_ptr,  # (B, N), or None: 1 each
    starts_ptr,  # (B, M + 1), contiguous, like what follows
    rows_ptr,  # (B, N)
    tokens_ptr,  # (B, M, C)
    merged_ptr,  # (B, M)
    num_tokens,
    num_rows,
    num_columns,
    x_strides,
    sizes_strides,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Rows without channels have sizes too.
    o_b, row, column = image_row_column(num_rows, tl.maximum(num_columns, 1), ROWS, COLUMNS)
    o_m, o_c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    m_m, m_c = o_m < num_rows, o_c < num_columns
    b_start, b_count = _groups(starts_ptr, o_b, o_m, num_tokens, num_rows)
    b_count = tl.where(m_m, b_count, 0)
    SUM: tl.constexpr = sum_dtype(x_ptr)
    b_sum = tl.zeros([ROWS, COLUMNS], SUM)
    b_size = tl.zeros([ROWS], tl.float32)
    b_x = tl.zeros([ROWS, COLUMNS], x_ptr.dtype.element_ty)
    for r in range(0, tl.max(b_count)):
        m_r = r < b_count
        b_n = tl.load(rows_ptr + o_b * num_tokens + b_start + r, mask=m_r, other=0)
        x_ptrs = ptrs_at(x_ptr, (o_b, b_n[:, None], o_c[None, :]), x_strides)
        m_x = m_r[:, None] & m_c[None, :]
        # An owner's last row stays: if it is the only one, it is the result.
        b_x = tl.where(m_x, tl.load(x_ptrs, mask=m_x, other=0), b_x)
        b_weight = m_r.to(tl.float32)
        if sizes_ptr is not None:
            b_weight = tl.load(ptrs_at(sizes_ptr, (o_b, b_n), sizes_strides), mask=m_r, other=0)
        b_size += b_weight
        b_sum += tl.where(m_x, b_weight.to(SUM)[:, None] * b_x.to(SUM), 0)
    b_mean = _divide(b_sum, b_size.to(SUM)[:, None] + tl.zeros([ROWS, COLUMNS], SUM))
    b_out = tl.where((b_count == 1)[:, None], b_x, b_mean.to(b_x.dtype))
    tokens_ptrs = ptrs_at(
        tokens_ptr, (o_b * num_rows + o_m[:, None], o_c[None, :]), (num_columns, 1)
    )
    tl.store(tokens_ptrs, b_out, mask=m_m[:, None] & m_c[None, :])
    if column == 0:
        tl.store(merged_ptr + o_b * num_rows + o_m, b_size, mask=m_m)


def merge_rows(
    x: Tensor, owner: Tensor, num_rows: int, *, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, columns = x.shape
    tokens = x.new_empty((batch, num_rows, columns))
    merged = x.new_empty((batch, num_rows), dtype=torch.float32)
    starts, rows = _group_rows(owner, num_rows)
    height, width = move_tile(columns, x.element_size())
    programs = batch * cdiv(num_rows, height) * cdiv(max(1, columns), width)
    launch(
        _merge_rows_kernel, programs, tokens,
        x_ptr=x, sizes_ptr=sizes, starts_ptr=starts, rows_ptr=rows, tokens_ptr=tokens,
        merged_ptr=merged, num_tokens=num_tokens, num_rows=num_rows, num_columns=columns,
        x_strides=x.stride(), sizes_strides=None if sizes is None else sizes.stride(),
        ROWS=height, COLUMNS=width,
    )  # fmt: skip
    return tokens, merged


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _merge_rows_backward_kernel(
    grad_ptr,  # (B, M, C)
    owner_ptr,  # (B, N)
    sizes_ptr,  # (B, N), or None: 1 each
    merged_ptr,  # (B, M)
    grad_x_ptr,  # (B, N, C), contiguous
    num_tokens,
    num_rows,
    num_columns,
    grad_strides,
    owner_strides,
    sizes_strides,
    merged_strides,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_b, row, column = image_row_column(num_tokens, num_columns, ROWS, COLUMNS)
    o_n, o_c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    m_n, m_c = o_n < num_tokens, o_c < num_columns
    b_m = _owners(owner_ptr, o_b, o_n, num_tokens, num_rows, owner_strides)
    m_m = b_m < num_rows
    SUM: tl.constexpr = sum_dtype(grad_ptr)
    merged_ptrs = ptrs_at(merged_ptr, (o_b, b_m), merged_strides)
    b_merged = tl.load(merged_ptrs, mask=m_m, other=1).to(SUM)
    b_size = tl.full([ROWS], 1, SUM)
    if sizes_ptr is not None:
        b_size = tl.load(ptrs_at(sizes_ptr, (o_b, o_n), sizes_strides), mask=m_n, other=0).to(SUM)
    b_weight = _divide(b_size, b_merged)[:, None]
    grad_ptrs = ptrs_at(grad_ptr, (o_b, b_m[:, None], o_c[None, :]), grad_strides)
    b_grad = tl.load(grad_ptrs, mask=m_m[:, None] & m_c[None, :], other=0)
    b_grad = (b_weight * b_grad.to(SUM)).to(b_grad.dtype)
    grad_x_ptrs = ptrs_at(
        grad_x_ptr, (o_b * num_tokens + o_n[:, None], o_c[None, :]), (num_columns, 1)
    )
    tl.store(grad_x_ptrs, b_grad, mask=m_n[:, None] & m_c[None, :])


def merge_rows_backward(
    grad: Tensor, owner: Tensor, sizes: Tensor | None, merged_sizes: Tensor
) -> Tensor:
    batch, num_rows, columns = grad.shape
    num_tokens = owner.shape[1]
    grad_x = grad.new_empty((batch, num_tokens, columns))
    height, width = move_tile(columns, grad.element_size())
    tiles = cdiv(num_tokens, height) * cdiv(columns, width)
    launch(
        _merge_rows_backward_kernel, batch * tiles, grad_x,
        grad_ptr=grad, owner_ptr=owner, sizes_ptr=sizes, merged_ptr=merged_sizes,
        grad_x_ptr=grad_x, num_tokens=num_tokens, num_rows=num_rows, num_columns=columns,
        grad_strides=grad.stride(), owner_strides=owner.stride(),
        sizes_strides=None if sizes is None else sizes.stride(),
        merged_strides=merged_sizes.stride(), ROWS=height, COLUMNS=width,
    )  # fmt: skip
    return grad_x


# -------------------------------------------------------------------------- restore_rows


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _restore_rows_kernel(
    x_ptr,  # (B, N, C)
    before_ptr,  # (B, M, C), like after
    after_ptr,
    owner_ptr,  # (B, N)
    out_ptr,  # (B, N, C), contiguous
    num_tokens,
    num_rows,
    num_columns,
    x_strides,
    before_strides,
    after_strides,
    owner_strides,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_b, row, column = image_row_column(num_tokens, num_columns, ROWS, COLUMNS)
    o_n, o_c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    m_out = (o_n < num_tokens)[:, None] & (o_c < num_columns)[None, :]
    b_m = _owners(owner_ptr, o_b, o_n, num_tokens, num_rows, owner_strides)
    CHUNK: tl.constexpr = LOOKUP // ROWS
    b_count = tl.zeros([ROWS], tl.int32)
    for start in range(0, num_tokens, CHUNK):
        o_j = start + tl.arange(0, CHUNK)
        b_other = _owners(owner_ptr, o_b, o_j, num_tokens, num_rows, owner_strides)
        b_count += tl.sum((b_other[None, :] == b_m[:, None]).to(tl.int32), axis=1)
    m_m = m_out & (b_m < num_rows)[:, None]
    m_alone = m_m & (b_count == 1)[:, None]
    SUM: tl.constexpr = sum_dtype(x_ptr)
    after_ptrs = ptrs_at(after_ptr, (o_b, b_m[:, None], o_c[None, :]), after_strides)
    b_after = tl.load(after_ptrs, mask=m_m, other=0)
    before_ptrs = ptrs_at(before_ptr, (o_b, b_m[:, None], o_c[None, :]), before_strides)
    b_before = tl.load(before_ptrs, mask=m_m & ~m_alone, other=0)
    x_ptrs = ptrs_at(x_ptr, (o_b, o_n[:, None], o_c[None, :]), x_strides)
    b_x = tl.load(x_ptrs, mask=m_out & ~m_alone, other=0)
    b_gained = (b_x.to(SUM) + b_after.to(SUM) - b_before.to(SUM)).to(b_x.dtype)
    b_out = tl.where(m_alone, b_after, tl.where(m_m, b_gained, b_x))
    out_ptrs = ptrs_at(out_ptr, (o_b * num_tokens + o_n[:, None], o_c[None, :]), (num_columns, 1))
    tl.store(out_ptrs, b_out, mask=m_out)


def restore_rows(x: Tensor, before: Tensor, after: Tensor, owner: Tensor) -> Tensor:
    batch, num_tokens, columns = x.shape
    out = x.new_empty((batch, num_tokens, columns))
    height, width = move_tile(columns, x.element_size())
    tiles = cdiv(num_tokens, height) * cdiv(columns, width)
    launch(
        _restore_rows_kernel, batch * tiles, out,
        x_ptr=x, before_ptr=before, after_ptr=after, owner_ptr=owner, out_ptr=out,
        num_tokens=num_tokens, num_rows=after.shape[1], num_columns=columns,
        x_strides=x.stride(), before_strides=before.stride(), after_strides=after.stride(),
        owner_strides=owner.stride(), ROWS=height, COLUMNS=width,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _restore_rows_backward_kernel(
    grad_ptr,  # (B, N, C)
    starts_ptr,  # (B, M + 1), contiguous, like what follows
    rows_ptr,  # (B, N)
    grad_x_ptr,  # (B, N, C)
    grad_before_ptr,  # (B, M, C), like grad_after
    grad_after_ptr,
    num_tokens,
    num_rows,
    num_columns,
    grad_strides,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program has the rows of grad_x whose owners it sums; those of no owner are grad's."""
    o_b, row, column = image_row_column(num_rows + 1, num_columns, ROWS, COLUMNS)
    o_m, o_c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    m_c = o_c < num_columns
    m_out = (o_m < num_rows)[:, None] & m_c[None, :]
    b_start, b_count = _groups(starts_ptr, o_b, o_m, num_tokens, num_rows)
    b_alone = (b_count == 1) & (o_m < num_rows)
    SUM: tl.constexpr = sum_dtype(grad_ptr)
    b_sum = tl.zeros([ROWS, COLUMNS], SUM)
    b_grad = tl.zeros([ROWS, COLUMNS], grad_ptr.dtype.element_ty)
    for r in range(0, tl.max(b_count)):
        m_r = r < b_count
        b_n = tl.load(rows_ptr + o_b * num_tokens + b_start + r, mask=m_r, other=0)
        m_grad = m_r[:, None] & m_c[None, :]
        grad_ptrs = ptrs_at(grad_ptr, (o_b, b_n[:, None], o_c[None, :]), grad_strides)
        b_grad = tl.where(m_grad, tl.load(grad_ptrs, mask=m_grad, other=0), b_grad)
        b_sum += tl.where(m_grad, b_grad.to(SUM), 0)
        grad_x_ptrs = ptrs_at(
            grad_x_ptr, (o_b * num_tokens + b_n[:, None], o_c[None, :]), (num_columns, 1)
        )
        b_zero = tl.zeros([ROWS, COLUMNS], b_grad.dtype)
        tl.store(grad_x_ptrs, tl.where(b_alone[:, None], b_zero, b_grad), mask=m_grad)
    out = (o_b * num_rows + o_m[:, None], o_c[None, :])
    b_after = tl.where(b_alone[:, None], b_grad, b_sum.to(b_grad.dtype))
    tl.store(ptrs_at(grad_after_ptr, out, (num_columns, 1)), b_after, mask=m_out)
    b_before = tl.where(b_alone[:, None], 0.0, 0.0 - b_sum).to(b_grad.dtype)
    tl.store(ptrs_at(grad_before_ptr, out, (num_columns, 1)), b_before, mask=m_out)


def restore_rows_backward(
    grad: Tensor, owner: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, before and after."""
    batch, num_tokens, columns = grad.shape
    grad_x = grad.new_empty((batch, num_tokens, columns))
    grad_before = grad.new_empty((batch, num_rows, columns))
    grad_after = grad.new_empty((batch, num_rows, columns))
    starts, rows = _group_rows(owner, num_rows)
    height, width = move_tile(columns, grad.element_size())
    tiles = cdiv(num_rows + 1, height) * cdiv(columns, width)
    launch(
        _restore_rows_backward_kernel, batch * tiles, grad_x,
        grad_ptr=grad, starts_ptr=starts, rows_ptr=rows, grad_x_ptr=grad_x,
        grad_before_ptr=grad_before, grad_after_ptr=grad_after, num_tokens=num_tokens,
        num_rows=num_rows, num_columns=columns, grad_strides=grad.stride(),
        ROWS=height, COLUMNS=width,
    )  # fmt: skip
    return grad_x, grad_before, grad_after
