"""What the arithmetic alone allows: multiply-accumulates of a ViT under a SkipConfig."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.families import ViTShape


def macs(model_or_shape: nn.Module | ViTShape, config: SkipConfig | str = "") -> int:
    """Multiply-accumulates of one image's forward; a training step costs three times that.

    Projections, attention, MLP, patch embedding and head are counted; norms, activations and the
    selection itself (0.02 % of a block for the CLS row of ViT-S) are not.

    Args:
        model_or_shape: a model of a known family, patched or not, or a `ViTShape`.
        config: a `SkipConfig` or its notation; default nothing dropped.

    Raises:
        ValueError: where the configuration does not fit the depth.
    """
    shape = model_or_shape if isinstance(model_or_shape, ViTShape) else ViTShape.of(model_or_shape)
    config = SkipConfig.parse(config) if isinstance(config, str) else config
    attention_dim = shape.attention_dim or shape.embed_dim
    attention_weights = shape.attention_weights or 4 * shape.embed_dim**2
    mlp_weights = shape.mlp_weights or 8 * shape.embed_dim**2
    kv_weights = 2 * shape.embed_dim * attention_dim
    blocks = sum(
        keys * kv_weights
        + queries * (attention_weights - kv_weights)
        + 2 * queries * keys * attention_dim
        + mlp * mlp_weights
        for keys, queries, mlp in _work(shape, config)
    )
    return blocks + shape.other_macs


def activations(model_or_shape: nn.Module | ViTShape, config: SkipConfig | str = "") -> int:
    """Numbers that the blocks keep of one image for the backward; times 4 bytes in float32.

    Per token: inputs of both norms, of every linear map and of the activation function, and
    queries, keys, values (the fused attention keeps no map). ViT-S/16 at 224: 14.5 million.

    Args and Raises: as `macs`.
    """
    shape = model_or_shape if isinstance(model_or_shape, ViTShape) else ViTShape.of(model_or_shape)
    config = SkipConfig.parse(config) if isinstance(config, str) else config
    width, attention_dim = shape.embed_dim, shape.attention_dim or shape.embed_dim
    hidden = (shape.mlp_weights or 8 * width**2) // (2 * width)
    return sum(
        keys * (2 * width + 2 * attention_dim)
        + queries * 2 * attention_dim
        + mlp * (2 * width + 2 * hidden)
        for keys, queries, mlp in _work(shape, config)
    )


def ideal_speedup(model_or_shape: nn.Module | ViTShape, config: SkipConfig | str) -> float:
    """The speed-up over the undropped model if time followed the multiply-accumulates.

    The same for a forward and for a training step. ViT-S/16 at 224 with "6(55%)+11": 1.270.

    Args and Raises: as `macs`.
    """
    return macs(model_or_shape) / macs(model_or_shape, config)


def _work(shape: ViTShape, config: SkipConfig) -> Iterator[tuple[int, int, int]]:
    """Per block, the tokens of its keys and values, of its queries, and of its MLP."""
    counts = config.token_counts(
        shape.depth, shape.num_patches, shape.num_prefix_tokens, shape.num_head_tokens
    )
    for layer, (attention, mlp) in enumerate(counts, start=1):
        last = config.cls_only_last_block and layer == shape.depth
        yield attention, mlp if last else attention, mlp
