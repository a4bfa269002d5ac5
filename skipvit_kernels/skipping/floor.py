"""The sliced floor: a patched model's token counts, with the selection for free."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from skipvit_kernels.skipping import families
from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.families import Attended, Context, Family
from skipvit_kernels.skipping.methods import Reduced
from skipvit_kernels.skipping.patch import is_patched, patch, unpatch
from skipvit_kernels.skipping.run import Drop


def twin(model: nn.Module) -> nn.Module:
    """A copy of the model on the same parameters and buffers: many twins cost one set of weights.

    For timing variants of one model against each other. What one of them does to its weights or
    gradients happens to all.
    """
    shared: Any = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def sliced(model: nn.Module, config: SkipConfig | str) -> nn.Module:
    """The floor of `config`: a twin of the model that keeps the first K patches unseen.

    No scores; after the attention of a drop block the first P + K tokens go on (one more with
    method "fuse") and the others are put back behind them. It does all the work that a model at
    these token counts must do and none of the routing; its outputs mean nothing. A CLS-only last
    block is the same in both.

    Args:
        model: of a known family, patched or not; left as it is, but the floor shares its
            weights (`twin`).
        config: a `SkipConfig` or its notation; its warm-up and ramp are ignored.

    Raises:
        ValueError: as `patch`.
    """
    model = twin(model)
    if is_patched(model):
        unpatch(model)
    config = SkipConfig.parse(config) if isinstance(config, str) else config
    patch(model, config.at())
    blocks: Any = families.of(model).blocks(model)
    blocks.drops = {layer: Slice(**vars(drop)) for layer, drop in blocks.drops.items()}
    return model


class Slice(Drop):
    """A drop with the selection for free; what a method does at the rejoin is routing too."""

    def reduce(self, family: type[Family], attended: Attended, context: Context) -> Reduced:
        x, prefix = attended.x, self.num_prefix_tokens
        num_left = self.method.num_left(x.shape[1] - prefix, self.num_keep(x.shape[1]))
        rows = prefix + num_left
        # Two slices by one split: its backward is one copy, theirs would be two and a sum.
        kept, skipped = x.split([rows, x.shape[1] - rows], dim=1)
        index = torch.arange(rows, device=x.device).expand(len(x), -1)
        sizes = None
        if self.method.sizes and num_left < x.shape[1] - prefix:
            sizes = torch.ones(len(x), rows, device=x.device)
        return Reduced(kept, index, sizes, memo=skipped)

    def restore(self, x: Tensor, left: Reduced, tokens: Tensor) -> Tensor:
        return torch.cat([tokens, left.memo], dim=1)
