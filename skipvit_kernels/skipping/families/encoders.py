"""timm's vision encoders of language models, Qwen3-VL and DeepSeek-VL, and classifiers on them."""

from __future__ import annotations

from typing import Any

from skipvit_kernels.skipping.families.base import Family


class Encoder(Family):
    """An encoder, or a classifier around one: no CLS, RoPE, and a head that reads the grid."""

    @staticmethod
    def trunk(model: Any) -> Any:
        return getattr(model, "encoder", model)

    @staticmethod
    def has_cls(model: Any) -> bool:
        return False

    @staticmethod
    def placed_by(model: Any) -> str | None:
        return "RoPE"

    @staticmethod
    def reads_grid(model: Any) -> str | None:
        return "the reshape to a grid"
