"""Who stays: scores of the patches, the largest of which are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from skipvit_kernels.ops.scores import cls_scores, trained_cls_scores
from skipvit_kernels.skipping.families import Attended, Family


def score(
    scorer: str,
    family: type[Family],
    attended: Attended,
    num_prefix_tokens: int,
    *,
    trained: bool = False,
) -> Tensor:
    """Scores (B, n), or (B, H, n) to be averaged over the heads, of the patches of `attended`.

    Args:
        scorer: "cls": how much CLS attends to each patch (SkipViT section 2); "mean": how much the
            mean of the patches' queries does, for models without CLS; "norm": the norms of the
            keys; "random": from torch's generator, as dropout draws.
        family: says which query a name stands for.
        attended: of the block that drops.
        num_prefix_tokens: P, the leading tokens that are no patches.
        trained: whether q and k get a gradient through the scores.
    """
    _, q, k, scale = attended
    if scorer == "random":
        return torch.rand(k.shape[0], k.shape[2] - num_prefix_tokens, device=k.device)
    if not trained:
        q, k = q.detach(), k.detach()
    if scorer == "norm":
        return k[:, :, num_prefix_tokens:].float().norm(dim=-1)
    query = family.query(scorer, q, num_prefix_tokens)
    operator = trained_cls_scores if trained else cls_scores
    return operator(query, k, scale=scale, num_prefix_tokens=num_prefix_tokens)
