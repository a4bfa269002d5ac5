"""Patches that merge and come back: match_higher, match_kept, merge_rows and restore_rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skipvit_kernels import reference
from skipvit_kernels.ops import checks
from skipvit_kernels.ops.library import operator, wants_grad

# -------------------------------------------------------------------------- match_higher


def _match_higher_fake(features: Tensor, ranks: Tensor, *, num_prefix_tokens: int = 1) -> Tensor:
    return ranks.new_empty(ranks.shape)


def _match_higher_graph(features: Tensor, ranks: Tensor, *, num_prefix_tokens: int = 1) -> Tensor:
    """All cosines in one product."""
    if ranks.shape[1] == 0:
        return ranks.new_empty(ranks.shape)
    features = features[..., num_prefix_tokens:, :]
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if features.dim() == 4:
        features = reference.head_mean(features)
    norm = features.square().sum(-1, keepdim=True).sqrt()
    unit = torch.where(norm > 0, features / norm, features)
    mine, other = ranks[:, :, None], ranks[:, None]
    higher = (other > mine) | (other.isnan() & ~mine.isnan())
    cosine = unit @ unit.transpose(1, 2)
    return torch.where(higher, cosine, -torch.inf).amax(-1).float()


_match_higher = operator(
    "match_higher(Tensor features, Tensor ranks, *, int num_prefix_tokens=1) -> Tensor",
    reference.match_higher,
    _match_higher_fake,
    graph=_match_higher_graph,
)


def match_higher(features: Tensor, ranks: Tensor, *, num_prefix_tokens: int = 1) -> Tensor:
    """How much each patch looks like one that ranks above it: what those would say without it.

    Args:
        features: (B, N, D) what is compared, tokens or keys, or (B, H, N, D) and then averaged over
            the heads in float32; float32, float16, bfloat16 or float64, any strides.
        ranks: (B, n) float32, any strides. NaN ranks above every number; equal ones do not rank
            above each other.
        num_prefix_tokens: P = N - n, the leading tokens that are no patches.

    Returns:
        (B, n) float32: the largest cosine of a patch with one of higher rank, computed in float32
        (float64 features: in float64); minus infinity where none ranks above it. NaN counts as the
        largest. A row of zeros has cosine 0. No gradient.

    Raises:
        ValueError: on a wrong shape, device or count. TypeError: on a wrong dtype.
    """
    checks.features(features)
    checks.float32("ranks", ranks)
    checks.same_device("ranks", ranks, "features", features)
    batch, num_tokens = features.shape[0], features.shape[-2]
    checks.count("num_prefix_tokens", num_prefix_tokens, num_tokens)
    checks.shape("ranks", ranks, batch, num_tokens - num_prefix_tokens)
    features, ranks = (t.detach() if t.requires_grad else t for t in (features, ranks))
    return _match_higher(features, ranks, num_prefix_tokens=num_prefix_tokens)


# ---------------------------------------------------------------------------- match_kept


def _match_kept_fake(features: Tensor, index: Tensor, *, num_prefix_tokens: int = 1) -> Tensor:
    return index.new_empty((features.shape[0], features.shape[-2]))


def _match_kept_graph(features: Tensor, index: Tensor, *, num_prefix_tokens: int = 1) -> Tensor:
    """All cosines in one product: equal ones may round apart, and the lowest place lose the tie."""
    places = torch.arange(index.shape[1], device=index.device).expand_as(index)
    if index.shape[1] == num_prefix_tokens:
        return places
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if features.dim() == 4:
        features = reference.head_mean(features)
    kept = reference.gather_rows(features, index[:, num_prefix_tokens:])
    norm = kept.square().sum(-1, keepdim=True).sqrt()
    cosine = features @ torch.where(norm > 0, kept / norm, kept).transpose(1, 2)
    # ONNX leaves open where NaN ranks.
    cosine = cosine.masked_fill(cosine.isnan(), torch.inf)
    return (cosine.argmax(-1) + num_prefix_tokens).scatter(1, index, places)


_match_kept = operator(
    "match_kept(Tensor features, Tensor index, *, int num_prefix_tokens=1) -> Tensor",
    reference.match_kept,
    _match_kept_fake,
    graph=_match_kept_graph,
)


def match_kept(features: Tensor, index: Tensor, *, num_prefix_tokens: int = 1) -> Tensor:
    """The kept patch that each dropped patch looks most like: where `merge_rows` puts it.

    Args:
        features: (B, N, D) what is compared, tokens or keys, or (B, H, N, D) and then averaged over
            the heads in float32; float32, float16, bfloat16 or float64, any strides.
        index: (B, P + K) int64 rows in [0, N), unique within an image, as `gather_topk` returns
            them. The CPU kernel checks both; elsewhere a violation is undefined.
        num_prefix_tokens: P, the leading entries of the index that nothing is matched with. K is at
            least 1 where there are rows outside of the index.

    Returns:
        (B, N) int64 owners in [0, P + K): of row index[b, r] its own place r, of any other row the
        place r >= P of the kept patch with the largest cosine, computed in float32 (float64
        features: in float64). Equal cosines: the lowest place. NaN counts as the largest: a row
        with NaN goes to the first kept patch. A row of zeros has cosine 0. No gradient.

    Raises:
        ValueError: on a wrong shape, device, count or row. TypeError: on a wrong dtype.
    """
    checks.features(features)
    batch, num_tokens = features.shape[0], features.shape[-2]
    checks.int64("index", index)
    checks.same_device("index", index, "features", features)
    checks.shape("index", index, batch, "M")
    num_rows = index.shape[1]
    checks.count("num_prefix_tokens", num_prefix_tokens, num_rows)
    if num_rows == num_prefix_tokens and num_rows < num_tokens:
        raise ValueError(
            f"index must hold at least one kept patch behind {num_prefix_tokens} prefix tokens, "
            f"got shape {tuple(index.shape)} for {num_tokens} tokens"
        )
    features = features.detach() if features.requires_grad else features
    return _match_kept(features, index, num_prefix_tokens=num_prefix_tokens)


# ---------------------------------------------------------------------------- merge_rows


def _merge_rows_fake(
    x: Tensor, owner: Tensor, num_rows: int, *, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    tokens = x.new_empty((x.shape[0], num_rows, x.shape[2]))
    return tokens, x.new_empty((x.shape[0], num_rows), dtype=torch.float32)


def _merge_rows_backward_fake(
    grad: Tensor, owner: Tensor, sizes: Tensor | None, merged_sizes: Tensor
) -> Tensor:
    return grad.new_empty((grad.shape[0], owner.shape[1], grad.shape[2]))


def _merge_rows_graph(
    x: Tensor, owner: Tensor, num_rows: int, *, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if sizes is None:
        sizes = torch.ones(owner.shape, device=x.device)
    merged_sizes = sizes.new_zeros(x.shape[0], num_rows).scatter_add(1, owner, sizes)
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Exactly 1 for a row alone.
    weights = (sizes.to(dtype) / merged_sizes.to(dtype).gather(1, owner))[..., None]
    tokens = x.new_zeros(x.shape[0], num_rows, x.shape[2], dtype=dtype)
    tokens = tokens.scatter_add(1, owner[..., None].expand_as(x), weights * x.to(dtype))
    return tokens.to(x.dtype), merged_sizes


_merge_rows = operator(
    "merge_rows(Tensor x, Tensor owner, SymInt num_rows, *, Tensor? sizes=None)"
    " -> (Tensor, Tensor)",
    reference.merge_rows,
    _merge_rows_fake,
    graph=_merge_rows_graph,
)
_merge_rows_backward = operator(
    "merge_rows_backward(Tensor grad, Tensor owner, Tensor? sizes, Tensor merged_sizes) -> Tensor",
    reference.merge_rows_backward,
    _merge_rows_backward_fake,
)


class _MergeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, owner: Tensor, num_rows: int, sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        tokens, merged_sizes = _merge_rows(x, owner, num_rows, sizes=sizes)
        ctx.save_for_backward(owner, sizes, merged_sizes)
        ctx.mark_non_differentiable(merged_sizes)
        ctx.set_materialize_grads(False)
        return tokens, merged_sizes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        return _merge_rows_backward(grad, *ctx.saved_tensors), None, None, None


def merge_rows(
    x: Tensor, owner: Tensor, num_rows: int, *, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The size-weighted mean of each owner's rows (ToMe section 3.1).

    Args:
        x: (B, N, C) tokens, float32, float16, bfloat16 or float64, any strides.
        owner: (B, N) int64 with every value of [0, M) in every image, as `match_kept` returns it.
            The CPU kernel checks both; elsewhere a row with an owner out of range is left out, and
            a value that no row has gives a row of NaN.
        num_rows: M in [0, N].
        sizes: (B, N) float32, how many patches each row stands for; default 1 each. Positive: the
            CPU kernel checks that, elsewhere others are used as they are.

    Returns:
        tokens: (B, M, C): the sum of size * row over the owner's rows, in ascending position and in
            float32 (float64 x: in float64), over the sum of their sizes. A row alone is moved bit
            for bit. Differentiable in x; only owner and sizes are saved.
        sizes: (B, M) float32, the sum of the sizes. No gradient.

    Raises:
        ValueError: on a wrong shape, device, count, owner or size. TypeError: on a wrong dtype.
    """
    checks.shape("x", x, "B", "N", "C")
    checks.floating("x", x)
    checks.owner(owner, x)
    checks.count("num_rows", num_rows, x.shape[1])
    if sizes is not None:
        checks.shape("sizes", sizes, *owner.shape)
        checks.float32("sizes", sizes)
        checks.same_device("sizes", sizes, "x", x)
        sizes = sizes.detach() if sizes.requires_grad else sizes
    if wants_grad(x):
        return _MergeRows.apply(x, owner, num_rows, sizes)
    return _merge_rows(x, owner, num_rows, sizes=sizes)


