"""EViT: the patches that leave become one token, their sum by score, and never return."""

from __future__ import annotations

from skipvit_kernels.ops import gather_topk, gather_topk_fuse
from skipvit_kernels.skipping.methods.base import Candidates, Method, Reduced


class Fuse(Method):
    name = "fuse"
    ending = "fused"
    weighs = True

    def reduce(self, seen: Candidates) -> Reduced:
        gather = gather_topk_fuse if seen.num_keep < seen.scores.shape[-1] else gather_topk
        prefix = seen.num_prefix_tokens
        return Reduced(*gather(seen.x, seen.scores, seen.num_keep, num_prefix_tokens=prefix))

    def num_left(self, num_patches: int, num_keep: int) -> int:
        return num_keep + (num_keep < num_patches)
