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
    return scores if scores.dim() == 2 else _mean_over_heads(scores)


def _mean_over_heads(values: Tensor) -> Tensor:
    """(B, H, ...) -> (B, ...)."""
    total = values[:, 0]
    for head in range(1, values.shape[1]):
        total = total + values[:, head]
    # By a tensor: CUDA divides by a Python number as it multiplies by the reciprocal.
    return total / total.new_full((), values.shape[1])


def select(scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """Positions of the kept (B, K) and of the dropped (B, n - K) patches, both ascending.

    Kept are the largest scores; among equal scores the lower position; NaN is the largest.
    """
    # ONNX knows no sort that is told to be stable; its own puts the lower of equal positions first.
    stable = {} if torch.compiler.is_exporting() else {"stable": True}
    order = head_mean(scores).sort(dim=-1, descending=True, **stable).indices
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


def match_kept(features: Tensor, index: Tensor, *, num_prefix_tokens: int = 1) -> Tensor:
    features = features.to(_accumulation_dtype(features))
    if features.dim() == 4:
        features = _mean_over_heads(features)
    places = torch.arange(index.shape[1], device=index.device).expand_as(index)
    largest = features.new_full(features.shape[:-1], -torch.inf)
    owner = torch.full_like(largest, num_prefix_tokens, dtype=torch.int64)
    # A row's own norm does not change which cosine is its largest. One kept patch at a time, not as
    # a matrix product: that sums in another order at its edges, and equal rows would not tie.
    for place in range(num_prefix_tokens, index.shape[1]):
        kept = gather_rows(features, index[:, place, None])
        norm = kept.square().sum(-1, keepdim=True).sqrt()
        cosine = (features * torch.where(norm > 0, kept / norm, kept)).sum(-1)
        larger = (cosine > largest) | (cosine.isnan() & ~largest.isnan())
        owner = owner.masked_fill(larger, place)
        largest = torch.where(larger, cosine, largest)
    return owner.scatter(1, index, places)


def match_higher(features: Tensor, ranks: Tensor, *, num_prefix_tokens: int = 1) -> Tensor:
    features = features[..., num_prefix_tokens:, :].to(_accumulation_dtype(features))
    if features.dim() == 4:
        features = _mean_over_heads(features)
    norm = features.square().sum(-1, keepdim=True).sqrt()
    unit = torch.where(norm > 0, features / norm, features)
    largest = features.new_full(features.shape[:-1], -torch.inf)
    for patch in range(ranks.shape[1]):
        rank = ranks[:, patch, None]
        higher = (rank > ranks) | (rank.isnan() & ~ranks.isnan())
        cosine = (unit * unit[:, patch, None]).sum(-1)
        # `maximum` keeps NaN.
        largest = torch.where(higher, torch.maximum(cosine, largest), largest)
    return largest.float().contiguous()


def _sum_by_owner(values: Tensor, owner: Tensor, num_rows: int) -> Tensor:
    """(B, N, C) -> (B, M, C), in ascending position on every device."""
    total = values.new_zeros(values.shape[0], num_rows, values.shape[2])
    batch = _batch(owner)[:, 0]
    for position in range(owner.shape[1]):
        total[batch, owner[:, position]] += values[:, position]
    return total


def _row_counts(owner: Tensor, num_rows: int) -> Tensor:
    """(B, M): how many rows each owner has."""
    counts = owner.new_zeros(owner.shape[0], num_rows)
    return counts.scatter_add(1, owner, torch.ones_like(owner))


def _with_rows_alone(merged: Tensor, x: Tensor, owner: Tensor) -> Tensor:
    """`merged` (B, M, C); where an owner has one row only, that row of x with all its bits."""
    positions = torch.arange(owner.shape[1], device=owner.device).expand_as(owner)
    last = owner.new_zeros(merged.shape[:2]).scatter_reduce(1, owner, positions, "amax")
    batch, row = (_row_counts(owner, merged.shape[1]) == 1).nonzero(as_tuple=True)
    merged[batch, row] = x[batch, last[batch, row]]
    return merged


def merge_rows(
    x: Tensor, owner: Tensor, num_rows: int, *, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dtype = _accumulation_dtype(x)
    if sizes is None:
        sizes = torch.ones(owner.shape, device=x.device)
    merged_sizes = _sum_by_owner(sizes[..., None], owner, num_rows)
    total = _sum_by_owner(sizes[..., None].to(dtype) * x.to(dtype), owner, num_rows)
    mean = (total / merged_sizes.to(dtype)).to(x.dtype)
    return _with_rows_alone(mean, x, owner), merged_sizes[..., 0].contiguous()


def merge_rows_backward(
    grad: Tensor, owner: Tensor, sizes: Tensor | None, merged_sizes: Tensor
) -> Tensor:
    dtype = _accumulation_dtype(grad)
    if sizes is None:
        sizes = torch.ones(owner.shape, device=grad.device)
    # Exactly 1 for a row alone.
    weights = sizes.to(dtype) / merged_sizes.to(dtype).gather(1, owner)
    return (weights[..., None] * gather_rows(grad, owner).to(dtype)).to(grad.dtype)


def _is_alone(owner: Tensor, num_rows: int) -> Tensor:
    """(B, N, 1): whether a row is the only one of its owner."""
    return (_row_counts(owner, num_rows).gather(1, owner) == 1)[..., None]


def restore_rows(x: Tensor, before: Tensor, after: Tensor, owner: Tensor) -> Tensor:
    dtype = _accumulation_dtype(x)
    own_before, own_after = gather_rows(before, owner), gather_rows(after, owner)
    changed = x.to(dtype) + own_after.to(dtype) - own_before.to(dtype)
    return torch.where(_is_alone(owner, after.shape[1]), own_after, changed.to(x.dtype))


def restore_rows_backward(
    grad: Tensor, owner: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, before and after; that of a row alone goes to `after` only."""
    dtype = _accumulation_dtype(grad)
    grad_x = grad.masked_fill(_is_alone(owner, num_rows), 0).contiguous()
    grad_before = 0 - _sum_by_owner(grad_x.to(dtype), owner, num_rows)
    grad_after = _sum_by_owner(grad.to(dtype), owner, num_rows).to(grad.dtype)
    return grad_x, grad_before.to(grad.dtype), _with_rows_alone(grad_after, grad, owner)
