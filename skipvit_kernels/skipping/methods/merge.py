"""Merging: each patch that leaves goes into the kept one most like it, and returns with its gain.

Attention counts a merged token as often as it has patches (ToMe, 2210.09461, section 3.2).
"""

from __future__ import annotations

from torch import Tensor

from skipvit_kernels.ops import gather_topk, match_kept, merge_rows, restore_rows
from skipvit_kernels.skipping.methods.base import Candidates, Method, Reduced


class Merge(Method):
    name = "merge"
    option = "merge"
    sizes = True

    def reduce(self, seen: Candidates) -> Reduced:
        x, prefix = seen.x, seen.num_prefix_tokens
        if seen.num_keep == seen.scores.shape[-1]:  # nothing to merge, and no sizes to tell
            return Reduced(*gather_topk(x, seen.scores, seen.num_keep, num_prefix_tokens=prefix))
        # One channel: the rows themselves are moved with those that they are merged with.
        one = x[..., :1].detach()
        _, kept = gather_topk(one, seen.scores, seen.num_keep, num_prefix_tokens=prefix)
        owner = match_kept(seen.alike.detach(), kept, num_prefix_tokens=prefix)
        tokens, sizes = merge_rows(x, owner, kept.shape[1], sizes=seen.sizes)
        return Reduced(tokens, kept, sizes, owner)

    def restore(self, x: Tensor, left: Reduced, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
        if left.owner is None:
            return tokens
        return restore_rows(x, left.tokens, tokens, left.owner)

    def spread(self, x: Tensor, left: Reduced, tokens: Tensor) -> Tensor:
        if left.owner is None:
            return tokens
        return restore_rows(
            x.new_zeros(x.shape), tokens.new_zeros(tokens.shape), tokens, left.owner
        )
