"""Who stays: scores of the patches, the largest of which are kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    trained: bool = False,
) -> Tensor:
    """Scores (B, n), or (B, H, n) to be averaged over the heads, of the patches of `attended`.

    Args:
        scorer: "cls": how much CLS attends to each patch (SkipViT section 2); "mean": how much the
            mean of the patches' queries does, for models without CLS; "norm": the norms of the
            keys; "similar": minus the largest cosine with a patch of odd position, and those
            themselves stay, as in ToMe's bipartite matching (2210.09461, section 3.2); "random":
            from torch's generator, as dropout draws.
        family: says which query a name stands for.
        attended: of the block that drops.
        alike: (B, N, C), or (B, H, N, D) to be averaged over the heads: by what patches are alike.
        num_keep: K, the patches that will stay.
        num_prefix_tokens: P, the leading tokens that are no patches.
        trained: whether q and k get a gradient through the scores.

    Raises:
        ValueError: with "similar", where more than half of the patches are to leave.
    """
    _, q, k, scale = attended
    if scorer == "random":
        return torch.rand(k.shape[0], k.shape[2] - num_prefix_tokens, device=k.device)
    if scorer == "similar":
        return _redundancy(alike.detach(), num_keep, num_prefix_tokens)
    if not trained:
        q, k = q.detach(), k.detach()
    if scorer == "norm":
        return k[:, :, num_prefix_tokens:].float().norm(dim=-1)
    query = family.query(scorer, q, num_prefix_tokens)
    operator = trained_cls_scores if trained else cls_scores
    return operator(query, k, scale=scale, num_prefix_tokens=num_prefix_tokens)


def _redundancy(alike: Tensor, num_keep: int, num_prefix_tokens: int) -> Tensor:
    """(B, n): minus the largest cosine with a patch of odd position; infinite for those."""
    alike = alike.float() if alike.dim() == 3 else alike.mean(dim=1, dtype=torch.float32)
    alike = F.normalize(alike[:, num_prefix_tokens:], dim=-1)
    num_patches = alike.shape[1]
    if num_keep < num_patches // 2:
        raise ValueError(
            f'scorer "similar" keeps the {num_patches // 2} patches of odd position of '
            f"{num_patches}, got num_keep={num_keep}"
        )
    even, odd = alike[:, ::2], alike[:, 1::2]
    if num_patches < 2:
        return even.new_zeros(even.shape[:2])
    scores = -(even @ odd.transpose(1, 2)).amax(dim=2)
    return torch.stack([scores, torch.full_like(scores, torch.inf)], dim=2).flatten(1)[
        :, :num_patches
    ]
