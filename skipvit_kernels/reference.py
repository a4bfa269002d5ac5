"""The specification: every operator in plain PyTorch.

These functions define what each operator returns, serve as the oracle of the tests, and are the
kernel of last resort wherever no compiled one is registered. They favour the reading over the
speed and return contiguous tensors. Shapes: B images, N = P + n tokens of which the first P are
prefix tokens and n are patches, C channels, H heads, D head width, K kept patches, M moved rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where an input has it."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _batch(index: Tensor) -> Tensor:
    """(B, 1): the image that each entry of a (B, M) index belongs to."""
    return torch.arange(index.shape[0], device=index.device)[:, None]


def head_mean(scores: Tensor) -> Tensor:
    """(B, n) or (B, H, n) -> (B, n) in float32: the heads are added in order, then divided by H.

    The order is part of the specification: ranks can only agree bit for bit across backends if the
    means do.
    """
    scores = scores.to(_accumulation_dtype(scores))
    if scores.dim() == 2:
        return scores
    total = scores[:, 0]
    for head in range(1, scores.shape[1]):
        total = total + scores[:, head]
    # By a tensor: CUDA divides by a Python number as it multiplies by the reciprocal.
    return total / total.new_full((), scores.shape[1])


def select(scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """Positions of the kept (B, K) and of the dropped (B, n - K) patches, both ascending.

    Kept are the largest scores; among equal scores the lower position; NaN is the largest.
    """
    order = head_mean(scores).sort(dim=-1, descending=True, stable=True).indices
    return order[:, :num_keep].sort(dim=-1).values, order[:, num_keep:].sort(dim=-1).values


def cls_scores(
    q: Tensor, k: Tensor, *, scale: float | None = None, num_prefix_tokens: int = 1
) -> Tensor:
    dtype = _accumulation_dtype(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bhd,bhnd->bhn", q.to(dtype), k.to(dtype)) * scale
    return logits.softmax(-1).mean(1)[:, num_prefix_tokens:].float().contiguous()


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    return x[_batch(index), index].contiguous()


def gather_rows_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    grad_x = grad.new_zeros(grad.shape[0], num_tokens, grad.shape[2])
    grad_x[_batch(index), index] = grad
    return grad_x


def gather_topk(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    kept, _ = select(scores, num_keep)
    prefix = torch.arange(num_prefix_tokens, device=x.device).expand(x.shape[0], -1)
    index = torch.cat([prefix, kept + num_prefix_tokens], dim=1)
    return gather_rows(x, index), index


def gather_topk_fuse(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    tokens, index = gather_topk(x, scores, num_keep, num_prefix_tokens=num_prefix_tokens)
    _, dropped = select(scores, num_keep)
    dtype = _accumulation_dtype(x, scores)
    weights = head_mean(scores).gather(1, dropped).to(dtype)
    rows = gather_rows(x, dropped + num_prefix_tokens).to(dtype)
    fused = (weights[..., None] * rows).sum(dim=1, keepdim=True).to(x.dtype)
    return torch.cat([tokens, fused], dim=1), index


def gather_topk_fuse_backward(
    grad: Tensor, x: Tensor, scores: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    num_patches = scores.shape[-1]
    grad_kept, grad_fused = grad[:, :-1], grad[:, -1:]
    dtype = _accumulation_dtype(x, scores)
    patches = x[:, x.shape[1] - num_patches :].to(dtype)

    grad_x = x.new_zeros(x.shape)
    weights = head_mean(scores).to(dtype)[..., None]
    grad_x[:, x.shape[1] - num_patches :] = (weights * grad_fused.to(dtype)).to(x.dtype)
    grad_x[_batch(index), index] = grad_kept

    kept = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    kept[_batch(index), index] = True
    grad_mean = (patches * grad_fused.to(dtype)).sum(-1)
    grad_mean = grad_mean.masked_fill(kept[:, x.shape[1] - num_patches :], 0)
    if scores.dim() == 3:
        grad_mean = (grad_mean / scores.shape[1])[:, None].expand(scores.shape)
    return grad_x, grad_mean.to(scores.dtype).contiguous()


def scatter_back(
    x: Tensor, tokens: Tensor, index: Tensor, *, update: Tensor | None = None
) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    if update is not None:
        out += update[:, None]
    out[_batch(index), index] = tokens
    return out


def scatter_back_backward(
    grad: Tensor, index: Tensor, has_update: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, to tokens, and to update (an empty tensor where there is none)."""
    grad_x = grad.clone(memory_format=torch.contiguous_format)
    grad_x[_batch(index), index] = 0
    grad_update = grad.new_empty(0)
    if has_update:
        grad_update = grad_x.to(_accumulation_dtype(grad)).sum(1).to(grad.dtype)
    return grad_x, gather_rows(grad, index), grad_update
