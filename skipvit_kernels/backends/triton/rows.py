"""Rows that move: gather_rows, scatter_back and their backwards.

A kernel that fills all N rows of an image starts from the rows it writes, not from the index: each
program looks its 16 rows up in the index, so that no row is written twice, none is left out and
nothing has to be cleared first.

An index entry out of [0, N) names no row: what reads by it reads zeros, what writes by it writes
nothing. Where several entries name one row, each reads it, and the last one is what it becomes.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

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
    sum_tile,
)

# Comparisons of a program at once while it looks its rows up in the index: 4 a thread.
LOOKUP = tl.constexpr(512)

# --------------------------------------------------------------------------- gather_rows


@triton.jit
def _gather_tile(
    x_ptr, index_ptr, out_ptr, o_b, o_r, o_c, num_tokens, num_rows, num_columns,
    x_strides, index_strides,
):  # fmt: skip
    """The rows o_r and columns o_c of out: x's rows by the index."""
    m_r, m_c = o_r < num_rows, o_c < num_columns
    b_n = tl.load(ptrs_at(index_ptr, (o_b, o_r), index_strides), mask=m_r, other=-1)
    m_n = (b_n >= 0) & (b_n < num_tokens)
    x_ptrs = ptrs_at(x_ptr, (o_b, b_n[:, None], o_c[None, :]), x_strides)
    b_x = tl.load(x_ptrs, mask=m_n[:, None] & m_c[None, :], other=0)
    out_ptrs = ptrs_at(out_ptr, (o_b * num_rows + o_r[:, None], o_c[None, :]), (num_columns, 1))
    tl.store(out_ptrs, b_x, mask=m_r[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _gather_rows_kernel(
    x_ptr,  # (B, N, C)
    index_ptr,  # (B, M)
    out_ptr,  # (B, M, C), contiguous
    num_tokens,
    num_rows,
    num_columns,
    x_strides,
    index_strides,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_b, row, column = image_row_column(num_rows, num_columns, ROWS, COLUMNS)
    o_r, o_c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    _gather_tile(
        x_ptr, index_ptr, out_ptr, o_b, o_r, o_c, num_tokens, num_rows, num_columns,
        x_strides, index_strides,
    )  # fmt: skip


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """out[b, r] = x[b, index[b, r]]; zeros where the entry is out of range."""
    batch, num_tokens, columns = x.shape
    num_rows = index.shape[1]
    out = x.new_empty((batch, num_rows, columns))
    rows, width = move_tile(columns, x.element_size())
    tiles = cdiv(num_rows, rows) * cdiv(columns, width)
    launch(
        _gather_rows_kernel, batch * tiles, out, x_ptr=x, index_ptr=index, out_ptr=out,
        num_tokens=num_tokens, num_rows=num_rows, num_columns=columns,
        x_strides=x.stride(), index_strides=index.stride(), ROWS=rows, COLUMNS=width,
    )  # fmt: skip
    return out


# -------------------------------------------- scatter_back, and gather_rows' backward


@triton.jit
def rows_moved_to(index_ptr, o_b, o_n, num_rows, index_strides):
    """[ROWS]: the r with index[r] == n, the last one if there are several; -1 if there is none."""
    CHUNK: tl.constexpr = LOOKUP // o_n.shape[0]
    b_row = tl.full([o_n.shape[0], CHUNK], -1, tl.int32)
    for start in range(0, num_rows, CHUNK):
        o_r = start + tl.arange(0, CHUNK)
        index_ptrs = ptrs_at(index_ptr, (o_b, o_r), index_strides)
        b_n = tl.load(index_ptrs, mask=o_r < num_rows, other=-1)
        # Compared in int32, which takes half the instructions; what does not fit is no row. Entries
        # beyond N are found for rows beyond N alone, which nobody stores.
        b_n = tl.where((b_n >> 32) == 0, b_n, -1).to(tl.int32)
        b_row = tl.where(b_n[None, :] == o_n[:, None], o_r[None, :], b_row)
    return tl.max(b_row, axis=1)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _scatter_rows_kernel(
    x_ptr,  # (B, N, C), or None: rows that are not in the index are zeros
    tokens_ptr,  # (B, M, C)
    index_ptr,  # (B, M)
    update_ptr,  # (B, C), added to the rows of x; or None
    out_ptr,  # (B, N, C), contiguous
    num_tokens,
    num_rows,
    num_columns,
    x_strides,
    tokens_strides,
    index_strides,
    update_strides,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_b, row, column = image_row_column(num_tokens, num_columns, ROWS, COLUMNS)
    o_n, o_c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    m_c = o_c < num_columns
    m_out = (o_n < num_tokens)[:, None] & m_c[None, :]
    b_r = rows_moved_to(index_ptr, o_b, o_n, num_rows, index_strides)
    m_moved = (b_r >= 0)[:, None] & m_c[None, :]
    tokens_ptrs = ptrs_at(tokens_ptr, (o_b, b_r[:, None], o_c[None, :]), tokens_strides)
    b_out = tl.load(tokens_ptrs, mask=m_moved, other=0)
    if x_ptr is not None:
        x_ptrs = ptrs_at(x_ptr, (o_b, o_n[:, None], o_c[None, :]), x_strides)
        b_x = tl.load(x_ptrs, mask=m_out & (b_r < 0)[:, None], other=0)
        if update_ptr is not None:
            update_ptrs = ptrs_at(update_ptr, (o_b, o_c), update_strides)
            b_update = tl.load(update_ptrs, mask=m_c, other=0)[None, :]
            if x_ptr.dtype.element_ty == tl.float64:
                b_x += b_update
            else:
                b_x = (b_x.to(tl.float32) + b_update.to(tl.float32)).to(b_x.dtype)
        b_out = tl.where(m_moved, b_out, b_x)
    out_ptrs = ptrs_at(out_ptr, (o_b * num_tokens + o_n[:, None], o_c[None, :]), (num_columns, 1))
    tl.store(out_ptrs, b_out, mask=m_out)


def _scatter_rows(
    x: Tensor | None, tokens: Tensor, index: Tensor, update: Tensor | None, num_tokens: int
) -> Tensor:
    batch, num_rows, columns = tokens.shape
    out = tokens.new_empty((batch, num_tokens, columns))
    rows, width = move_tile(columns, tokens.element_size())
    tiles = cdiv(num_tokens, rows) * cdiv(columns, width)
    launch(
        _scatter_rows_kernel, batch * tiles, out,
        x_ptr=x, tokens_ptr=tokens, index_ptr=index, update_ptr=update, out_ptr=out,
        num_tokens=num_tokens, num_rows=num_rows, num_columns=columns,
        x_strides=None if x is None else x.stride(), tokens_strides=tokens.stride(),
        index_strides=index.stride(), update_strides=None if update is None else update.stride(),
        ROWS=rows, COLUMNS=width,
    )  # fmt: skip
    return out


def scatter_back(
    x: Tensor, tokens: Tensor, index: Tensor, *, update: Tensor | None = None
) -> Tensor:
    """x (+ update), but tokens[b, r] in row index[b, r]; nowhere if the entry is out of range."""
    return _scatter_rows(x, tokens, index, update, x.shape[1])


def gather_rows_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Zeros, but grad[b, r] in row index[b, r]; nowhere if the entry is out of range."""
    return _scatter_rows(None, grad, index, None, num_tokens)


# -------------------------------------------------------------- scatter_back's backward


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _scatter_back_backward_kernel(
    grad_ptr,  # (B, N, C)
    index_ptr,  # (B, M)
    grad_x_ptr,  # (B, N, C), contiguous, like the next two
    grad_tokens_ptr,  # (B, M, C)
    grad_update_ptr,  # (B, C), or None
    num_tokens,
    num_rows,
    num_columns,
    grad_strides,
    index_strides,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program has a tile of grad_x, whose rows it looks up in the index, or one of grad_tokens.

    Where there is an update, one program passes over all rows of grad_x and sums its columns.
    """
    UPDATE: tl.constexpr = grad_update_ptr is not None
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    x_tiles = column_tiles * (1 if UPDATE else tl.cdiv(num_tokens, ROWS))
    o_b, tile = image_and_tile(x_tiles + column_tiles * tl.cdiv(num_rows, ROWS))
    o_c = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    if tile >= x_tiles:
        o_r = (tile - x_tiles) // column_tiles * ROWS + tl.arange(0, ROWS)
        _gather_tile(
            grad_ptr, index_ptr, grad_tokens_ptr, o_b, o_r, o_c, num_tokens, num_rows, num_columns,
            grad_strides, index_strides,
        )  # fmt: skip
    else:
        m_c = o_c < num_columns
        SUM: tl.constexpr = sum_dtype(grad_ptr)
        b_sum = tl.zeros([ROWS, COLUMNS], SUM)
        first = 0 if UPDATE else tile // column_tiles * ROWS
        for start in range(first, num_tokens if UPDATE else first + ROWS, ROWS):
            o_n = start + tl.arange(0, ROWS)
            b_r = rows_moved_to(index_ptr, o_b, o_n, num_rows, index_strides)
            m_x = (o_n < num_tokens)[:, None] & m_c[None, :]
            grad_ptrs = ptrs_at(grad_ptr, (o_b, o_n[:, None], o_c[None, :]), grad_strides)
            b_grad = tl.load(grad_ptrs, mask=m_x & (b_r < 0)[:, None], other=0)
            grad_x_ptrs = ptrs_at(
                grad_x_ptr, (o_b * num_tokens + o_n[:, None], o_c[None, :]), (num_columns, 1)
            )
            tl.store(grad_x_ptrs, b_grad, mask=m_x)
            b_sum += b_grad.to(SUM)
        if UPDATE:
            b_update = tl.sum(b_sum, axis=0).to(grad_update_ptr.dtype.element_ty)
            tl.store(ptrs_at(grad_update_ptr, (o_b, o_c), (num_columns, 1)), b_update, mask=m_c)


def scatter_back_backward(
    grad: Tensor, index: Tensor, has_update: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x (zeros in the rows of the index), to tokens (grad's rows) and to update.

    Of tokens, zeros where the entry is out of range; of repeated entries each reads the row.
    """
    batch, num_tokens, columns = grad.shape
    num_rows = index.shape[1]
    grad_x = grad.new_empty((batch, num_tokens, columns))
    grad_tokens = grad.new_empty((batch, num_rows, columns))
    grad_update = grad.new_empty((batch, columns) if has_update else (0,))
    rows, width = (sum_tile if has_update else move_tile)(columns, grad.element_size())
    x_tiles = 1 if has_update else cdiv(num_tokens, rows)
    tiles = (x_tiles + cdiv(num_rows, rows)) * cdiv(columns, width)
    launch(
        _scatter_back_backward_kernel, batch * tiles, grad_x,
        grad_ptr=grad, index_ptr=index, grad_x_ptr=grad_x, grad_tokens_ptr=grad_tokens,
        grad_update_ptr=grad_update if has_update else None, num_tokens=num_tokens,
        num_rows=num_rows, num_columns=columns,
        grad_strides=grad.stride(), index_strides=index.stride(), ROWS=rows, COLUMNS=width,
    )  # fmt: skip
    return grad_x, grad_tokens, grad_update
