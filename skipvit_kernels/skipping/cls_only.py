"""What `cls_only_last_block` makes of timm's models: for their logits only."""

from __future__ import annotations

from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


class _ClsOnly:
    """A model whose last block computes the rows that its head reads, and no others.

    timm's forward goes through forward_features, whose other callers expect every token. They are
    refused: a slice without patches would give an empty map, or a mean that is NaN.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_head(self)  # reset_classifier may have changed it since
        return self.forward_head(super().forward_features(x, *args, **kwargs))  # type: ignore[misc]

    def forward_features(self, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError(
            "forward_features gives every token, and cls_only_last_block computes the last block's "
            "CLS row only: call the model itself, or patch it without cls_only_last_block"
        )


class ClsOnlyVisionTransformer(_ClsOnly, VisionTransformer):
    """timm's VisionTransformer under `cls_only_last_block`."""


class ClsOnlyVisionTransformerDistilled(_ClsOnly, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled under `cls_only_last_block`."""


_CLASSES: dict[type, type] = {
    VisionTransformer: ClsOnlyVisionTransformer,
    VisionTransformerDistilled: ClsOnlyVisionTransformerDistilled,
}


def check_head(model: Any) -> None:
    """Raise ValueError where the head reads more than CLS and the distillation token."""
    if model.global_pool != "token" or model.attn_pool is not None:
        raise ValueError(
            'cls_only_last_block needs a head that reads CLS only, global_pool="token", got '
            f"global_pool={model.global_pool!r}: it reads the other tokens of the last block too"
        )


def make_cls_only(model: Any) -> None:
    """Turn the model into its CLS-only class, in place; `undo` turns it back.

    Raises:
        ValueError: where its head reads other tokens, or its class is neither of timm's two.
    """
    if type(model) not in _CLASSES:
        known = " or ".join(cls.__name__ for cls in _CLASSES)
        raise ValueError(
            f"cls_only_last_block needs a timm {known}, got {type(model).__name__}: what its head "
            "reads is not known"
        )
    check_head(model)
    model.__class__ = _CLASSES[type(model)]


def undo(model: Any) -> None:
    """Give the model, where it is CLS-only, its own class back."""
    if isinstance(model, _ClsOnly):
        model.__class__ = type(model).__bases__[1]
