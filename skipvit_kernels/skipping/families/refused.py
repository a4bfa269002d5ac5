"""Transformers that no patch can make skip tokens, and why: timm's, and this package's models."""

from __future__ import annotations

_WINDOWS = "it attends in windows of the grid, in which skipped patches would leave holes"
_PYRAMID = "its stages merge the grid of patches, in which skipped ones would leave holes"
_CONVOLUTIONS = "its blocks convolve over the grid of patches, in which skipped ones leave holes"

_CLASSES = {
    _WINDOWS: (
        *("DaVit", "GlobalContextVit", "Hiera", "HieraDet", "MaxxVit", "Nest", "SwinTransformer"),
        *("SwinTransformerV2", "SwinTransformerV2Cr", "TinyVit", "VisionTransformerSAM"),
    ),
    _PYRAMID: (
        *("ByobNet", "CoaT", "EdgeNeXt", "EfficientFormer", "EfficientFormerV2", "EfficientVit"),
        *("EfficientVitLarge", "EfficientVitMsra", "FastVit", "IFormer", "Levit", "LevitDistilled"),
        *("MetaFormer", "MultiScaleVit", "NextViT", "PoolingVisionTransformer", "SHViT", "VOLO"),
        *("PyramidVisionTransformerV2", "RepVit", "SwiftFormer", "Twins", "Visformer", "CSATv2"),
    ),
    "its attention maps are mixed across heads, and CLS joins late": ("Cait",),
    "half of its attention is by place in the whole grid, and CLS joins late": ("ConVit",),
    "it attends at two scales, whose patches do not stand for each other": ("CrossVit",),
    "each patch has a transformer of its own pixels, which would have to skip with it": ("TNT",),
    "its semantic tokens take the place of the patches": ("STViT", "STViTSwin"),
    f"its attention is between channels, and {_CONVOLUTIONS.removeprefix('its ')}": ("Xcit",),
}
REASONS = {name: reason for reason, names in _CLASSES.items() for name in names}


def reason(kind: type) -> str | None:
    """Why a class of models is refused; None where it is not known."""
    known = kind.__module__.startswith(("timm.models.", "skipvit_kernels.models."))
    return REASONS.get(kind.__name__) if known else None
