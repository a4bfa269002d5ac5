"""The operators: schema, fake and autograd of each, and the public function.

One schema per operator under ``torch.ops.skipvit``; torch's dispatcher chooses the kernel by the
tensors' device. `reference.py` stands behind every one (CompositeExplicitAutograd); a module of
`backends` registers the kernel of its device over it. The autograd.Function stays outside the
operator, which is the cheapest route through torch (about 5 us a call against 12 us for
`register_autograd`, CPU, torch 2.13) and is skipped where no gradient is wanted.

Shapes: B images, N = P + n tokens of which the first P are prefix tokens (CLS, distillation,
registers) and n are patches, C channels, H heads, D head width, K kept patches.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skipvit_kernels import reference
from skipvit_kernels.ops import checks

LIBRARY = torch.library.Library("skipvit", "DEF")

SCHEMAS = {
    "cls_scores": "(Tensor q, Tensor k, float scale, int num_prefix_tokens) -> Tensor",
    "gather_topk": (
        "(Tensor x, Tensor scores, SymInt num_keep, int num_prefix_tokens) -> (Tensor, Tensor)"
    ),
    "gather_topk_fuse": (
        "(Tensor x, Tensor scores, SymInt num_keep, int num_prefix_tokens) -> (Tensor, Tensor)"
    ),
    "gather_topk_fuse_backward": (
        "(Tensor grad, Tensor x, Tensor scores, Tensor index) -> (Tensor, Tensor)"
    ),
    "gather_rows": "(Tensor x, Tensor index) -> Tensor",
    "gather_rows_backward": "(Tensor grad, Tensor index, SymInt num_tokens) -> Tensor",
    "scatter_back": "(Tensor x, Tensor tokens, Tensor index, Tensor? update) -> Tensor",
    "scatter_back_backward": (
        "(Tensor grad, Tensor index, bool has_update) -> (Tensor, Tensor, Tensor)"
    ),
}


@functools.cache
def _warn_of_fallback(name: str, device_type: str) -> None:
    warnings.warn(
        f"skipvit::{name} runs as plain PyTorch on {device_type}: no kernel is registered for it "
        "there ('skipvit info' says why)",
        stacklevel=3,
    )


def _operator(name: str, spec: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define skipvit::name with the reference behind it; returns the overload."""
    LIBRARY.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))

    def fallback(*args: Any) -> Any:
        _warn_of_fallback(name, args[0].device.type)
        return spec(*args)

    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"skipvit::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.skipvit, name).default


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _index_error(error: RuntimeError) -> Exception:
    """The kernels check an index where it costs nothing; torch makes theirs a RuntimeError."""
    return ValueError(str(error)) if str(error).startswith("index must") else error


# ---------------------------------------------------------------------------- cls_scores


def _cls_scores_fake(q: Tensor, k: Tensor, scale: float, num_prefix_tokens: int) -> Tensor:
    return k.new_empty((k.shape[0], k.shape[2] - num_prefix_tokens), dtype=torch.float32)


_cls_scores = _operator(
    "cls_scores",
    lambda q, k, scale, prefix: reference.cls_scores(q, k, scale=scale, num_prefix_tokens=prefix),
    _cls_scores_fake,
)


def cls_scores(
    q: Tensor, k: Tensor, *, scale: float | None = None, num_prefix_tokens: int = 1
) -> Tensor:
    """How much CLS attends to each patch, averaged over the heads (SkipViT section 2; EViT eq. 3).

    One pass over the keys, to stand beside an attention that does not return its map.

    Args:
        q: (B, H, D) the CLS query, after any q-norm and RoPE.
        k: (B, H, N, D) the keys of all tokens, same dtype as q, any strides.
        scale: factor on q . k; default D ** -0.5.
        num_prefix_tokens: P, the leading tokens that are no patches.

    Returns:
        (B, n) float32: softmax over all N keys per head, then the mean over the heads; the P
        prefix columns are left out, and the rest is not renormalised. No gradient.

    Raises:
        ValueError: on a wrong shape, device or count. TypeError: on a wrong dtype.
    """
    checks.shape("q", q, "B", "H", "D")
    batch, heads, width = q.shape
    checks.shape("k", k, batch, heads, "N", width)
    if heads == 0 or width == 0:
        raise ValueError(f"q must have at least one head of width 1, got {tuple(q.shape)}")
    checks.floating("q", q)
    checks.same_dtype("k", k, "q", q)
    checks.same_device("k", k, "q", q)
    checks.count("num_prefix_tokens", num_prefix_tokens, k.shape[2])
    if scale is None:
        scale = width**-0.5
    if _wants_grad(q, k):
        q, k = q.detach(), k.detach()
    return _cls_scores(q, k, scale, num_prefix_tokens)


