"""What is timed: the shapes, the tensors and the operators with their rivals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import chains
import torch
from torch import Tensor

from skipvit_kernels import reference

WIDTH = 64  # of a head, in every ViT here


class Shape(NamedTuple):
    batch: int
    tokens: int
    channels: int

    def __str__(self) -> str:
        return f"B{self.batch}_N{self.tokens}_C{self.channels}"


# C is 192 for ViT-Ti, 384 for ViT-S, 768 for ViT-B and 1024 for ViT-L. N is 197 at 224 pixels and
# 577 at 384 with patches of 16, 1025 at 448 and 1370 at 518 (DINOv2) with patches of 14.
GRID = [Shape(*s) for s in itertools.product((1, 8, 64), (197, 577), (192, 384, 768))]
CPU_SHAPES = [
    *(Shape(1, 197, 384), Shape(8, 197, 384), Shape(64, 197, 768)),
    *(Shape(64, 577, 384), Shape(8, 577, 1024), Shape(8, 1370, 384)),
]
CPU_FULL = [
    *GRID,
    *(Shape(256, 197, 384), Shape(8, 197, 1024), Shape(8, 577, 1024)),
    *(Shape(8, 1370, 384), Shape(8, 1370, 768), Shape(8, 1370, 1024)),
]
CUDA_SHAPES = [
    *(Shape(256, 197, 384), Shape(256, 197, 768), Shape(32, 1025, 1024), Shape(1, 197, 384)),
    *(Shape(64, 577, 1024), Shape(64, 1370, 768)),
]
CUDA_FULL = [
    *dict.fromkeys(
        [
            *CUDA_SHAPES,
            *GRID,
            *(Shape(*s) for s in itertools.product((1, 64, 256), (577, 1370), (384, 768, 1024))),
        ]
    )
]


class Inputs:
    """Tensors of one shape as a ViT block hands them to the operators."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, *, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

        self.batch, self.num_tokens, self.channels = batch, tokens, channels = shape
        self.patches = patches = tokens - 1
        heads = channels // WIDTH
        self.num_keep = -(-patches * 45 // 100)
        self.num_rows = 1 + self.num_keep
        self.x = randn(batch, tokens, channels)
        self.x_leaf = self.x.detach().requires_grad_()
        # No two of an image are close: topk breaks ties as it likes, and means of heads round.
        rank = torch.rand(batch, patches, generator=generator, device=device).argsort(1)
        self.scores = (rank + 1) / (patches * (patches + 1) / 2)
        head_weights = torch.linspace(0.5, 1.5, heads, device=device)[:, None]
        self.head_scores = self.scores[:, None] * head_weights
        # timm's layout: the keys are a permuted view of the qkv projection.
        qkv = randn(batch, tokens, 3, heads, WIDTH).permute(2, 0, 3, 1, 4)
        self.q, self.k = qkv[0][:, :, 0], qkv[1]
        _, self.index = reference.gather_topk(self.x, self.scores, self.num_keep)
        self.tokens = randn(batch, self.num_rows, channels)
        self.tokens_leaf = self.tokens.detach().requires_grad_()
        self.update = randn(batch, channels)
        self.grad = randn(batch, tokens, channels)
        # Each row is like its owner and no other: every chain finds the same ones.
        places = torch.arange(self.num_rows, device=device).expand(batch, -1)
        owner = torch.rand(batch, tokens, generator=generator, device=device) * self.num_keep + 1
        self.owner = owner.long().scatter_(1, self.index, places)
        kinds = reference.gather_rows(randn(batch, self.num_rows, channels), self.owner)
        self.features = kinds + randn(batch, tokens, channels) / 8
        # As keys come: a permuted view, whose mean over heads is like that of its owner.
        kinds = reference.gather_rows(randn(batch, self.num_rows, WIDTH), self.owner)
        heads_of = kinds[:, :, None] + randn(batch, tokens, heads, WIDTH) / 8
        self.head_features = heads_of.transpose(1, 2)
        # Not by the reference, which takes three launches a token: too long for 2,048 inputs.
        self.merged, self.merged_sizes = chains.index_add(self.x, self.owner, self.num_rows)
        self.sizes = torch.rand(batch, tokens, generator=generator, device=device) + 0.5
        self.grad_fused = randn(batch, self.num_rows + 1, channels)

    def rows(self, per_image: int) -> int:
        """Bytes of that many rows in every image."""
        return self.batch * per_image * self.channels * self.x.element_size()

    @property
    def index_bytes(self) -> int:
        return 8 * self.index.numel()

    @property
    def score_bytes(self) -> int:
        return 4 * self.scores.numel()


def bytes_needed(shape: Shape, dtype: str) -> int:
    """Memory for one `Inputs` and all that is timed on it.

    All providers at (64, 577, 768) on the CPU took 46 times the size of x in bfloat16 and 52 times
    in float32. At most 9 times are tensors at one time; the rest are holes in what malloc keeps.
    """
    return 60 * shape.batch * shape.tokens * shape.channels * getattr(torch, dtype).itemsize


@dataclass(frozen=True)
class Case:
    """An operator; all its providers are called with `args`."""

    operator: Callable[[Any], Callable[..., Any]]  # of a backend, or of the reference
    naive: Callable[..., Any]
    best: tuple[Callable[..., Any], ...]
    args: Callable[[Inputs], tuple[Any, ...]]
    read: Callable[[Inputs], int]  # bytes that must be read
    written: Callable[[Inputs], int]  # and written
    rows: Callable[[Inputs], int]  # of an image that must be read or written, whichever is more
    exact: bool = True
    backward: bool = False  # the public operator through autograd, forward and backward

    def rivals(self) -> dict[str, Callable[..., Any]]:
        return {"naive": self.naive} | {f"best_{best.__name__}": best for best in self.best}

    def bytes(self, inputs: Inputs) -> int:
        return self.read(inputs) + self.written(inputs)


CASES = {
    "cls_scores": Case(
        lambda m: m.cls_scores,
        chains.naive_cls_scores,
        (chains.einsum, chains.matmul),
        lambda i: (i.q, i.k),
        lambda i: i.rows(i.num_tokens + 1),
        lambda i: i.score_bytes,
        lambda i: i.num_tokens,
        exact=False,
    ),
    "gather_topk": Case(
        lambda m: m.gather_topk,
        chains.naive_gather_topk,
        (chains.topk_index_select, chains.topk_indexing),
        lambda i: (i.x, i.scores, i.num_keep),
        lambda i: i.rows(i.num_rows) + i.score_bytes,
        lambda i: i.rows(i.num_rows) + i.index_bytes,
        lambda i: i.num_rows,
    ),
    "gather_topk(heads)": Case(
        lambda m: m.gather_topk,
        chains.naive_gather_topk,
        (chains.topk_index_select, chains.topk_indexing),
        lambda i: (i.x, i.head_scores, i.num_keep),
        lambda i: i.rows(i.num_rows) + 4 * i.head_scores.numel(),
        lambda i: i.rows(i.num_rows) + i.index_bytes,
        lambda i: i.num_rows,
    ),
    "gather_topk forward+backward": Case(
        lambda m: m.gather_topk,
        chains.naive_gather_topk,
        (chains.topk_index_select, chains.topk_indexing),
        lambda i: (i.x_leaf, i.scores, i.num_keep, i.tokens),
        lambda i: i.rows(2 * i.num_rows) + i.score_bytes + i.index_bytes,
        lambda i: i.rows(i.num_rows + i.num_tokens) + i.index_bytes,
        lambda i: i.num_rows + i.num_tokens,
        backward=True,
    ),
    "gather_topk_fuse": Case(
        lambda m: m.gather_topk_fuse,
        chains.naive_gather_topk_fuse,
        (chains.topk_index_select_bmm,),
        lambda i: (i.x, i.scores, i.num_keep),
        lambda i: i.rows(i.num_tokens) + i.score_bytes,
        lambda i: i.rows(i.num_rows + 1) + i.index_bytes,
        lambda i: i.num_tokens,
        exact=False,
    ),
    "gather_topk_fuse_backward": Case(
        lambda m: m.gather_topk_fuse_backward,
        chains.naive_gather_topk_fuse_backward,
        (chains.bmm_index_copy,),
        lambda i: (i.grad_fused, i.x, i.scores, i.index),
        lambda i: i.rows(i.num_tokens + 1) + i.score_bytes + i.index_bytes,
        lambda i: i.rows(i.num_tokens) + i.score_bytes,
        lambda i: i.num_tokens,
        exact=False,
    ),
    "gather_rows": Case(
        lambda m: m.gather_rows,
        chains.naive_gather_rows,
        (chains.index_select,),
        lambda i: (i.x, i.index),
        lambda i: i.rows(i.num_rows) + i.index_bytes,
        lambda i: i.rows(i.num_rows),
        lambda i: i.num_rows,
    ),
    "gather_rows_backward": Case(
        lambda m: m.gather_rows_backward,
        chains.naive_gather_rows_backward,
        (chains.index_copy_to_zeros,),
        lambda i: (i.tokens, i.index, i.num_tokens),
        lambda i: i.rows(i.num_rows) + i.index_bytes,
        lambda i: i.rows(i.num_tokens),
        lambda i: i.num_tokens,
    ),
    "scatter_back": Case(
        lambda m: m.scatter_back,
        chains.naive_scatter_back,
        (chains.index_copy, chains.index_put),
        lambda i: (i.x, i.tokens, i.index),
        lambda i: i.rows(i.num_tokens) + i.index_bytes,
        lambda i: i.rows(i.num_tokens),
        lambda i: i.num_tokens,
    ),
    "scatter_back(update)": Case(
        lambda m: lambda x, tokens, index, update: m.scatter_back(x, tokens, index, update=update),
        chains.naive_scatter_back_update,
        (chains.index_copy_update,),
        lambda i: (i.x, i.tokens, i.index, i.update),
        lambda i: i.rows(i.num_tokens + 1) + i.index_bytes,
        lambda i: i.rows(i.num_tokens),
        lambda i: i.num_tokens,
    ),
    "scatter_back_backward": Case(
        lambda m: lambda grad, index: m.scatter_back_backward(grad, index, False)[:2],
        chains.naive_scatter_back_backward,
        (chains.index_fill,),
        lambda i: (i.grad, i.index),
        lambda i: i.rows(i.num_tokens) + i.index_bytes,
        lambda i: i.rows(i.num_tokens + i.num_rows),
        lambda i: i.num_tokens + i.num_rows,
    ),
    "scatter_back_backward(update)": Case(
        lambda m: lambda grad, index: m.scatter_back_backward(grad, index, True),
        chains.naive_scatter_back_backward_update,
        (chains.index_fill_update,),
        lambda i: (i.grad, i.index),
        lambda i: i.rows(i.num_tokens) + i.index_bytes,
        lambda i: i.rows(i.num_tokens + i.num_rows + 1),
        lambda i: i.num_tokens + i.num_rows,
        exact=False,
    ),
    "scatter_back forward+backward": Case(
        lambda m: m.scatter_back,
        chains.naive_scatter_back,
        (chains.index_copy, chains.index_put),
        lambda i: (i.x_leaf, i.tokens_leaf, i.index, i.grad),
        lambda i: i.rows(2 * i.num_tokens) + 2 * i.index_bytes,
        lambda i: i.rows(2 * i.num_tokens + i.num_rows),
        lambda i: 2 * i.num_tokens + i.num_rows,
        backward=True,
    ),
    "match_higher": Case(
        lambda m: m.match_higher,
        chains.naive_match_higher,
        (chains.bmm_where, chains.sorted_bmm),
        lambda i: (i.features, i.scores),
        lambda i: i.rows(i.num_tokens) + i.score_bytes,
        lambda i: i.score_bytes,
        lambda i: i.num_tokens,
        exact=False,
    ),
    "match_kept": Case(
        lambda m: m.match_kept,
        chains.naive_match_kept,
        (chains.bmm_argmax,),
        lambda i: (i.features, i.index),
        lambda i: i.rows(i.num_tokens) + i.index_bytes,
        lambda i: 8 * i.owner.numel(),
        lambda i: i.num_tokens,
    ),
    "match_kept(heads)": Case(
        lambda m: m.match_kept,
        chains.naive_match_kept,
        (chains.bmm_argmax,),
        lambda i: (i.head_features, i.index),
        lambda i: i.rows(i.num_tokens) + i.index_bytes,
        lambda i: 8 * i.owner.numel(),
        lambda i: i.num_tokens,
    ),
    "merge_rows": Case(
        lambda m: m.merge_rows,
        chains.naive_merge_rows,
        (chains.index_add, chains.one_hot_bmm),
        lambda i: (i.x, i.owner, i.num_rows),
        lambda i: i.rows(i.num_tokens) + 8 * i.owner.numel(),
        lambda i: i.rows(i.num_rows) + 4 * i.merged_sizes.numel(),
        lambda i: i.num_tokens,
        exact=False,
    ),
    "merge_rows(sizes)": Case(
        lambda m: lambda x, owner, num_rows, sizes: m.merge_rows(x, owner, num_rows, sizes=sizes),
        chains.naive_merge_rows_sizes,
        (chains.index_add_sizes,),
        lambda i: (i.x, i.owner, i.num_rows, i.sizes),
        lambda i: i.rows(i.num_tokens) + (8 + 4) * i.owner.numel(),
        lambda i: i.rows(i.num_rows) + 4 * i.merged_sizes.numel(),
        lambda i: i.num_tokens,
        exact=False,
    ),
    "merge_rows_backward": Case(
        lambda m: m.merge_rows_backward,
        chains.naive_merge_rows_backward,
        (chains.scaled_index_select,),
        lambda i: (i.tokens, i.owner, None, i.merged_sizes),
        lambda i: i.rows(i.num_rows) + 8 * i.owner.numel() + 4 * i.merged_sizes.numel(),
        lambda i: i.rows(i.num_tokens),
        lambda i: i.num_tokens,
        exact=False,
    ),
    "restore_rows": Case(
        lambda m: m.restore_rows,
        chains.naive_restore_rows,
        (chains.gain_index_select,),
        lambda i: (i.x, i.merged, i.tokens, i.owner),
        lambda i: i.rows(i.num_tokens + 2 * i.num_rows) + 8 * i.owner.numel(),
        lambda i: i.rows(i.num_tokens),
        lambda i: i.num_tokens + 2 * i.num_rows,
        exact=False,
    ),
    "restore_rows_backward": Case(
        lambda m: m.restore_rows_backward,
        chains.naive_restore_rows_backward,
        (chains.index_add_gradients,),
        lambda i: (i.grad, i.owner, i.num_rows),
        lambda i: i.rows(i.num_tokens) + 8 * i.owner.numel(),
        lambda i: i.rows(i.num_tokens + 2 * i.num_rows),
        lambda i: i.num_tokens + 2 * i.num_rows,
        exact=False,
    ),
}
