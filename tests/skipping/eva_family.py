"""A family as one would be added: this file, and one row of `families.ROWS` (see test_seams.py)."""

import torch.nn.functional as F
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from torch.overrides import TorchFunctionMode

from skipvit_kernels import gather_rows
from skipvit_kernels.skipping.families.base import (
    Attended,
    Family,
    ViTShape,
    check_parts,
    num_weights,
    size_bias,
)


class _Catch(TorchFunctionMode):
    """Appends q and k, as the fused attention is given them, to a list."""

    def __init__(self, caught):
        self.caught = caught

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.caught.extend(args[:2])
        return function(*args, **(kwargs or {}))


class Eva(Family):
    @staticmethod
    def supports(model, config):
        if not all(block.attn.fused_attn for block in model.blocks):
            return "attn.fused_attn must be True in every block, got False"
        if config.method == "fuse":
            return 'method must not be "fuse": a fused token has no position to be rotated by'
        return None

    @staticmethod
    def check_block(block, what):
        parts = {"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"}
        check_parts(what, block, EvaBlock, parts)
        if type(block.attn) not in (EvaAttention, AttentionRope):
            raise ValueError(f"attention of {what} must be timm's, got {type(block.attn)}")

    @staticmethod
    def scorer(model):
        return "mean" if model.cls_token is None else "cls"

    @staticmethod
    def shape(model):
        attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
        patches = model.patch_embed.num_patches
        return ViTShape(
            len(model.blocks),
            patches,
            model.embed_dim,
            model.num_prefix_tokens,
            attention_weights=num_weights(attn),
            mlp_weights=num_weights(mlp),
            other_macs=patches * num_weights(model.patch_embed) + num_weights(model.head),
        )

    @staticmethod
    def image_shape(model):
        return (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)

    @staticmethod
    def attend(block, x, context):
        caught, arguments = [], dict(context.arguments)
        if context.sizes is not None:
            arguments["attn_mask"] = size_bias(context.sizes, x)
        with _Catch(caught):
            branch = block.attn(block.norm1(x), **arguments)
        if block.gamma_1 is not None:
            branch = block.gamma_1 * branch
        return Attended(x + block.drop_path1(branch), *caught, block.attn.scale)

    @staticmethod
    def feed(block, x):
        branch = block.mlp(block.norm2(x))
        if block.gamma_2 is not None:
            branch = block.gamma_2 * branch
        return x + block.drop_path2(branch)

    @staticmethod
    def narrow(context, index, num_prefix_tokens):
        rope = context.arguments.get("rope")
        others = Family.narrow(context._replace(arguments={}), index, num_prefix_tokens)
        if rope is None:
            return others._replace(arguments=context.arguments)
        # (n, D), (H, n, D) or, narrowed before, (B, 1 or H, n, D), of the patches alone.
        rope = rope[(None,) * (4 - rope.dim())].expand(len(index), *[-1] * 3)
        heads = rope.shape[1]
        rows = rope.transpose(1, 2).flatten(2)
        rows = gather_rows(rows, index[:, num_prefix_tokens:] - num_prefix_tokens)
        rope = rows.unflatten(2, (heads, -1)).transpose(1, 2)
        return others._replace(arguments={**context.arguments, "rope": rope})
