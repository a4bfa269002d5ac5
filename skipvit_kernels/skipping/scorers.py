"""Who stays: scores of the patches, the largest of which are kept."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipvit_kernels.ops import match_higher
from skipvit_kernels.ops.scores import cls_scores, trained_cls_scores
from skipvit_kernels.skipping.families import Attended, Family


def score(
    scorer: str,
    family: type[Family],
    attended: Attended,
    alike: Tensor,
    num_keep: int,
    num_prefix_tokens: int,
    *,
    sizes: Tensor | None = None,
    trained: bool = False,
    head: tuple[Any, Any] | None = None,
) -> Tensor:
    """Scores (B, n), or (B, H, n) to be averaged over the heads, of the patches of `attended`.

    Padding has minus infinity: it stays only where an image has fewer patches than stay.

    Args:
        scorer: "cls": how much CLS attends to each patch (SkipViT section 2); "mean": how much the
            mean of the patches' queries does, for models without CLS; "latent": how much the head's
            latent query would, if it pooled here; "norm": the norms of the keys; "similar": minus
            the largest cosine with a patch of odd position, and those themselves stay, as in ToMe's
            bipartite matching (2210.09461, section 3.2); "marginal": what CLS looks at and no other
            patch says already, in the spirit of maximal marginal relevance (Carbonell and
            Goldstein 1998): the root of its attention times the patch's size, times 1 - the largest
            cosine with a patch that CLS looks at more; "random": from torch's generator, as dropout
            draws.
        family: says which query a name stands for.
        attended: of the block that drops.
        alike: (B, N, C) by what patches are alike.
        num_keep: K, the patches that will stay.
        num_prefix_tokens: P, the leading tokens that are no patches.
        sizes: (B, N) float32, the patches that each token stands for, as often as which attention
            counts it; None: one each.
        trained: whether q and k get a gradient through the scores.
        head: the model's final norm and the pool behind it, for "latent".

    Raises:
        ValueError: with "similar", where more than half of the patches are to leave.
    """
    if not trained:
        tensors: dict[str, Any] = {
            n: t for n, t in attended._asdict().items() if isinstance(t, Tensor)
        }
        attended = attended._replace(**{name: t.detach() for name, t in tensors.items()})
    k, prefix = attended.k, num_prefix_tokens
    if scorer == "random":
        scores = torch.rand(k.shape[0], k.shape[2] - prefix, device=k.device)
    elif scorer == "norm":
        scores = k[:, :, prefix:].float().norm(dim=-1)
    elif scorer == "similar":
        scores = _redundancy(alike, num_keep, prefix)
    else:
        looks = "cls" if scorer == "marginal" else scorer
        q, k, scale, bias = family.look(looks, attended, prefix, head)
        if bias is not None:
            # One more channel, in which the query is 1: one operator scores with a bias or without.
            bias = (bias / scale).to(k.dtype).expand(k.shape[:3])
            q, k = F.pad(q, (0, 1), value=1.0), torch.cat([k, bias[..., None]], dim=-1)
        operator = functools.partial(
            trained_cls_scores if trained else cls_scores, scale=scale, num_prefix_tokens=prefix
        )
        if attended.contrast is None or scorer == "latent":
            scores = operator(q, k)
        else:
            maps = [operator(*half) for half in zip(q.chunk(2, 1), k.chunk(2, 1), strict=True)]
            scores = maps[0] - attended.contrast * maps[1]
        if sizes is not None:
            # Attention counts a merged token as often: up to the softmax's divisor, what it gets.
            # DeiT-tiny with 40 patches merged in layers 4, 7 and 10: a KL divergence of 0.0154
            # instead of 0.0184; with the divisor of every head too 0.0154.
            scores = scores * sizes[:, prefix:]
        if scorer == "marginal":
            scores = _marginal(scores, alike, prefix, sizes)
    if attended.valid is not None:
        padding = ~attended.valid[:, prefix:]
        scores = scores.masked_fill(padding if scores.dim() == 2 else padding[:, None], -torch.inf)
    return scores


def _redundancy(alike: Tensor, num_keep: int, num_prefix_tokens: int) -> Tensor:
    """(B, n): minus the largest cosine with a patch of odd position; infinite for those."""
    num_patches = alike.shape[1] - num_prefix_tokens
    if num_keep < num_patches // 2:
        raise ValueError(
            f'scorer "similar" keeps the {num_patches // 2} patches of odd position of '
            f"{num_patches}, got num_keep={num_keep}"
        )
    odd = (torch.arange(num_patches, device=alike.device) % 2).float().expand(alike.shape[0], -1)
    return -match_higher(alike, odd, num_prefix_tokens=num_prefix_tokens)


def _marginal(
    attention: Tensor, alike: Tensor, num_prefix_tokens: int, sizes: Tensor | None
) -> Tensor:
    """(B, n) from what CLS pays to each patch: less for those like one that it looks at more."""
    other = match_higher(alike, attention, num_prefix_tokens=num_prefix_tokens)
    # Differential attention may be negative, and rounding puts a cosine above 1. What CLS looks at
    # most is like none that it looks at more: infinite.
    weight = attention.clamp(min=0)
    if sizes is not None:
        weight = weight * sizes[:, num_prefix_tokens:]
    return weight.sqrt() * (1 - other).clamp(min=0)
