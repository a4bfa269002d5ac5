"""timm's models with a relative position bias: Beit and VisionTransformerRelPos.

A bias belongs to a pair of places in the image. What the blocks share is gathered once a drop, on
both axes; what a block owns, where it attends to the tokens that stayed.
"""

from __future__ import annotations

from typing import Any

from timm.models import beit
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor

from skipvit_kernels.skipping.families.base import (
    Attended,
    Context,
    Family,
    as_called,
    attention,
    check_hooks,
    check_parts,
    follow_pairs,
    reads_beside_cls,
    size_bias,
    unsplittable,
)
from skipvit_kernels.skipping.families.eva import projected

_ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "rel_pos", "attn_drop", "proj", "proj_drop"}
_BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}


class Relative(Family):
    """What the two have in common; `shared` is what their blocks call the bias of all."""

    shared: str

    @staticmethod
    def placed_by(model: Any) -> str | None:
        return "a relative position bias"

    @staticmethod
    def reads_more(model: Any) -> str | None:
        return reads_beside_cls(model)

    @classmethod
    def check_block(cls, block: Any, what: str) -> None:
        # Not in the layers that drop alone: `call` runs the parts wherever patches are away.
        check_hooks(what, block, [block.attn])

    @staticmethod
    def needs_whole(block: Any) -> str | None:
        return unsplittable(block.attn.qkv)

    @classmethod
    def call(cls, block: Any, x: Tensor, context: Context) -> Tensor:
        if context.places is None and context.sizes is None:
            return block(x, **context.arguments)
        return as_called(block, lambda x: cls.feed(block, cls.attend(block, x, context).x), x)

    @classmethod
    def narrow(cls, context: Context, index: Tensor, num_prefix_tokens: int) -> Context:
        places = index if context.places is None else context.places.gather(1, index)
        inner = super().narrow(context, index, num_prefix_tokens)
        return inner._replace(places=places)

    @classmethod
    def attend(cls, block: Any, x: Tensor, context: Context) -> Attended:
        out = cls.attention(block.attn, cls.enter(block, x), context)
        return out._replace(x=x + cls.leave(block, out.x))

    @classmethod
    def attend_rows(cls, block: Any, x: Tensor, context: Context, num_rows: int) -> Tensor:
        out = cls.attention(block.attn, cls.enter(block, x), context, num_rows)
        return x[:, :num_rows] + cls.leave(block, out.x)

    @classmethod
    def attention(
        cls, attn: Any, x: Tensor, context: Context, num_rows: int | None = None
    ) -> Attended:
        """The attention's forward on its own parts; its output stands for x."""
        q, k, v = projected(attn, x, num_rows)
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        shared = context.arguments.get(cls.shared)
        bias = cls.own_bias(attn)
        if bias is not None and context.places is not None:
            bias = follow_pairs(bias, context.places)
        if bias is None or shared is None:
            bias = shared if bias is None else bias
        else:
            bias = bias + shared
        added = bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
        if context.sizes is not None:
            sizes = size_bias(context.sizes, x)
            added = sizes if added is None else added + sizes
        out = attn.proj_drop(attn.proj(attention(attn, q, k, v, added)))
        return Attended(out, q, k, attn.scale, bias=bias)

    @staticmethod
    def own_bias(attn: Any) -> Tensor | None:
        """(1, H, N, N), the bias of this very attention in the whole image; None: it has none."""
        raise NotImplementedError

    @staticmethod
    def enter(block: Any, x: Tensor) -> Tensor:
        """The attention's input."""
        return block.norm1(x)

    @staticmethod
    def leave(block: Any, x: Tensor) -> Tensor:
        """What of the attention's output is added."""
        raise NotImplementedError


class Beit(Relative):
    shared = "shared_rel_pos_bias"
    pairs = (shared,)

    @classmethod
    def check_block(cls, block: Any, what: str) -> None:
        super().check_block(block, what)
        check_parts(what, block, _BLOCK_PARTS - {"ls1", "ls2"})
        check_parts(f"attention of {what}", block.attn, _ATTENTION_PARTS, beit.Attention)

    @staticmethod
    def own_bias(attn: Any) -> Tensor | None:
        return None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()

    @staticmethod
    def leave(block: Any, x: Tensor) -> Tensor:
        return block.drop_path1(x if block.gamma_1 is None else block.gamma_1 * x)

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        branch = block.mlp(block.norm2(x))
        return x + block.drop_path2(branch if block.gamma_2 is None else block.gamma_2 * branch)


class RelPos(Relative):
    """VisionTransformerRelPos, and its usual block."""

    shared = "shared_rel_pos"
    pairs = (shared,)

    @classmethod
    def check_block(cls, block: Any, what: str) -> None:
        super().check_block(block, what)
        check_parts(what, block, _BLOCK_PARTS)
        check_parts(f"attention of {what}", block.attn, _ATTENTION_PARTS, RelPosAttention)

    @staticmethod
    def own_bias(attn: Any) -> Tensor | None:
        return None if attn.rel_pos is None else attn.rel_pos.get_bias()

    @staticmethod
    def leave(block: Any, x: Tensor) -> Tensor:
        return block.drop_path1(block.ls1(x))

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class RelPosPostNorm(RelPos):
    """ResPostRelPosBlock: norms behind the attention and the MLP."""

    @staticmethod
    def enter(block: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def leave(block: Any, x: Tensor) -> Tensor:
        return block.drop_path1(block.norm1(x))

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        return x + block.drop_path2(block.norm2(block.mlp(x)))
