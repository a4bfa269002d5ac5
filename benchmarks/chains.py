"""The operators in plain PyTorch: the rivals of the kernels.

`naive_...` is what people write: topk, sort, gather and scatter with an expanded index, cat; it is
what `compiled` compiles. The others are the fastest ways we know: whole rows by `index_select` and
`index_copy_`, products as matrix products. One prefix token, as in every shape that is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def with_backward(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """A call of the function and of its backward, with the gradient to its first result last."""

    def call(*args: Any) -> tuple[Tensor, ...]:
        *args, grad = args
        results = function(*args)
        results = results if isinstance(results, tuple) else (results,)
        leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
        return *results, *torch.autograd.grad(results[0], leaves, grad)

    return call


def head_mean(scores: Tensor) -> Tensor:
    return scores if scores.dim() == 2 else scores.mean(1)


def with_prefix(kept: Tensor) -> Tensor:
    """(B, K) patches -> (B, 1 + K) rows."""
    return torch.cat([kept.new_zeros(len(kept), 1), kept + 1], 1)


def expanded(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[2])


@functools.cache
def first_rows(batch: int, num_tokens: int, device: torch.device) -> Tensor:
    """(B, 1): where each image starts among B*N rows. Whoever counts microseconds keeps it."""
    return torch.arange(batch, device=device)[:, None] * num_tokens


def flat(index: Tensor, num_tokens: int) -> Tensor:
    """Rows of (B, M) as rows of (B*N, C)."""
    return (index + first_rows(len(index), num_tokens, index.device)).view(-1)


def rows(x: Tensor) -> Tensor:
    """(B, N, C) -> (B*N, C)."""
    return x.reshape(-1, x.shape[2])


# ---------------------------------------------------------------------------- cls_scores


def patch_scores(logits: Tensor) -> Tensor:
    return logits.float().softmax(-1).mean(1)[:, 1:].contiguous()


def naive_cls_scores(q: Tensor, k: Tensor) -> Tensor:
    return patch_scores((q[:, :, None] @ k.transpose(-1, -2)).squeeze(2) * q.shape[-1] ** -0.5)


def einsum(q: Tensor, k: Tensor) -> Tensor:
    return patch_scores(torch.einsum("bhd,bhnd->bhn", q, k) * q.shape[-1] ** -0.5)


def matmul(q: Tensor, k: Tensor) -> Tensor:
    return patch_scores((k @ q[..., None]).squeeze(-1) * q.shape[-1] ** -0.5)


# --------------------------------------------------------------------------- gather_topk


def naive_gather_topk(x: Tensor, scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    kept = head_mean(scores).topk(num_keep).indices.sort().values
    kept_rows = x.gather(1, expanded(kept + 1, x))
    return torch.cat([x[:, :1], kept_rows], 1), with_prefix(kept)


def select(scores: Tensor, num_keep: int) -> Tensor:
    return with_prefix(head_mean(scores).topk(num_keep, sorted=False).indices.sort().values)


def topk_index_select(x: Tensor, scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    index = select(scores, num_keep)
    return index_select(x, index), index


def topk_indexing(x: Tensor, scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    index = select(scores, num_keep)
    return x[first_rows(len(x), 1, x.device), index], index


# ---------------------------------------------------------------------- gather_topk_fuse


def naive_gather_topk_fuse(x: Tensor, scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    order = scores.argsort(descending=True)
    kept, dropped = order[:, :num_keep].sort().values, order[:, num_keep:]
    kept_rows = x.gather(1, expanded(kept + 1, x))
    dropped_rows = x.gather(1, expanded(dropped + 1, x))
    weights = scores.gather(1, dropped).to(x.dtype)
    fused = (weights[..., None] * dropped_rows).sum(1, keepdim=True)
    return torch.cat([x[:, :1], kept_rows, fused], 1), with_prefix(kept)


def topk_index_select_bmm(x: Tensor, scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    tokens, index = topk_index_select(x, scores, num_keep)
    weights = scores.scatter(1, index[:, 1:] - 1, 0)
    fused = torch.bmm(weights[:, None].to(x.dtype), x[:, 1:])
    return torch.cat([tokens, fused], 1), index


def naive_gather_topk_fuse_backward(
    grad: Tensor, x: Tensor, scores: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    grad_patches = scores[..., None].to(x.dtype) * grad[:, -1:]
    grad_x = torch.cat([grad[:, :1], grad_patches], 1).scatter(1, expanded(index, x), grad[:, :-1])
    grad_scores = (x[:, 1:] * grad[:, -1:]).sum(-1).to(scores.dtype)
    return grad_x, grad_scores.scatter(1, index[:, 1:] - 1, 0)


def bmm_index_copy(grad: Tensor, x: Tensor, scores: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    last = grad[:, -1:]
    grad_x = torch.empty_like(x)
    torch.mul(scores[..., None].to(x.dtype), last, out=grad_x[:, 1:])
    rows(grad_x).index_copy_(0, flat(index, x.shape[1]), rows(grad[:, :-1]))
    grad_scores = torch.bmm(x[:, 1:], last.transpose(1, 2)).squeeze(2).to(scores.dtype)
    return grad_x, grad_scores.scatter_(1, index[:, 1:] - 1, 0)


# --------------------------------------------------------------------------- gather_rows


def naive_gather_rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, expanded(index, x))


def index_select(x: Tensor, index: Tensor) -> Tensor:
    return rows(x).index_select(0, flat(index, x.shape[1])).view(*index.shape, -1)


def naive_gather_rows_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    zeros = grad.new_zeros(grad.shape[0], num_tokens, grad.shape[2])
    return zeros.scatter_(1, expanded(index, grad), grad)


def index_copy_to_zeros(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    grad_x = grad.new_zeros(grad.shape[0], num_tokens, grad.shape[2])
    rows(grad_x).index_copy_(0, flat(index, num_tokens), rows(grad))
    return grad_x


# -------------------------------------------------------------------------- scatter_back


def naive_scatter_back(x: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
    return x.scatter(1, expanded(index, x), tokens)


def naive_scatter_back_update(x: Tensor, tokens: Tensor, index: Tensor, update: Tensor) -> Tensor:
    return (x + update[:, None]).scatter_(1, expanded(index, x), tokens)


def index_copy(x: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
    out = x.clone()
    rows(out).index_copy_(0, flat(index, x.shape[1]), rows(tokens))
    return out


def index_put(x: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
    out = x.clone()
    out[first_rows(len(x), 1, x.device), index] = tokens
    return out


def index_copy_update(x: Tensor, tokens: Tensor, index: Tensor, update: Tensor) -> Tensor:
    out = x + update[:, None]
    rows(out).index_copy_(0, flat(index, x.shape[1]), rows(tokens))
    return out


def naive_scatter_back_backward(grad: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return grad.scatter(1, expanded(index, grad), 0), grad.gather(1, expanded(index, grad))


def naive_scatter_back_backward_update(
    grad: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_tokens = naive_scatter_back_backward(grad, index)
    return grad_x, grad_tokens, grad_x.sum(1)


def index_fill(grad: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    grad_x = grad.clone()
    rows(grad_x).index_fill_(0, flat(index, grad.shape[1]), 0)
    return grad_x, index_select(grad, index)


def index_fill_update(grad: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_tokens = index_fill(grad, index)
    return grad_x, grad_tokens, grad_x.sum(1)


# -------------------------------------------------------------------------- match_higher


def naive_match_higher(features: Tensor, ranks: Tensor) -> Tensor:
    unit = F.normalize(features[:, 1:].float(), dim=-1)
    lower = ranks[:, None] <= ranks[:, :, None]
    return (unit @ unit.transpose(1, 2)).masked_fill(lower, -torch.inf).amax(-1)


def bmm_where(features: Tensor, ranks: Tensor) -> Tensor:
    unit = F.normalize(features[:, 1:].float(), dim=-1)
    cosines = torch.bmm(unit, unit.transpose(1, 2))
    return torch.where(ranks[:, None] > ranks[:, :, None], cosines, -torch.inf).amax(-1)


def sorted_bmm(features: Tensor, ranks: Tensor) -> Tensor:
    """Of ranks of which no two are equal."""
    order = ranks.argsort(1, descending=True)
    unit = F.normalize(index_select(features, order + 1).float(), dim=-1)
    size = (order.shape[1],) * 2
    mask = torch.full(size, -torch.inf, device=order.device).triu_()
    largest = torch.baddbmm(mask, unit, unit.transpose(1, 2)).amax(-1)
    return torch.empty_like(ranks).scatter_(1, order, largest)


# ---------------------------------------------------------------------------- match_kept


def with_own_places(owner: Tensor, index: Tensor) -> Tensor:
    return owner.scatter_(
        1, index, torch.arange(index.shape[1], device=index.device).expand_as(index)
    )


def one_feature(features: Tensor) -> Tensor:
    return features if features.dim() == 3 else features.mean(1)


def naive_match_kept(features: Tensor, index: Tensor) -> Tensor:
    unit = F.normalize(one_feature(features), dim=-1)
    kept = unit.gather(1, expanded(index[:, 1:], unit))
    return with_own_places((unit @ kept.transpose(1, 2)).argmax(-1) + 1, index)


def bmm_argmax(features: Tensor, index: Tensor) -> Tensor:
    features = one_feature(features)
    kept = F.normalize(index_select(features, index[:, 1:]), dim=-1)
    return with_own_places(torch.bmm(features, kept.transpose(1, 2)).argmax(-1) + 1, index)


# ---------------------------------------------------------------------------- merge_rows


def row_counts(owner: Tensor, num_rows: int) -> Tensor:
    counts = torch.zeros(len(owner), num_rows, device=owner.device)
    return counts.scatter_add_(1, owner, counts.new_ones(()).expand(owner.shape))


def naive_merge_rows(x: Tensor, owner: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    zeros = x.new_zeros(x.shape[0], num_rows, x.shape[2])
    mean = zeros.scatter_reduce(1, expanded(owner, x), x, "mean", include_self=False)
    return mean, row_counts(owner, num_rows)


def sums_by_owner(x: Tensor, owner: Tensor, num_rows: int) -> Tensor:
    """(B, N, C) -> (B, M, C) in float32."""
    total = torch.zeros(x.shape[0] * num_rows, x.shape[2], device=x.device)
    total.index_add_(0, flat(owner, num_rows), rows(x).float())
    return total.view(x.shape[0], num_rows, -1)


def index_add(x: Tensor, owner: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    counts = row_counts(owner, num_rows)
    return sums_by_owner(x, owner, num_rows).div_(counts[..., None]).to(x.dtype), counts


def one_hot_bmm(x: Tensor, owner: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    one_hot = x.new_zeros(x.shape[0], num_rows, x.shape[1]).scatter_(1, owner[:, None], 1)
    counts = row_counts(owner, num_rows)
    return torch.bmm(one_hot, x).div_(counts[..., None]), counts


def shares(owner: Tensor, num_rows: int, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, 1): of each row in its owner's mean; (B, M): the sizes, added up."""
    merged = torch.zeros(len(owner), num_rows, device=owner.device).scatter_add_(1, owner, sizes)
    return (sizes / merged.gather(1, owner))[..., None], merged


