"""The sliced floor: a patched model's token counts, with the selection for free."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from skipvit_kernels.skipping import families
from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.families import Context
from skipvit_kernels.skipping.patch import is_patched, patch, unpatch
from skipvit_kernels.skipping.run import Drop, Layer, Run, run_layers


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
        config: a `SkipConfig` or its notation; its warm-up is ignored.

    Raises:
        ValueError: as `patch`.
    """
    model = twin(model)
    if is_patched(model):
        unpatch(model)
    patch(model, config, warmup_epochs=0)
    blocks: Any = families.of(model).blocks(model)
    blocks.skip = sliced_run
    return model


def sliced_run(x: Tensor, first: Layer, drop: Drop, others: Run, contexts: list[Context]) -> Tensor:
    """`skip_run` with the selection for free; what a method does at the rejoin is routing too."""
    context = contexts[first.context]
    num_patches = x.shape[1] - drop.num_prefix_tokens
    num_left = drop.method.num_left(num_patches, drop.num_keep(x.shape[1]))
    rows = drop.num_prefix_tokens + num_left
    x = first.family.attend(first.block, x, context).x
    # Two slices by one split: its backward is one copy, theirs would be two and a sum.
    kept, skipped = x.split([rows, x.shape[1] - rows], dim=1)
    tokens = first.family.feed(first.block, kept)
    index = torch.arange(rows, device=x.device).expand(len(x), -1)
    inner = [first.family.narrow(context, index, drop.num_prefix_tokens) for context in contexts]
    tokens = run_layers(tokens, others, inner, sliced_run)
    return torch.cat([tokens, skipped], dim=1) if drop.rejoin else tokens
