"""timm's Eva: EVA02, DINOv3, PE, rope-vit, Sapiens2; blocks with RoPE, DeepSeek-VL's too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor

from skipvit_kernels.skipping.families.base import (
    Attended,
    Context,
    Family,
    as_called,
    attention,
    check_parts,
    leading,
    logit_bias,
    reads_beside_cls,
    unsplittable,
    valid_tokens,
)

_BLOCK_PARTS = {"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"}
_ATTENTION_PARTS = {"qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attn_drop", "norm"}
_ATTENTION_PARTS |= {"gate", "proj", "proj_drop"}


class Eva(Family):
    """The model, and its usual block."""

    rows = ("rope",)
    pairs = ("attn_mask",)

    @staticmethod
    def placed_by(model: Any) -> str | None:
        return None if model.rope is None else "RoPE"

    @staticmethod
    def reads_more(model: Any) -> str | None:
        return reads_beside_cls(model)

    @staticmethod
    def check_block(block: Any, what: str) -> None:
        check_parts(what, block, _BLOCK_PARTS)
        known = EvaAttention, AttentionRope
        check_parts(f"attention of {what}", block.attn, _ATTENTION_PARTS, *known)

    @classmethod
    def attend(cls, block: Any, x: Tensor, context: Context) -> Attended:
        out = cls.branch(block, x, context)
        valid = valid_tokens(context.arguments.get("attn_mask"))
        return out._replace(x=x + out.x, valid=valid)

    @classmethod
    def attend_rows(cls, block: Any, x: Tensor, context: Context, num_rows: int) -> Tensor:
        return x[:, :num_rows] + cls.branch(block, x, context, num_rows).x

    @staticmethod
    def needs_whole(block: Any) -> str | None:
        return None if block.attn.qkv is None else unsplittable(block.attn.qkv)

    @staticmethod
    def branch(block: Any, x: Tensor, context: Context, num_rows: int | None = None) -> Attended:
        """What the attention adds to x, or to its first rows, in the place of their sum."""
        out = _attention(block.attn, block.norm1(x), context, num_rows)
        return out._replace(x=block.drop_path1(_scaled(block, "gamma_1", out.x)))

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        return x + block.drop_path2(_scaled(block, "gamma_2", block.mlp(block.norm2(x))))


class PostNorm(Eva):
    """EvaBlockPostNorm: norms behind the attention and the MLP."""

    @staticmethod
    def branch(block: Any, x: Tensor, context: Context, num_rows: int | None = None) -> Attended:
        out = _attention(block.attn, x, context, num_rows)
        return out._replace(x=block.drop_path1(block.norm1(out.x)))

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        return x + block.drop_path2(block.norm2(block.mlp(x)))


class Unmasked(Eva):
    """DeepseekVitBlock: as EvaBlock, but it takes no mask, by which merged sizes would come."""

    @classmethod
    def call(cls, block: Any, x: Tensor, context: Context) -> Tensor:
        if context.sizes is None:
            return block(x, **context.arguments)
        return as_called(block, lambda x: cls.feed(block, cls.attend(block, x, context).x), x)


def _scaled(block: Any, name: str, branch: Tensor) -> Tensor:
    gamma = getattr(block, name, None)
    return branch if gamma is None else gamma * branch


def _attention(attn: Any, x: Tensor, context: Context, num_rows: int | None) -> Attended:
    """timm's EvaAttention.forward and AttentionRope.forward on their own parts.

    The output stands for x; with `num_rows` it is that of as many leading tokens alone.
    """
    rows, rope = x[:, :num_rows], context.arguments.get("rope")
    gate = getattr(attn, "gate", None)
    gate = None if gate is None else gate(rows).sigmoid()
    q, k, v = projected(attn, x, num_rows)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = (_rotated(attn, heads, rope).type_as(v) for heads in (q, k))
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = (heads.repeat_interleave(groups, dim=1) for heads in (k, v))
    out = attn.norm(attention(attn, q, k, v, logit_bias(context, x)))
    if gate is not None:
        out = out * gate
    return Attended(attn.proj_drop(attn.proj(out)), q, k, attn.scale)


def projected(attn: Any, x: Tensor, num_rows: int | None) -> list[Tensor]:
    """Queries (B, H, N, D), of all tokens or the first; keys and values (B, groups, N, D)."""
    width = attn.proj.in_features // attn.num_heads
    if attn.qkv is None:
        inputs = (attn.q_proj(x[:, :num_rows]), attn.k_proj(x), attn.v_proj(x))
        return [rows.unflatten(2, (-1, width)).transpose(1, 2) for rows in inputs]
    bias, weight = attn.qkv.bias, attn.qkv.weight
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if num_rows is not None:
        return leading(weight, bias, x, num_rows, width)
    if bias is attn.qkv.bias:
        qkv = attn.qkv(x)
    else:  # as one sum or as two: timm leaves the choice to the model, for the rounding
        separate = attn.qkv_bias_separate
        qkv = attn.qkv(x) + bias if separate else F.linear(x, weight, bias)
    return list(qkv.unflatten(2, (3, -1, width)).permute(2, 0, 3, 1, 4).unbind(0))


def _rotated(attn: Any, heads: Tensor, rope: Tensor) -> Tensor:
    """Prefix tokens stay as they are; of the patches there are as many as in `heads`."""
    prefix, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
    patches = heads[:, :, prefix:]
    turned = apply_rot_embed_cat(patches, rope[..., : patches.shape[2], :], half=half)
    return torch.cat([heads[:, :, :prefix], turned], dim=2)