def naive_merge_rows_sizes(
    x: Tensor, owner: Tensor, num_rows: int, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    share, merged_sizes = shares(owner, num_rows, sizes)
    zeros = x.new_zeros(x.shape[0], num_rows, x.shape[2])
    return zeros.scatter_add_(1, expanded(owner, x), x * share.to(x.dtype)), merged_sizes


def index_add_sizes(
    x: Tensor, owner: Tensor, num_rows: int, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    share, merged_sizes = shares(owner, num_rows, sizes)
    return sums_by_owner(x * share, owner, num_rows).to(x.dtype), merged_sizes


def naive_merge_rows_backward(
    grad: Tensor, owner: Tensor, sizes: None, merged_sizes: Tensor
) -> Tensor:
    return (grad / merged_sizes[..., None].to(grad.dtype)).gather(1, expanded(owner, grad))


def scaled_index_select(grad: Tensor, owner: Tensor, sizes: None, merged_sizes: Tensor) -> Tensor:
    return index_select(grad / merged_sizes[..., None].to(grad.dtype), owner)


# -------------------------------------------------------------------------- restore_rows


def naive_restore_rows(x: Tensor, before: Tensor, after: Tensor, owner: Tensor) -> Tensor:
    place = expanded(owner, x)
    return x + after.gather(1, place) - before.gather(1, place)


def gain_index_select(x: Tensor, before: Tensor, after: Tensor, owner: Tensor) -> Tensor:
    return index_select(after - before, owner).add_(x)


def gradients(
    grad: Tensor, grad_after: Tensor, owner: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """That of a row alone goes to `after` only."""
    alone = (row_counts(owner, num_rows) == 1)[..., None]
    grad_x = grad.masked_fill(alone.gather(1, owner[..., None]), 0)
    return grad_x, -grad_after.masked_fill(alone, 0), grad_after


def naive_restore_rows_backward(
    grad: Tensor, owner: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    zeros = grad.new_zeros(grad.shape[0], num_rows, grad.shape[2])
    grad_after = zeros.scatter_add_(1, expanded(owner, grad), grad)
    return gradients(grad, grad_after, owner, num_rows)


def index_add_gradients(
    grad: Tensor, owner: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad_after = sums_by_owner(grad, owner, num_rows).to(grad.dtype)
    return gradients(grad, grad_after, owner, num_rows)
