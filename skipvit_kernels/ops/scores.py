"""cls_scores: how much one query a head attends to each patch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from skipvit_kernels import reference
from skipvit_kernels.ops import checks
from skipvit_kernels.ops.library import operator, wants_grad


def _cls_scores_fake(
    q: Tensor, k: Tensor, *, scale: float | None = None, num_prefix_tokens: int = 1
) -> Tensor:
    return k.new_empty((k.shape[0], k.shape[2] - num_prefix_tokens), dtype=torch.float32)


_cls_scores = operator(
    "cls_scores(Tensor q, Tensor k, *, float? scale=None, int num_prefix_tokens=1) -> Tensor",
    reference.cls_scores,
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
    if q.requires_grad or k.requires_grad:
        q, k = q.detach(), k.detach()
    return _cls_scores(q, k, scale=scale, num_prefix_tokens=num_prefix_tokens)


class _TrainedClsScores(torch.autograd.Function):
    """The forward is the operator in every mode: a recomputation selects the same patches."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, scale: float | None, num_prefix_tokens: int
    ) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.scale = q.shape[-1] ** -0.5 if scale is None else scale
        ctx.num_prefix_tokens = num_prefix_tokens
        return cls_scores(q, k, scale=scale, num_prefix_tokens=num_prefix_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k = ctx.saved_tensors
        dtype = torch.promote_types(q.dtype, torch.float32)
        weights = (torch.einsum("bhd,bhnd->bhn", q.to(dtype), k.to(dtype)) * ctx.scale).softmax(-1)
        grad_weights = F.pad(grad.to(dtype) / q.shape[1], (ctx.num_prefix_tokens, 0))[:, None]
        centred = grad_weights - (weights * grad_weights).sum(-1, keepdim=True)
        grad_logits = ctx.scale * weights * centred
        grad_q = torch.einsum("bhn,bhnd->bhd", grad_logits, k.to(dtype))
        grad_k = grad_logits[..., None] * q[:, :, None].to(dtype)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), None, None


def trained_cls_scores(
    q: Tensor, k: Tensor, *, scale: float | None = None, num_prefix_tokens: int = 1
) -> Tensor:
    """`cls_scores` with a gradient to q and k: EViT trains them through the fused token."""
    if wants_grad(q, k):
        return _TrainedClsScores.apply(q, k, scale, num_prefix_tokens)
    return _cls_scores(q, k, scale=scale, num_prefix_tokens=num_prefix_tokens)