# -------------------------------------------------------------------------- restore_rows


def _restore_rows_fake(x: Tensor, before: Tensor, after: Tensor, owner: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _restore_rows_backward_fake(
    grad: Tensor, owner: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (grad.shape[0], num_rows, grad.shape[2])
    return grad.new_empty(grad.shape), grad.new_empty(shape), grad.new_empty(shape)


_restore_rows = operator(
    "restore_rows(Tensor x, Tensor before, Tensor after, Tensor owner) -> Tensor",
    reference.restore_rows,
    _restore_rows_fake,
)
_restore_rows_backward = operator(
    "restore_rows_backward(Tensor grad, Tensor owner, SymInt num_rows) -> (Tensor, Tensor, Tensor)",
    reference.restore_rows_backward,
    _restore_rows_backward_fake,
)


class _RestoreRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor, after: Tensor, owner: Tensor) -> Tensor:
        ctx.save_for_backward(owner)
        ctx.num_rows = after.shape[1]
        return _restore_rows(x, before, after, owner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (owner,) = ctx.saved_tensors
        return *_restore_rows_backward(grad, owner, ctx.num_rows), None


def restore_rows(x: Tensor, before: Tensor, after: Tensor, owner: Tensor) -> Tensor:
    """Give every merged row back: its own value plus what its merged token gained.

    Args:
        x: (B, N, C) all rows as they were before the merge, any strides. Not modified.
        before: (B, M, C) in x's dtype, the merged tokens as `merge_rows` returned them.
        after: (B, M, C) in x's dtype, the merged tokens as they are now.
        owner: (B, N) int64 in [0, M), the owners that they were merged by. The CPU kernel checks
            the range; elsewhere a row with an owner out of range stays x's.

    Returns:
        (B, N, C): x + after[owner] - before[owner], from left to right in float32 (float64 x: in
        float64); after[owner] bit for bit where the owner has one row. Differentiable in x, before
        and after; only the owners are saved.

    Raises:
        ValueError: on a wrong shape, device or owner. TypeError: on a wrong dtype.
    """
    checks.shape("x", x, "B", "N", "C")
    checks.floating("x", x)
    checks.owner(owner, x)
    checks.shape("before", before, x.shape[0], "M", x.shape[2])
    checks.shape("after", after, *before.shape)
    for name, tokens in (("before", before), ("after", after)):
        checks.same_dtype(name, tokens, "x", x)
        checks.same_device(name, tokens, "x", x)
    if wants_grad(x, before, after):
        return _RestoreRows.apply(x, before, after, owner)
    return _restore_rows(x, before, after, owner)
