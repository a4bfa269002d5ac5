"""ToMe on timm's VisionTransformer, ours: written plainly from the paper, to compare with.

From arXiv 2210.09461, section 3, alone; the authors' code was neither copied nor read. Two choices
of ours: what is left of both sets goes on in the order of positions, and attention runs under SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvit_kernels.skipping.families import Context
from skipvit_kernels.skipping.families.vit import ViT


class ToMe(nn.Module):
    """A timm VisionTransformer with a CLS head that merges r patches in every layer.

    Args:
        model: holds the weights; left as it is.
        r: pairs that merge between the attention and the MLP of a layer, at most half of what is
            left.
        cls_only_last_block: compute of the last block the CLS row alone, which is not the paper's.
    """

    def __init__(self, model: Any, r: int, *, cls_only_last_block: bool = False) -> None:
        super().__init__()
        self.model, self.r, self.cls_only = model, r, cls_only_last_block

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        sizes = None
        for layer, block in enumerate(model.blocks, start=1):
            context = Context(sizes=sizes)  # attention adds the log of the sizes to its logits
            if self.cls_only and layer == len(model.blocks):
                x = ViT.attend_rows(block, x, context, 1)
            else:
                attended = ViT.attend(block, x, context)
                x, sizes = merge(attended.x, attended.k, sizes, self.r)
            x = ViT.feed(block, x)
        return model.forward_head(model.norm(x))


def merge(x: Tensor, keys: Tensor, sizes: Tensor | None, r: int) -> tuple[Tensor, Tensor]:
    """The r most similar pairs of x (B, N, C), one of each from either set, as means by size.

    CLS, the first token, is in neither set. `keys` (B, H, N, D) are averaged over the heads, and
    compared by their cosine.
    """
    metric = F.normalize(sum(keys[:, :, 1:].unbind(1)), dim=-1)
    a, b = metric[:, ::2], metric[:, 1::2]
    nearest = (a @ b.transpose(1, 2)).max(dim=2)
    leaving = nearest.values.topk(min(r, b.shape[1]), dim=1).indices
    into = 2 + 2 * nearest.indices.gather(1, leaving)
    leaving = 1 + 2 * leaving
    sizes = x.new_ones(x.shape[:2]) if sizes is None else sizes
    x = x * sizes[..., None]
    wide = (-1, -1, x.shape[2])
    x = x.scatter_add(1, into[..., None].expand(wide), x.gather(1, leaving[..., None].expand(wide)))
    sizes = sizes.scatter_add(1, into, sizes.gather(1, leaving))
    stays = torch.ones_like(sizes, dtype=torch.bool).scatter(1, leaving, False)
    x, sizes = x[stays].view(len(x), -1, x.shape[2]), sizes[stays].view(len(x), -1)
    return x / sizes[..., None], sizes
