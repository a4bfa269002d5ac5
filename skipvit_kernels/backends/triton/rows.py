"""Rows that move: gather_rows, scatter_back and their backwards.

A kernel that fills all N rows of an image starts from the rows it writes, not from the index: each
program looks its 16 rows up in the index, so that no row is written twice, none is left out and
nothing has to be cleared first. A row out of range is read as zeros or not written at all.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from skipvit_kernels.backends.triton.launch import (
    cdiv,
    image_and_tile,
    launch,
    move_tile,
    sum_tile,
)

# Comparisons of a program at once while it looks its rows up in the index: 8 a thread.
LOOKUP = 1024

# --------------------------------------------------------------------------- gather_rows


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "tiles"])
def _gather_rows_kernel(
    x_ptr,  # (B, N, C)
    index_ptr,  # (B, M)
    out_ptr,  # (B, M, C), contiguous
    num_tokens,
    num_rows,
    num_columns,
    tiles,  # per image
    x_stride_b,
    x_stride_n,
    x_stride_c,
    index_stride_b,
    index_stride_r,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    b, tile = image_and_tile(tiles)
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    o_r = tile // column_tiles * ROWS + tl.arange(0, ROWS).to(tl.int64)
    o_c = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    m_r, m_c = o_r < num_rows, o_c < num_columns

    b_n = tl.load(index_ptr + b * index_stride_b + o_r * index_stride_r, mask=m_r, other=-1)
    m_n = (b_n >= 0) & (b_n < num_tokens)
    x_ptrs = x_ptr + b * x_stride_b + b_n[:, None] * x_stride_n + o_c[None, :] * x_stride_c
    b_x = tl.load(x_ptrs, mask=m_n[:, None] & m_c[None, :], other=0)
    out_ptrs = out_ptr + (b * num_rows + o_r)[:, None] * num_columns + o_c[None, :]
    tl.store(out_ptrs, b_x, mask=m_r[:, None] & m_c[None, :])


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    batch, num_tokens, columns = x.shape
    num_rows = index.shape[1]
    out = x.new_empty((batch, num_rows, columns))
    rows, width = move_tile(columns, x.element_size())
    tiles = cdiv(num_rows, rows) * cdiv(columns, width)
    scalars = num_tokens, num_rows, columns, tiles, *x.stride(), *index.stride(), rows, width
    launch(_gather_rows_kernel, batch * tiles, out, (x, index, out), scalars)
    return out


# -------------------------------------------- scatter_back, and gather_rows' backward


@triton.jit
def rows_moved_to(
    o_n,  # [ROWS] positions
    index_ptr,  # (M,) of one image
    index_stride_r,
    num_rows,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """[ROWS]: the r with index[r] == n, the last one if there are several; -1 if there is none."""
    b_row = tl.full([ROWS, CHUNK], -1, tl.int32)
    for start in range(0, num_rows, CHUNK):
        o_r = start + tl.arange(0, CHUNK)
        r_ptrs = index_ptr + o_r.to(tl.int64) * index_stride_r
        b_index = tl.load(r_ptrs, mask=o_r < num_rows, other=-1).to(tl.int32)
        b_row = tl.where(b_index[None, :] == o_n[:, None], o_r[None, :], b_row)
    return tl.max(b_row, axis=1)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "tiles"])
def _scatter_rows_kernel(
    x_ptr,  # (B, N, C), or None: rows that are not in the index are zeros
    tokens_ptr,  # (B, M, C)
    index_ptr,  # (B, M)
    update_ptr,  # (B, C), added to the rows of x; or None
    out_ptr,  # (B, N, C), contiguous
    num_tokens,
    num_rows,
    num_columns,
    tiles,  # per image
    x_stride_b,
    x_stride_n,
    x_stride_c,
    tokens_stride_b,
    tokens_stride_r,
    tokens_stride_c,
    index_stride_b,
    index_stride_r,
    update_stride_b,
    update_stride_c,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    b, tile = image_and_tile(tiles)
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    o_n = tile // column_tiles * ROWS + tl.arange(0, ROWS)
    o_c = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    m_n, m_c = o_n < num_tokens, o_c < num_columns

    b_r = rows_moved_to(o_n, index_ptr + b * index_stride_b, index_stride_r, num_rows, ROWS, CHUNK)
    m_moved = (b_r >= 0)[:, None] & m_c[None, :]
    tokens_ptrs = tokens_ptr + b * tokens_stride_b + o_c[None, :] * tokens_stride_c
    tokens_ptrs += b_r.to(tl.int64)[:, None] * tokens_stride_r
    b_out = tl.load(tokens_ptrs, mask=m_moved, other=0)
    m_out = m_n[:, None] & m_c[None, :]
    if x_ptr is not None:
        x_ptrs = x_ptr + b * x_stride_b + o_c[None, :] * x_stride_c
        x_ptrs += o_n.to(tl.int64)[:, None] * x_stride_n
        b_x = tl.load(x_ptrs, mask=m_out & (b_r < 0)[:, None], other=0)
        if update_ptr is not None:
            update_ptrs = update_ptr + b * update_stride_b + o_c * update_stride_c
            b_update = tl.load(update_ptrs, mask=m_c, other=0)[None, :]
            if x_ptr.dtype.element_ty == tl.float64:
                b_x += b_update
            else:
                b_x = (b_x.to(tl.float32) + b_update.to(tl.float32)).to(b_x.dtype)
        b_out = tl.where(m_moved, b_out, b_x)
    out_ptrs = out_ptr + (b * num_tokens + o_n)[:, None] * num_columns + o_c[None, :]
    tl.store(out_ptrs, b_out, mask=m_out)


def _scatter_rows(
    x: Tensor | None, tokens: Tensor, index: Tensor, update: Tensor | None, num_tokens: int
) -> Tensor:
    batch, num_rows, columns = tokens.shape
    out = tokens.new_empty((batch, num_tokens, columns))
    rows, width = move_tile(columns, tokens.element_size())
    tiles = cdiv(num_tokens, rows) * cdiv(columns, width)
    pointers = x, tokens, index, update, out
    x_strides = (0, 0, 0) if x is None else x.stride()
    update_strides = (0, 0) if update is None else update.stride()
    strides = *x_strides, *tokens.stride(), *index.stride(), *update_strides
    scalars = num_tokens, num_rows, columns, tiles, *strides, rows, width, LOOKUP // rows
    launch(_scatter_rows_kernel, batch * tiles, out, pointers, scalars)
    return out


def scatter_back(
    x: Tensor, tokens: Tensor, index: Tensor, *, update: Tensor | None = None
) -> Tensor:
    return _scatter_rows(x, tokens, index, update, x.shape[1])


def gather_rows_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    return _scatter_rows(None, grad, index, None, num_tokens)


# -------------------------------------------------------------- scatter_back's backward


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "tiles"])
def _scatter_back_backward_kernel(
    grad_ptr,  # (B, N, C)
    index_ptr,  # (B, M)
    grad_x_ptr,  # (B, N, C), contiguous, like the next two
    grad_tokens_ptr,  # (B, M, C)
    grad_update_ptr,  # (B, C), or None
    num_tokens,
    num_rows,
    num_columns,
    tiles,  # per image
    grad_stride_b,
    grad_stride_n,
    grad_stride_c,
    index_stride_b,
    index_stride_r,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    b, tile = image_and_tile(tiles)
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    first = tile // column_tiles * ROWS
    # Where there is an update, one program passes over all rows and sums its columns.
    end = first + ROWS if grad_update_ptr is None else num_tokens
    o_c = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    m_c = o_c < num_columns
    SUM: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    b_sum = tl.zeros([ROWS, COLUMNS], SUM)

    for start in range(first, end, ROWS):
        o_n = start + tl.arange(0, ROWS)
        b_r = rows_moved_to(
            o_n, index_ptr + b * index_stride_b, index_stride_r, num_rows, ROWS, CHUNK
        )
        m_grad = (o_n < num_tokens)[:, None] & m_c[None, :]
        grad_ptrs = grad_ptr + b * grad_stride_b + o_c[None, :] * grad_stride_c
        grad_ptrs += o_n.to(tl.int64)[:, None] * grad_stride_n
        b_grad = tl.load(grad_ptrs, mask=m_grad, other=0)
        m_moved = (b_r >= 0)[:, None] & m_c[None, :]
        tokens_ptrs = grad_tokens_ptr + (b * num_rows + b_r)[:, None] * num_columns + o_c[None, :]
        tl.store(tokens_ptrs, b_grad, mask=m_moved)
        b_grad = tl.where(m_moved, 0, b_grad).to(b_grad.dtype)
        x_ptrs = grad_x_ptr + (b * num_tokens + o_n)[:, None] * num_columns + o_c[None, :]
        tl.store(x_ptrs, b_grad, mask=m_grad)
        if grad_update_ptr is not None:
            b_sum += b_grad.to(SUM)

    if grad_update_ptr is not None:
        b_update = tl.sum(b_sum, axis=0).to(grad_update_ptr.dtype.element_ty)
        tl.store(grad_update_ptr + b * num_columns + o_c, b_update, mask=m_c)


def scatter_back_backward(
    grad: Tensor, index: Tensor, has_update: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, columns = grad.shape
    num_rows = index.shape[1]
    grad_x = grad.new_empty((batch, num_tokens, columns))
    grad_tokens = grad.new_empty((batch, num_rows, columns))
    grad_update = grad.new_empty((batch, columns) if has_update else (0,))
    rows, width = (sum_tile if has_update else move_tile)(columns, grad.element_size())
    tiles = cdiv(columns, width) * (1 if has_update else cdiv(num_tokens, rows))
    pointers = grad, index, grad_x, grad_tokens, grad_update if has_update else None
    strides = *grad.stride(), *index.stride()
    scalars = num_tokens, num_rows, columns, tiles, *strides, rows, width, LOOKUP // rows
    launch(_scatter_back_backward_kernel, batch * tiles, grad_x, pointers, scalars)
    return grad_x, grad_tokens, grad_update
