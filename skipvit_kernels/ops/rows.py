"""Rows that move: gather_rows and scatter_back, each the other's way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skipvit_kernels import reference
from skipvit_kernels.ops import checks
from skipvit_kernels.ops.library import operator, wants_grad

# --------------------------------------------------------------------------- gather_rows


def _gather_rows_fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], index.shape[1], x.shape[2]))


def _gather_rows_backward_fake(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    return grad.new_empty((grad.shape[0], num_tokens, grad.shape[2]))


_gather_rows = operator(
    "gather_rows(Tensor x, Tensor index) -> Tensor", reference.gather_rows, _gather_rows_fake
)
_gather_rows_backward = operator(
    "gather_rows_backward(Tensor grad, Tensor index, SymInt num_tokens) -> Tensor",
    reference.gather_rows_backward,
    _gather_rows_backward_fake,
)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_tokens = x.shape[1]
        return _gather_rows(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _gather_rows_backward(grad, index, ctx.num_tokens), None


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x by position: for RoPE tables, masks and targets that must follow the tokens.

    Args:
        x: (B, N, C) float32, float16, bfloat16 or float64, any strides.
        index: (B, M) int64 rows in [0, N), unique within an image, as `gather_topk` returns them.
            The CPU kernel checks the range; elsewhere a row outside is undefined.

    Returns:
        (B, M, C), x[b, index[b, r]] bit for bit. Differentiable in x: the gradient moves the rows
        back, and is zero elsewhere.

    Raises:
        ValueError: on a wrong shape, device or row. TypeError: on a wrong dtype.
    """
    checks.shape("x", x, "B", "N", "C")
    checks.floating("x", x)
    checks.index(index, x, "x")
    return _GatherRows.apply(x, index) if wants_grad(x) else _gather_rows(x, index)


# -------------------------------------------------------------------------- scatter_back


def _scatter_back_fake(
    x: Tensor, tokens: Tensor, index: Tensor, *, update: Tensor | None = None
) -> Tensor:
    return x.new_empty(x.shape)


def _scatter_back_backward_fake(
    grad: Tensor, index: Tensor, has_update: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, channels = grad.shape
    grad_tokens = grad.new_empty((batch, index.shape[1], channels))
    grad_update = grad.new_empty((batch, channels) if has_update else (0,))
    return grad.new_empty(grad.shape), grad_tokens, grad_update


_scatter_back = operator(
    "scatter_back(Tensor x, Tensor tokens, Tensor index, *, Tensor? update=None) -> Tensor",
    reference.scatter_back,
    _scatter_back_fake,
)
_scatter_back_backward = operator(
    "scatter_back_backward(Tensor grad, Tensor index, bool has_update) -> (Tensor, Tensor, Tensor)",
    reference.scatter_back_backward,
    _scatter_back_backward_fake,
)


class _ScatterBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tokens: Tensor, index: Tensor, update: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.has_update = update is not None
        return _scatter_back(x, tokens, index, update=update)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        (index,) = ctx.saved_tensors
        grad_x, grad_tokens, grad_update = _scatter_back_backward(grad, index, ctx.has_update)
        return grad_x, grad_tokens, None, grad_update if ctx.has_update else None


def scatter_back(
    x: Tensor, tokens: Tensor, index: Tensor, *, update: Tensor | None = None
) -> Tensor:
    """Put the tokens back at their positions among the rows that were skipped (SkipViT, 2).

    Args:
        x: (B, N, C) all tokens as they were before the gather, any strides. Not modified.
        tokens: (B, M, C) in x's dtype, any strides.
        index: (B, M) int64 rows in [0, N), unique within an image, as `gather_topk` returns them.
            The CPU kernel checks both; elsewhere a violation is undefined.
        update: (B, C) in x's dtype, added to every row of x that is not replaced; default none.

    Returns:
        (B, N, C): row index[b, r] is tokens[b, r] bit for bit, every other row x's, plus
        update[b] where given. Differentiable in x, tokens and update; only the index is saved.

    Raises:
        ValueError: on a wrong shape, device or row. TypeError: on a wrong dtype.
    """
    checks.shape("x", x, "B", "N", "C")
    checks.floating("x", x)
    checks.index(index, x, "x")
    batch, _, channels = x.shape
    checks.shape("tokens", tokens, batch, index.shape[1], channels)
    checks.same_dtype("tokens", tokens, "x", x)
    checks.same_device("tokens", tokens, "x", x)
    if update is not None:
        checks.shape("update", update, batch, channels)
        checks.same_dtype("update", update, "x", x)
        checks.same_device("update", update, "x", x)
    if wants_grad(x, tokens, update):
        return _ScatterBack.apply(x, tokens, index, update)
    return _scatter_back(x, tokens, index, update=update)