# --------------------------------------------------------------------------- gather_rows


def _gather_rows_fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], index.shape[1], x.shape[2]))


def _gather_rows_backward_fake(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    return grad.new_empty((grad.shape[0], num_tokens, grad.shape[2]))


_gather_rows = _operator("gather_rows", reference.gather_rows, _gather_rows_fake)
_gather_rows_backward = _operator(
    "gather_rows_backward", reference.gather_rows_backward, _gather_rows_backward_fake
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
    try:
        return _GatherRows.apply(x, index) if _wants_grad(x) else _gather_rows(x, index)
    except RuntimeError as error:
        raise _index_error(error) from None


# --------------------------------------------------------------------------- gather_topk


def _gather_topk_fake(
    x: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    rows = num_prefix_tokens + num_keep
    tokens = x.new_empty((x.shape[0], rows, x.shape[2]))
    return tokens, x.new_empty((x.shape[0], rows), dtype=torch.int64)


_gather_topk = _operator(
    "gather_topk",
    lambda x, scores, keep, prefix: reference.gather_topk(
        x, scores, keep, num_prefix_tokens=prefix
    ),
    _gather_topk_fake,
)


class _GatherTopk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int
    ) -> tuple[Tensor, Tensor]:
        tokens, index = _gather_topk(x, scores, num_keep, num_prefix_tokens)
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
        return _gather_rows_backward(grad, index, ctx.num_tokens), None, None, None


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
    if _wants_grad(x):
        return _GatherTopk.apply(x, scores, num_keep, num_prefix_tokens)
    return _gather_topk(x, scores, num_keep, num_prefix_tokens)


# ---------------------------------------------------------------------- gather_topk_fuse


def _gather_topk_fuse_fake(
    x: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    rows = num_prefix_tokens + num_keep
    tokens = x.new_empty((x.shape[0], rows + 1, x.shape[2]))
    return tokens, x.new_empty((x.shape[0], rows), dtype=torch.int64)


def _gather_topk_fuse_backward_fake(
    grad: Tensor, x: Tensor, scores: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scores.new_empty(scores.shape)


_gather_topk_fuse = _operator(
    "gather_topk_fuse",
    lambda x, scores, keep, prefix: reference.gather_topk_fuse(
        x, scores, keep, num_prefix_tokens=prefix
    ),
    _gather_topk_fuse_fake,
)
_gather_topk_fuse_backward = _operator(
    "gather_topk_fuse_backward",
    reference.gather_topk_fuse_backward,
    _gather_topk_fuse_backward_fake,
)


class _GatherTopkFuse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int
    ) -> tuple[Tensor, Tensor]:
        tokens, index = _gather_topk_fuse(x, scores, num_keep, num_prefix_tokens)
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
    if _wants_grad(x, scores):
        return _GatherTopkFuse.apply(x, scores, num_keep, num_prefix_tokens)
    return _gather_topk_fuse(x, scores, num_keep, num_prefix_tokens)


# -------------------------------------------------------------------------- scatter_back


def _scatter_back_fake(x: Tensor, tokens: Tensor, index: Tensor, update: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _scatter_back_backward_fake(
    grad: Tensor, index: Tensor, has_update: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, channels = grad.shape
    grad_tokens = grad.new_empty((batch, index.shape[1], channels))
    grad_update = grad.new_empty((batch, channels) if has_update else (0,))
    return grad.new_empty(grad.shape), grad_tokens, grad_update


_scatter_back = _operator(
    "scatter_back",
    lambda x, tokens, index, update: reference.scatter_back(x, tokens, index, update=update),
    _scatter_back_fake,
)
_scatter_back_backward = _operator(
    "scatter_back_backward", reference.scatter_back_backward, _scatter_back_backward_fake
)


class _ScatterBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tokens: Tensor, index: Tensor, update: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.has_update = update is not None
        return _scatter_back(x, tokens, index, update)

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
    try:
        if _wants_grad(x, tokens, update):
            return _ScatterBack.apply(x, tokens, index, update)
        return _scatter_back(x, tokens, index, update)
    except RuntimeError as error:
        raise _index_error(error) from None
