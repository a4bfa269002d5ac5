"""The operators: schema, fake and autograd of each, and the public function.

Shapes: B images, N = P + n tokens of which the first P are prefix tokens (CLS, distillation,
registers) and n are patches, C channels, H heads, D head width, K kept patches.

The same call gives the same bits every time. Rows that are moved and indices are the same in every
memory layout of the arguments; sums (cls_scores, the fused row, the gradients to scores and update)
may be added up in another order in another layout, within the rounding of a float32 sum.
"""

from skipvit_kernels.ops.library import LIBRARY, OPERATORS
from skipvit_kernels.ops.merge import match_higher, match_kept, merge_rows, restore_rows
from skipvit_kernels.ops.rows import gather_rows, scatter_back
from skipvit_kernels.ops.scores import cls_scores
from skipvit_kernels.ops.topk import gather_topk, gather_topk_fuse

__all__ = [
    "LIBRARY",
    "OPERATORS",
    "cls_scores",
    "gather_rows",
    "gather_topk",
    "gather_topk_fuse",
    "match_higher",
    "match_kept",
    "merge_rows",
    "restore_rows",
    "scatter_back",
]
