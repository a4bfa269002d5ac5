"""The seam between skipping and a library of models: what a family must know, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from skipvit_kernels.ops import gather_rows

if TYPE_CHECKING:
    from skipvit_kernels.skipping.config import SkipConfig


@dataclasses.dataclass(frozen=True)
class ViTShape:
    """The sizes of a vision transformer that its multiply-accumulates (MACs) follow from.

    Attributes:
        depth: transformer blocks.
        num_patches: n, patches of an image.
        embed_dim: C, channels.
        num_prefix_tokens: P, CLS, distillation and register tokens.
        attention_dim: width over all heads; default C.
        attention_weights: weights of a block's attention projections; default 4 C^2.
        mlp_weights: weights of a block's MLP; default 8 C^2.
        other_macs: MACs per image outside the blocks (patch embedding, head); default 0.
        num_head_tokens: tokens that the head reads: CLS, and a distilled DeiT's second; default 1.
    """

    depth: int
    num_patches: int
    embed_dim: int
    num_prefix_tokens: int = 1
    attention_dim: int | None = None
    attention_weights: int | None = None
    mlp_weights: int | None = None
    other_macs: int = 0
    num_head_tokens: int = 1

    @classmethod
    def of(cls, model: nn.Module) -> ViTShape:
        """Read off a model of any family, at the image size that it was built for."""
        from skipvit_kernels.skipping import families

        return families.of(model).shape(model)


class Context(NamedTuple):
    """What every block is given beside the tokens, and what must follow them.

    Attributes:
        arguments: by keyword, as the model passes them to its blocks: RoPE rows, masks.
        sizes: (B, N) float32, the patches that each token stands for; None: one each. A key counts
            that often: the log of its size is added to its logits.
        keep: (B, N) bool, patches that must not be dropped; None: any may be.
        record: called with what every drop leaves, and by which scores.
    """

    arguments: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    sizes: Tensor | None = None
    keep: Tensor | None = None
    record: Callable[[Any, Tensor], None] | None = None


class Attended(NamedTuple):
    """A block after its attention.

    Attributes:
        x: (B, N, C) with the attention's residual added.
        q, k: (B, H, N, D) queries and keys as the attention multiplied them: after norms and RoPE,
            keys of grouped queries expanded to every head.
        scale: factor on q . k.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    scale: float


class Family:
    """One library's class of models; the methods are static, a family has no state.

    A run of blocks calls `attend`, `narrow`, `feed` and `call`; the patch, the arithmetic and the
    benchmarks call the others. A block's own parts are called: hooks, adapters and quantised layers
    on them go on working.
    """

    @staticmethod
    def supports(model: Any, config: SkipConfig) -> str | None:
        """Why this model cannot be patched so: argument, expected, got. None where it can."""
        raise NotImplementedError

    @staticmethod
    def check_block(block: Any, what: str) -> None:
        """Raise ValueError where a block, called `what`, has parts that are not known."""
        raise NotImplementedError

    @staticmethod
    def blocks(model: Any) -> nn.Sequential | nn.ModuleList:
        """The module that holds the blocks and nothing else."""
        return model.blocks

    @staticmethod
    def num_prefix_tokens(model: Any) -> int:
        """P: CLS, distillation and register tokens, which lead the sequence."""
        return model.num_prefix_tokens

    @staticmethod
    def num_head_tokens(model: Any) -> int:
        """Leading tokens that a head which reads CLS reads; 2 in a distilled DeiT."""
        return 1

    @staticmethod
    def scorer(model: Any) -> str:
        """The natural scorer: who says which patches stay where the configuration does not."""
        return "cls"

    @staticmethod
    def query(scorer: str, q: Tensor, num_prefix_tokens: int) -> Tensor:
        """(B, H, D): the one query whose attention scores the patches."""
        if scorer == "cls":
            return q[:, :, 0]
        # In float32: a sum of some hundred bfloat16 numbers would be rounding.
        patches = q[:, :, num_prefix_tokens:]
        dtype = torch.promote_types(q.dtype, torch.float32)
        return patches.mean(dim=2, dtype=dtype).to(q.dtype)

    @staticmethod
    def shape(model: Any) -> ViTShape:
        """The sizes that the arithmetic follows from, at the image size it was built for."""
        raise NotImplementedError

    @staticmethod
    def image_shape(model: Any) -> tuple[int, int, int]:
        """Channels, height and width of the images that it was built for."""
        raise NotImplementedError

    @staticmethod
    def attend(block: Any, x: Tensor, context: Context) -> Attended:
        """The first residual line of a block, and what scores are made of."""
        raise NotImplementedError

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        """The second residual line of a block."""
        raise NotImplementedError

    @staticmethod
    def call(block: Any, x: Tensor, context: Context) -> Tensor:
        """A whole block."""
        arguments = context.arguments
        if context.sizes is not None:
            arguments = arguments | {"attn_mask": size_bias(context.sizes, x)}
        return block(x, **arguments)

    @staticmethod
    def narrow(context: Context, index: Tensor, num_prefix_tokens: int) -> Context:
        """The context of the tokens `index` (B, M), whose first P = `num_prefix_tokens` stay."""
        if context.arguments:
            given = ", ".join(context.arguments)
            raise ValueError(f"blocks must be given the tokens alone, got also {given}")
        sizes = context.sizes
        if sizes is not None:
            sizes = gather_rows(sizes[..., None], index)[..., 0]
        return context._replace(sizes=sizes)

    @staticmethod
    def reads_more(model: Any) -> str | None:
        """What a head reads beside CLS, which a CLS-only last block would not give it; or None."""
        return f"cls_only_last_block is not known for a {type(model).__name__}"

    @staticmethod
    def needs_whole(block: Any) -> str | None:
        """Why the first rows of a block cannot be computed alone; None where they can."""
        return f"cls_only_last_block is not known for a {type(block).__name__}"

    @staticmethod
    def attend_rows(block: Any, x: Tensor, context: Context, num_rows: int) -> Tensor:
        """`attend(block, x, context).x[:, :num_rows]`, for the work of those rows alone."""
        raise NotImplementedError


def size_bias(sizes: Tensor, x: Tensor) -> Tensor:
    """(B, 1, 1, N) in x's dtype: what merged tokens add to the logits of their keys."""
    return sizes.log()[:, None, None].to(x.dtype)


def check_parts(what: str, module: nn.Module, known: type, parts: set[str]) -> None:
    """Raise ValueError where a module is not of a known class, or has parts that it has not."""
    kind = type(module)
    if kind is not known:
        raise ValueError(
            f"{what} must be a {known.__module__}.{known.__qualname__}, "
            f"got {kind.__module__}.{kind.__qualname__}"
        )
    unknown = {part for part, _ in module.named_children()} - parts
    if unknown:
        raise ValueError(
            f"{what}, a {kind.__module__}.{kind.__qualname__}, must have no parts but "
            f"{sorted(parts)}, got also {sorted(unknown)}"
        )


def num_weights(module: nn.Module) -> int:
    """Weights of all linear maps and convolutions, each used once per token or image."""
    linear = (nn.Linear, nn.Conv2d)
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, linear))
