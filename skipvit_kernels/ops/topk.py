"""The selection: gather_topk, and gather_topk_fuse, which sums up what it drops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skipvit_kernels import reference
from skipvit_kernels.ops import checks, rows
from skipvit_kernels.ops.library import operator, wants_grad

# --------------------------------------------------------------------------- gather_topk


def _gather_topk_fake(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    num_rows = num_prefix_tokens + num_keep
    tokens = x.new_empty((x.shape[0], num_rows, x.shape[2]))
    return tokens, x.new_empty((x.shape[0], num_rows), dtype=torch.int64)


_gather_topk = operator(
    "gather_topk(Tensor x, Tensor scores, SymInt num_keep, *, int num_prefix_tokens=1)"
    " -> (Tensor, Tensor)",
    reference.gather_topk,
    _gather_topk_fake,
)


class _GatherTopk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int
    ) -> tuple[Tensor, Tensor]:
        tokens, index = _gather_topk(x, scores, num_keep, num_prefix_tokens=num_prefix_tokens)
        ctx.save_for_backward(index)
        ctx.num_tokens = x.shape[1]
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return tokens, index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        (index,) = ctx.saved_tensors
        return rows._gather_rows_backward(grad, index, ctx.num_tokens), None, None, None


def gather_topk(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """Keep the prefix tokens and the `num_keep` best-scored patches, in their order (SkipViT, 2).

    Args:
        x: (B, N, C) tokens, float32, float16, bfloat16 or float64, any strides.
        scores: (B, n), or (B, H, n) and then averaged over the heads in float32; any strides.
        num_keep: K in [0, n]. Kept are the K largest scores; among equal scores the lower
            position; NaN counts as the largest. Whatever the scores hold, the index is valid.
        num_prefix_tokens: P = N - n, the leading tokens that are always kept.

    Returns:
        tokens: (B, P + K, C), prefix tokens first, then the kept patches in ascending position;
            tokens[b, r] == x[b, index[b, r]] bit for bit. Differentiable in x, not in scores.
        index: (B, P + K) int64 rows of x.

    Raises:
        ValueError: on a wrong shape, device or count. TypeError: on a wrong dtype.
    """
    checks.scores(scores, x, num_keep, num_prefix_tokens)
    if wants_grad(x):
        return _GatherTopk.apply(x, scores, num_keep, num_prefix_tokens)
    return _gather_topk(x, scores, num_keep, num_prefix_tokens=num_prefix_tokens)


# ---------------------------------------------------------------------- gather_topk_fuse


def _gather_topk_fuse_fake(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    num_rows = num_prefix_tokens + num_keep
    tokens = x.new_empty((x.shape[0], num_rows + 1, x.shape[2]))
    return tokens, x.new_empty((x.shape[0], num_rows), dtype=torch.int64)


def _gather_topk_fuse_backward_fake(
    grad: Tensor, x: Tensor, scores: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scores.new_empty(scores.shape)


_gather_topk_fuse = operator(
    "gather_topk_fuse(Tensor x, Tensor scores, SymInt num_keep, *, int num_prefix_tokens=1)"
    " -> (Tensor, Tensor)",
    reference.gather_topk_fuse,
    _gather_topk_fuse_fake,
)
_gather_topk_fuse_backward = operator(
    "gather_topk_fuse_backward(Tensor grad, Tensor x, Tensor scores, Tensor index)"
    " -> (Tensor, Tensor)",
    reference.gather_topk_fuse_backward,
    _gather_topk_fuse_backward_fake,
)


class _GatherTopkFuse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int
    ) -> tuple[Tensor, Tensor]:
        tokens, index = _gather_topk_fuse(x, scores, num_keep, num_prefix_tokens=num_prefix_tokens)
        ctx.save_for_backward(x, scores, index)
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return tokens, index

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad is None:
            return None, None, None, None
        x, scores, index = ctx.saved_tensors
        grad_x, grad_scores = _gather_topk_fuse_backward(grad, x, scores, index)
        return grad_x, grad_scores, None, None


def gather_topk_fuse(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """`gather_topk`, and one last row that fuses the dropped patches (EViT section 3.2).

    Args: as `gather_topk`.

    Returns:
        tokens: (B, P + K + 1, C): as `gather_topk`, then the sum over the dropped patches of
            score * row, accumulated in float32 and not normalised. Differentiable in x and in
            scores (the scores of kept patches get a zero gradient).
        index: (B, P + K) int64 rows of x; the fused row has no entry.

    Raises:
        ValueError: on a wrong shape, device or count. TypeError: on a wrong dtype.
    """
    checks.scores(scores, x, num_keep, num_prefix_tokens)
    if wants_grad(x, scores):
        return _GatherTopkFuse.apply(x, scores, num_keep, num_prefix_tokens)
    return _gather_topk_fuse(x, scores, num_keep, num_prefix_tokens=num_prefix_tokens)
