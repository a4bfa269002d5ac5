"""timm's VisionTransformer: ViT, DeiT (distilled too), DeiT-III, CLIP and DINOv2 towers, SigLIP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from skipvit_kernels.skipping.families.base import (
    Attended,
    Context,
    Family,
    ViTShape,
    check_parts,
    num_weights,
    size_bias,
)

if TYPE_CHECKING:
    from skipvit_kernels.skipping.config import SkipConfig

# A block or an attention with any other part is refused: what is not called would silently be left
# out.
_BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


class ViT(Family):
    @staticmethod
    def supports(model: Any, config: SkipConfig) -> str | None:
        if config.scorer == "cls" and model.cls_token is None:
            return (
                'scorer must not be "cls" on a model without a CLS token, got a '
                f'{type(model).__name__} (global_pool={model.global_pool!r}): "mean" suits it'
            )
        known = VisionTransformer, VisionTransformerDistilled
        if config.cls_only_last_block and type(model) not in known:
            return (
                f"cls_only_last_block needs a timm {' or '.join(kind.__name__ for kind in known)}, "
                f"got {type(model).__name__}: what its head reads is not known"
            )
        return None

    @staticmethod
    def check_block(block: Any, what: str) -> None:
        check_parts(what, block, Block, _BLOCK_PARTS)
        check_parts(f"attention of {what}", block.attn, Attention, _ATTENTION_PARTS)

    @staticmethod
    def num_head_tokens(model: Any) -> int:
        return 1 + hasattr(model, "head_dist")

    @staticmethod
    def scorer(model: Any) -> str:
        return "mean" if model.cls_token is None else "cls"

    @staticmethod
    def shape(model: Any) -> ViTShape:
        block = model.blocks[0]
        patches = model.patch_embed.num_patches
        heads = [model.head, *([model.head_dist] if hasattr(model, "head_dist") else [])]
        return ViTShape(
            depth=len(model.blocks),
            num_patches=patches,
            embed_dim=model.embed_dim,
            num_prefix_tokens=model.num_prefix_tokens,
            attention_dim=block.attn.num_heads * block.attn.head_dim,
            attention_weights=num_weights(block.attn),
            mlp_weights=num_weights(block.mlp),
            other_macs=patches * num_weights(model.patch_embed) + sum(map(num_weights, heads)),
            num_head_tokens=len(heads),
        )

    @staticmethod
    def image_shape(model: Any) -> tuple[int, int, int]:
        return (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)

    @staticmethod
    def attend(block: Any, x: Tensor, context: Context) -> Attended:
        branch, q, k = _attention(block.attn, block.norm1(x), context.sizes)
        return Attended(x + block.drop_path1(block.ls1(branch)), q, k, block.attn.scale)

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    @staticmethod
    def attend_rows(block: Any, x: Tensor, context: Context, num_rows: int) -> Tensor:
        branch, _, _ = _attention(block.attn, block.norm1(x), context.sizes, num_rows)
        return x[:, :num_rows] + block.drop_path1(block.ls1(branch))

    @staticmethod
    def reads_more(model: Any) -> str | None:
        if model.global_pool == "token" and model.attn_pool is None:
            return None
        return (
            'cls_only_last_block needs a head that reads CLS only, global_pool="token", got '
            f"global_pool={model.global_pool!r}: it reads the other tokens of the last block too"
        )

    @staticmethod
    def needs_whole(block: Any) -> str | None:
        qkv = block.attn.qkv
        kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        hooks = sum(len(getattr(qkv, kind)) for kind in kinds)
        if type(qkv) is nn.Linear and not hooks:
            return None
        return (
            "cls_only_last_block reads the query's part of attn.qkv.weight, without a call: "
            "attn.qkv must be a torch.nn.Linear without hooks, got "
            f"{type(qkv).__module__}.{type(qkv).__qualname__} with {hooks}"
        )


def _attention(
    attn: Any, x: Tensor, sizes: Tensor | None, num_queries: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """timm's Attention.forward on its own parts; beside its output the queries and the keys.

    With `num_queries` it is the output of that many leading tokens alone.

    SDPA stays: the CLS row costs N * C multiply-accumulates beside it, where keeping the whole map
    costs the fused attention (11.1 against 5.6 + 0.5 ms for ViT-S, batch 8, on a CPU).
    """
    batch, num_tokens, _ = x.shape
    rows = x[:, :num_queries]
    gate = attn.gate(rows).sigmoid() if getattr(attn, "gate", None) is not None else None
    heads = (attn.num_heads, attn.head_dim)
    if num_queries is None:
        qkv = attn.qkv(x).reshape(batch, num_tokens, 3, *heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    else:
        # By a split: two slices of the weight would each have a gradient of the whole to add.
        widths = [len(attn.qkv.weight) // 3, len(attn.qkv.weight) // 3 * 2]
        q_weight, kv_weight = attn.qkv.weight.split(widths)
        bias = attn.qkv.bias
        q_bias, kv_bias = (None, None) if bias is None else bias.split(widths)
        q = F.linear(rows, q_weight, q_bias).reshape(batch, num_queries, *heads).transpose(1, 2)
        kv = F.linear(x, kv_weight, kv_bias).reshape(batch, num_tokens, 2, *heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    bias = None if sizes is None else size_bias(sizes, q)
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    else:
        logits = q * attn.scale @ k.transpose(-2, -1)
        logits = logits if bias is None else logits + bias
        out = attn.attn_drop(logits.softmax(dim=-1)) @ v
    out = attn.norm(out.transpose(1, 2).flatten(2))
    if gate is not None:
        out = out * gate
    return attn.proj_drop(attn.proj(out)), q, k
