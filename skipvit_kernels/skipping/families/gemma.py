"""timm's vision encoder of Gemma 4, and its classifier."""

from __future__ import annotations

from typing import Any

from timm.models.gemma4_vit import Gemma4Attention
from torch import Tensor

from skipvit_kernels.ops import gather_rows
from skipvit_kernels.skipping.families.base import (
    Attended,
    Context,
    Watch,
    check_parts,
    logit_bias,
    multiplied,
    num_weights,
    valid_tokens,
)
from skipvit_kernels.skipping.families.encoders import Encoder


class Gemma4(Encoder):
    """Its blocks too: norms before and behind, RoPE as cosines and sines of each token."""

    rows = ("rope_cos", "rope_sin")
    pairs = ("attn_mask",)
    positional = (*rows, *pairs)

    @staticmethod
    def reads_grid(model: Any) -> str | None:
        return "the pool, by positions,"

    @classmethod
    def surroundings(cls, model: Any) -> tuple[int, int, int]:
        _, height, width = cls.image_shape(model)
        rows, columns = cls.trunk(model).patch_size
        patches = height // rows * (width // columns)
        head = num_weights(model.head) if hasattr(model, "head") else 0
        return patches, num_weights(cls.trunk(model).patch_embed), head

    @classmethod
    def image_shape(cls, model: Any) -> tuple[int, int, int]:
        """It takes any grid that its pool divides; this is the one of its pretrained weights."""
        configured = getattr(model, "pretrained_cfg", None) or {}
        pooled, patch = cls.trunk(model).pooling_kernel_size, cls.trunk(model).patch_size
        smallest = (3, pooled * patch[0], pooled * patch[1])
        return tuple(configured.get("input_size") or smallest)

    @staticmethod
    def check_block(block: Any, what: str) -> None:
        check_parts(what, block, {"norm1", "attn", "norm2", "norm3", "mlp", "norm4", "drop_path"})
        parts = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "v_norm"}
        parts |= {"attn_drop", "proj_drop"}
        check_parts(f"attention of {what}", block.attn, parts, Gemma4Attention)

    @staticmethod
    def passed_by(block: Any) -> list[Any]:
        return []

    @staticmethod
    def weights(block: Any) -> tuple[int, int, int]:
        attn = block.attn
        return attn.num_heads * attn.head_dim, num_weights(attn), num_weights(block.mlp)

    @classmethod
    def attend(cls, block: Any, x: Tensor, context: Context) -> Attended:
        mask = context.arguments.get("attn_mask")
        arguments = context.arguments | {"attn_mask": logit_bias(context, x)}
        seen: list[Any] = []
        with Watch(seen):
            branch = block.attn(block.norm1(x), **arguments)
        q, k, scale = multiplied(seen, 1.0)
        x = x + block.drop_path(block.norm2(branch))
        return Attended(x, q, k, scale, valid=valid_tokens(mask))

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        return x + block.drop_path(block.norm4(block.mlp(block.norm3(x))))

    @classmethod
    def narrow(cls, context: Context, index: Tensor, num_prefix_tokens: int) -> Context:
        """Cosines and sines are (B, N, D), of every token, with no heads between."""
        arguments = dict(context.arguments)
        turns = {name: gather_rows(arguments.pop(name), index) for name in cls.rows}
        inner = super().narrow(context._replace(arguments=arguments), index, num_prefix_tokens)
        return inner._replace(arguments=turns | inner.arguments)
