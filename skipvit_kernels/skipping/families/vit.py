"""timm's VisionTransformer: ViT, DeiT (distilled too), DeiT-III, CLIP and DINOv2 towers, SigLIP,
AIMv2, RADIO; and its kinds of blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import timm.layers
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from skipvit_kernels.skipping.families.base import (
    Attended,
    Context,
    Family,
    Watch,
    attention,
    check_parts,
    leading,
    logit_bias,
    multiplied,
    num_weights,
    reads_beside_cls,
    unsplittable,
    valid_tokens,
)

if TYPE_CHECKING:
    from skipvit_kernels.skipping.config import SkipConfig

# A block or an attention with any other part is refused: what is not called would silently be left
# out.
_BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
_DIFF_PARTS = _ATTENTION_PARTS - {"gate"} | {"sub_norm"}
_DiffAttention = getattr(timm.layers, "DiffAttention", None)  # timm 1.0.25 and later


class ViT(Family):
    """The model, and its usual block."""

    pairs = ("attn_mask",)

    @classmethod
    def supports(cls, model: Any, config: SkipConfig) -> str | None:
        known = VisionTransformer, VisionTransformerDistilled
        if config.cls_only_last_block and type(model) not in known:
            return (
                f"cls_only_last_block needs a timm {' or '.join(kind.__name__ for kind in known)}, "
                f"got {type(model).__name__}: what its head reads is not known"
            )
        return super().supports(model, config)

    @staticmethod
    def num_head_tokens(model: Any) -> int:
        return 1 + hasattr(model, "head_dist")

    @classmethod
    def surroundings(cls, model: Any) -> tuple[int, int, int]:
        patches, embedding, head = super().surroundings(model)
        return patches, embedding, head + num_weights(getattr(model, "head_dist", nn.Identity()))

    @staticmethod
    def reads_more(model: Any) -> str | None:
        return reads_beside_cls(model)

    @classmethod
    def check_block(cls, block: Any, what: str) -> None:
        check_parts(what, block, _BLOCK_PARTS)
        _check_attention(f"attention of {what}", block.attn)

    @classmethod
    def attend(cls, block: Any, x: Tensor, context: Context) -> Attended:
        out = cls.branch(block, x, logit_bias(context, x))
        valid = valid_tokens(context.arguments.get("attn_mask"))
        return out._replace(x=x + out.x, valid=valid)

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    @classmethod
    def needs_whole(cls, block: Any) -> str | None:
        for attn in cls.attentions(block):
            if type(attn) is _DiffAttention:
                return "cls_only_last_block is not known for a DiffAttention"
            if reason := unsplittable(attn.qkv):
                return reason
        return None

    @classmethod
    def attend_rows(cls, block: Any, x: Tensor, context: Context, num_rows: int) -> Tensor:
        return x[:, :num_rows] + cls.branch(block, x, logit_bias(context, x), num_rows).x

    @staticmethod
    def attentions(block: Any) -> list[Any]:
        return [block.attn]

    @staticmethod
    def branch(block: Any, x: Tensor, bias: Tensor | None, num_rows: int | None = None) -> Attended:
        """What the attention adds to x, or to its first rows, in the place of their sum."""
        out = _attention(block.attn, block.norm1(x), bias, num_rows)
        return out._replace(x=block.drop_path1(block.ls1(out.x)))


class PostNorm(ViT):
    """ResPostBlock: norms behind the attention and the MLP."""

    @classmethod
    def check_block(cls, block: Any, what: str) -> None:
        check_parts(what, block, _BLOCK_PARTS - {"ls1", "ls2"})
        _check_attention(f"attention of {what}", block.attn)

    @staticmethod
    def branch(block: Any, x: Tensor, bias: Tensor | None, num_rows: int | None = None) -> Attended:
        out = _attention(block.attn, x, bias, num_rows)
        return out._replace(x=block.drop_path1(block.norm1(out.x)))

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        return x + block.drop_path2(block.norm2(block.mlp(x)))


class Twofold(ViT):
    """ParallelThingsBlock: some attentions side by side, then some MLPs. All their maps score."""

    @classmethod
    def check_block(cls, block: Any, what: str) -> None:
        check_parts(what, block, {"attns", "ffns"})
        for branch in (*block.attns, *block.ffns):
            check_parts(f"branch of {what}", branch, {"norm", "attn", "mlp", "ls", "drop_path"})
        for branch in block.attns:
            attention_of = f"attention of {what}"
            check_parts(attention_of, branch.attn, _ATTENTION_PARTS, timm.layers.Attention)

    @staticmethod
    def passed_by(block: Any) -> list[nn.Module]:
        return [*block.attns, *(branch.attn for branch in block.attns)]

    @staticmethod
    def weights(block: Any) -> tuple[int, int, int]:
        width = sum(branch.attn.proj.in_features for branch in block.attns)
        return width, num_weights(block.attns), num_weights(block.ffns)

    @staticmethod
    def attentions(block: Any) -> list[Any]:
        return [branch.attn for branch in block.attns]

    @staticmethod
    def branch(block: Any, x: Tensor, bias: Tensor | None, num_rows: int | None = None) -> Attended:
        outs = [_attention(part.attn, part.norm(x), bias, num_rows) for part in block.attns]
        sides = zip(block.attns, outs, strict=True)
        added = torch.stack([part.drop_path(part.ls(out.x)) for part, out in sides]).sum(dim=0)
        q, k = (torch.cat([getattr(out, name) for out in outs], dim=1) for name in ("q", "k"))
        return outs[0]._replace(x=added, q=q, k=k)

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        return x + torch.stack([ffn(x) for ffn in block.ffns]).sum(dim=0)


class SideBySide(Family):
    """ParallelScalingBlock and its differential kin: one line, attention and MLP of the same x.

    There is nothing between the two: the patches leave behind the block, whose MLP sees them all.
    """

    pairs = ("attn_mask",)
    side_by_side = True

    @staticmethod
    def check_block(block: Any, what: str) -> None:
        parts = {"in_norm", "in_proj", "q_norm", "k_norm", "attn_drop", "mlp_drop", "mlp_act"}
        parts |= {"sub_norm", "out_proj", "attn_out_proj", "mlp_out_proj", "ls", "drop_path"}
        check_parts(what, block, parts)

    @staticmethod
    def passed_by(block: Any) -> list[nn.Module]:
        return []

    @staticmethod
    def weights(block: Any) -> tuple[int, int, int]:
        mlp, width, _, _ = block.in_split
        dim = block.in_proj.in_features
        return width, 4 * width * dim, 2 * mlp * dim

    @staticmethod
    def attend(block: Any, x: Tensor, context: Context) -> Attended:
        seen: list[Any] = []
        with Watch(seen):
            x = block.forward(x, attn_mask=logit_bias(context, x))
        contrast = _contrast(block)
        q, k, scale = multiplied(seen, block.scale, 1 if contrast is None else 2)
        valid = valid_tokens(context.arguments.get("attn_mask"))
        return Attended(x, q, k, scale, valid=valid, contrast=contrast)

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        return x


def _check_attention(what: str, attn: Any) -> None:
    parts = _DIFF_PARTS if type(attn) is _DiffAttention else _ATTENTION_PARTS
    check_parts(what, attn, parts, timm.layers.Attention, _DiffAttention)


def _contrast(attn: Any) -> Tensor | None:
    """The share of the second map that differential attention takes off the first."""
    return attn._compute_lambda() if hasattr(attn, "_compute_lambda") else None


def _attention(attn: Any, x: Tensor, bias: Tensor | None, num_rows: int | None = None) -> Attended:
    """timm's Attention.forward on its own parts; its output stands for x.

    With `num_rows` it is the output of that many leading tokens alone. Differential attention is
    called whole.
    """
    if type(attn) is _DiffAttention:
        seen: list[Any] = []
        with Watch(seen):
            x = attn(x, attn_mask=bias)
        q, k, scale = multiplied(seen, attn.scale, 2)
        return Attended(x, q, k, scale, contrast=_contrast(attn))
    gate = getattr(attn, "gate", None)
    gate = None if gate is None else gate(x[:, :num_rows]).sigmoid()
    if num_rows is None:
        qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = leading(attn.qkv.weight, attn.qkv.bias, x, num_rows, attn.head_dim)
    q, k = attn.q_norm(q), attn.k_norm(k)
    out = attn.norm(attention(attn, q, k, v, bias))
    if gate is not None:
        out = out * gate
    return Attended(attn.proj_drop(attn.proj(out)), q, k, attn.scale)
