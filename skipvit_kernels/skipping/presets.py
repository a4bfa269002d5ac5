"""Configurations worth a look: the paper's, and those that a given model can have."""

from __future__ import annotations

import dataclasses
from typing import Any

from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.cost import ViTShape
from skipvit_kernels.skipping.patch import check

# SkipViT's Table 1, for 12 blocks.
TABLE_1 = (
    *("6(45%)+fused", "4,7(30%,30%)+10", "4,7(30%,30%)+11", "5,8(35%,35%)+10"),
    *("5,8(35%,35%)+11", "6(45%)+11", "6(50%)+11", "6(55%)+11"),
)

# What loses little without training, the second less and faster, where there is a CLS to say who
# stays: docs/results/frontier_deit_tiny.
UNTRAINED = ("6(55%)+12:merge", "4,5,8(27%,33%,50%)+12:merge,score=marginal,match=keys")


def scaled(config: str, depth: int) -> str:
    """A configuration for 12 blocks at the same twelfths of another depth: ViT-L's 24, say."""
    parsed = SkipConfig.parse(config)

    def layer(at: int) -> int:
        return (at - 1) * depth // 12 + 1

    rejoin = parsed.rejoin_at
    return str(
        dataclasses.replace(
            parsed,
            drop_at=tuple(map(layer, parsed.drop_at)),
            rejoin_at=layer(rejoin) if isinstance(rejoin, int) else rejoin,
        )
    )


def usual(model: Any) -> tuple[tuple[str, ...], list[str]]:
    """What is worth a first look on this model, and why the rest is not possible on it.

    The lossless last block; and with it the paper's fastest skip, its two stages, EViT's fused
    token, and merging in one and in three layers, at the same twelfths of the depth.

    Raises:
        ValueError: where the model cannot be patched at all.
    """
    check(model, SkipConfig())
    configs, notes, cls = [], [], ":cls"
    try:
        check(model, SkipConfig.parse(cls))
        configs.append(cls)
    except ValueError as error:
        cls = ""
        notes.append(f"The lossless last block is not possible: {error}.")
    for config in ("6(55%)+11", "4,7(30%,30%)+10", "6(45%)+fused", *UNTRAINED):
        try:
            parsed = SkipConfig.parse(scaled(config, ViTShape.of(model).depth))
            text = str(dataclasses.replace(parsed, cls_only_last_block=bool(cls)))
            check(model, SkipConfig.parse(text))
            configs.append(text)
        except ValueError as error:
            notes.append(f"{config} is not possible here: {error}.")
    return tuple(configs), notes
