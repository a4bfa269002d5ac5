"""SkipViT: the patches pass the blocks by, and return as they left or with the mean movement."""

from __future__ import annotations

import torch
from torch import Tensor

from skipvit_kernels.ops import gather_topk, scatter_back
from skipvit_kernels.skipping.methods.base import Candidates, Method, Reduced


class Skip(Method):
    name = "skip"
    updates = ("none", "mean")

    def reduce(self, seen: Candidates) -> Reduced:
        prefix = seen.num_prefix_tokens
        return Reduced(*gather_topk(seen.x, seen.scores, seen.num_keep, num_prefix_tokens=prefix))

    def restore(self, x: Tensor, left: Reduced, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
        update = None
        if self.update == "mean" and tokens.shape[1] > num_prefix_tokens:
            after, before = (_patch_mean(t, num_prefix_tokens) for t in (tokens, left.tokens))
            update = (after - before).to(x.dtype)
        return scatter_back(x, tokens, left.kept, update=update)


def _patch_mean(tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """(B, C) in float32: in bfloat16 the difference of two such means would be rounding."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return tokens[:, num_prefix_tokens:].mean(dim=1, dtype=dtype)
