"""The seam between skipping and a library of models: what a family must know, and nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
        places: (B, N) int64, where each token stands in the full sequence, for families that ask;
            None: all are here.
    """

    arguments: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    sizes: Tensor | None = None
    keep: Tensor | None = None
    record: Callable[[Any, Tensor], None] | None = None
    places: Tensor | None = None


class Attended(NamedTuple):
    """A block after its attention.

    Attributes:
        x: (B, N, C) with the attention's residual added.
        q, k: (B, H, N, D) queries and keys as the attention multiplied them: after norms and RoPE,
            keys of grouped queries expanded to every head.
        scale: factor on q . k.
        bias: (1 or B, H, N, N) relative position bias that was added to the logits; None: none.
        valid: (1 or B, N) bool, False where a token is padding; None: none is.
        contrast: of differential attention, what the maps of the second half of the heads are
            multiplied with before they are taken off those of the first; None: there is one map.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    scale: float
    bias: Tensor | None = None
    valid: Tensor | None = None
    contrast: Tensor | None = None


class Look(NamedTuple):
    """One query a head, and what it meets.

    Attributes:
        q: (B, H, D).
        k: (B, H, N, D).
        scale: factor on q . k.
        bias: (1 or B, 1 or H, N) added to the logits; None: nothing.
    """

    q: Tensor
    k: Tensor
    scale: float
    bias: Tensor | None


class Family:
    """One library's class of models, or of blocks; a family has no state.

    Of a model's family the patch, the arithmetic and the benchmarks ask what is in the first half;
    of its blocks' family, which is often the same, a run of blocks asks what is in the second. A
    block's own parts are called: adapters and quantised layers on them go on working.
    """

    # ------------------------------------------------------------------ of a model

    # The model calls the blocks of its nn.Sequential one by one, with arguments.
    looped = False

    @classmethod
    def supports(cls, model: Any, config: SkipConfig) -> str | None:
        """Why this model cannot be patched so: argument, expected, got. None where it can."""
        kind = type(model).__name__
        pool = getattr(model, "global_pool", None)
        if config.scorer in ("cls", "marginal") and not cls.has_cls(model):
            return (
                f'scorer must not be "{config.scorer}" on a model without a CLS token, got a '
                f'{kind} (global_pool={pool!r}): "mean" suits it'
            )
        if config.scorer == "latent" and cls.latent(model) is None:
            return (
                'scorer must not be "latent" on a model whose head does not pool by a latent '
                f'query, got a {kind} (global_pool={pool!r}): "{cls.scorer(model)}" suits it'
            )
        if config.method == "fuse" and (what := cls.placed_by(model)):
            return (
                f'method must not be "fuse" on a model with {what}, got a {kind}: the fused token '
                "has no position"
            )
        if config.drop_at and config.rejoin_at is None and (what := cls.reads_grid(model)):
            return (
                f"rejoin_at must be a layer, got None: {what} of a {kind} reads the patches by "
                "their places, so all must come back"
            )
        return None

    @classmethod
    def blocks(cls, model: Any) -> nn.Sequential | nn.ModuleList:
        """The module that holds the blocks and nothing else."""
        return cls.trunk(model).blocks

    @staticmethod
    def trunk(model: Any) -> Any:
        """The module of the model that calls the blocks: itself, or an encoder inside."""
        return model

    @classmethod
    def num_prefix_tokens(cls, model: Any) -> int:
        """P: CLS, distillation and register tokens, which lead the sequence."""
        return cls.trunk(model).num_prefix_tokens

    @staticmethod
    def num_head_tokens(model: Any) -> int:
        """Leading tokens that a head which reads CLS reads; 2 in a distilled DeiT."""
        return 1

    @staticmethod
    def has_cls(model: Any) -> bool:
        """Whether the first token is CLS."""
        return model.cls_token is not None

    @classmethod
    def scorer(cls, model: Any) -> str:
        """The natural scorer: who says which patches stay where the configuration does not."""
        return "cls" if cls.has_cls(model) else "mean"

    @staticmethod
    def latent(model: Any) -> tuple[nn.Module, Any] | None:
        """The final norm and the pool with a latent query behind it; None where there is none."""
        pool = getattr(model, "attn_pool", None)
        return None if getattr(pool, "latent", None) is None else (model.norm, pool)

    @staticmethod
    def placed_by(model: Any) -> str | None:
        """What gives the blocks the places of their tokens; None where the tokens alone do."""
        return None

    @staticmethod
    def reads_grid(model: Any) -> str | None:
        """What behind the blocks reads every patch by its place; None where nothing does."""
        return None

    @classmethod
    def shape(cls, model: Any) -> ViTShape:
        """The sizes that the arithmetic follows from, at the image size it was built for."""
        from skipvit_kernels.skipping import families

        blocks: Any = cls.blocks(model)._modules.values()
        dims, attention, mlp = zip(
            *(families.of_block(block).weights(block) for block in blocks), strict=True
        )
        patches, embedding, head = cls.surroundings(model)
        return ViTShape(
            depth=len(blocks),
            num_patches=patches,
            embed_dim=model.embed_dim,
            num_prefix_tokens=cls.num_prefix_tokens(model),
            attention_dim=dims[0],
            attention_weights=sum(attention) // len(blocks),
            mlp_weights=sum(mlp) // len(blocks),
            other_macs=patches * embedding + head,
            num_head_tokens=cls.num_head_tokens(model),
        )

    @classmethod
    def surroundings(cls, model: Any) -> tuple[int, int, int]:
        """Patches, weights that each of them is embedded with, weights of the head."""
        embed = cls.trunk(model).patch_embed
        head = getattr(model, "head", nn.Identity())
        return embed.num_patches, num_weights(embed), num_weights(head)

    @classmethod
    def image_shape(cls, model: Any) -> tuple[int, int, int]:
        """Channels, height and width of the images that it was built for."""
        embed = cls.trunk(model).patch_embed
        # Of a hybrid the first convolution is its backbone's.
        first = next(part for part in embed.modules() if isinstance(part, nn.Conv2d))
        return (first.in_channels, *embed.img_size)

    @staticmethod
    def reads_more(model: Any) -> str | None:
        """What a head reads beside CLS, which a CLS-only last block would not give it; or None."""
        return f"cls_only_last_block is not known for a {type(model).__name__}"

    # ------------------------------------------------------------------ of a block

    # What blocks are given beside the tokens, by name, and how it follows them: a row for each
    # patch (RoPE), or an entry for each pair of tokens (masks, biases).
    rows: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    # Attention and MLP read the same tokens: patches leave behind the block.
    side_by_side = False
    # The names of what a model gives its blocks by position, behind the tokens.
    positional: tuple[str, ...] = ()

    @staticmethod
    def check_block(block: Any, what: str) -> None:
        """Raise ValueError where a block, called `what`, has parts that are not known."""
        raise NotImplementedError

    @staticmethod
    def passed_by(block: Any) -> list[nn.Module]:
        """Modules inside whose own call a drop does not make, so that hooks would not fire."""
        return [block.attn]

    @staticmethod
    def weights(block: Any) -> tuple[int, int, int]:
        """Width over all heads, weights of the attention, weights of the MLP."""
        attn = block.attn
        return attn.proj.in_features, num_weights(attn), num_weights(block.mlp)

    @staticmethod
    def attend(block: Any, x: Tensor, context: Context) -> Attended:
        """The first residual line of a block, and what scores are made of."""
        raise NotImplementedError

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        """The second residual line of a block."""
        raise NotImplementedError

    @classmethod
    def call(cls, block: Any, x: Tensor, context: Context) -> Tensor:
        """A whole block."""
        arguments = context.arguments
        if context.sizes is not None:
            arguments = arguments | {"attn_mask": logit_bias(context, x)}
        return block(x, **arguments)

    @classmethod
    def narrow(cls, context: Context, index: Tensor, num_prefix_tokens: int) -> Context:
        """The context of the tokens `index` (B, M), whose first P = `num_prefix_tokens` stay."""
        arguments: dict[str, Any] = {}
        for name, value in context.arguments.items():
            if value is None or value is False:
                arguments[name] = value
            elif name in cls.rows:
                arguments[name] = follow_rows(value, index, num_prefix_tokens)
            elif name in cls.pairs:
                arguments[name] = follow_pairs(value, index)
            else:
                known = ", ".join(("the tokens", *cls.rows, *cls.pairs))
                raise ValueError(f"blocks must be given {known} alone, got also {name}")
        sizes = context.sizes
        if sizes is not None:
            sizes = gather_rows(sizes[..., None], index)[..., 0]
        return context._replace(arguments=arguments, sizes=sizes)

    @classmethod
    def look(
        cls,
        scorer: str,
        attended: Attended,
        num_prefix_tokens: int,
        head: tuple[nn.Module, Any] | None = None,
    ) -> Look:
        """The one query whose attention scores the patches, and the keys that it meets.

        Args:
            scorer: "cls", "mean", or "latent" with the final norm and the pool in `head`.
            attended: of the block that drops.
            num_prefix_tokens: P.
        """
        valid, bias = attended.valid, None
        if scorer == "latent":
            q, k, scale = _pooled(head, attended.x)
        else:
            take = _first if scorer == "cls" else functools.partial(_mean, num_prefix_tokens, valid)
            q, k, scale = take(attended.q), attended.k, attended.scale
            bias = None if attended.bias is None else take(attended.bias)
        if valid is not None:
            # Not infinite, over `scale` neither: there it is a key's entry, and by 0 it were NaN.
            bias = k.new_zeros(1) if bias is None else bias
            least = torch.finfo(bias.dtype).min * min(scale, 1.0)
            bias = bias.masked_fill(~valid[:, None], least)
        return Look(q, k, scale, bias)

    @staticmethod
    def needs_whole(block: Any) -> str | None:
        """Why the first rows of a block cannot be computed alone; None where they can."""
        return f"cls_only_last_block is not known for a {type(block).__name__}"

    @staticmethod
    def attend_rows(block: Any, x: Tensor, context: Context, num_rows: int) -> Tensor:
        """`attend(block, x, context).x[:, :num_rows]`, for the work of those rows alone."""
        raise NotImplementedError


# ---------------------------------------------------------------- what looks at the patches


def _first(rows: Tensor) -> Tensor:
    return rows[:, :, 0]


def _mean(num_prefix_tokens: int, valid: Tensor | None, rows: Tensor) -> Tensor:
    """(B, H, D), the mean of the patches that are no padding."""
    # In float32: a sum of some hundred bfloat16 numbers would be rounding.
    dtype = torch.promote_types(rows.dtype, torch.float32)
    rows = rows[:, :, num_prefix_tokens:]
    if valid is None:
        return rows.mean(dim=2, dtype=dtype).to(rows.dtype)
    share = valid[:, None, num_prefix_tokens:, None].to(dtype)
    return ((rows * share).sum(2) / share.sum(2).clamp(min=1)).to(rows.dtype)


def _pooled(head: Any, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """The query and the keys of the head's pool, if it pooled tokens x."""
    if head is None:
        raise ValueError('scorer "latent" needs the head of a patched model, got blocks alone')
    norm, pool = head
    split = (pool.num_heads, pool.head_dim)
    q = pool.q(pool.latent).unflatten(2, split).transpose(1, 2).mean(2, keepdim=True)
    k = pool.kv(norm(x)).chunk(2, dim=2)[0].unflatten(2, split).transpose(1, 2)
    return pool.q_norm(q)[:, :, 0].expand(x.shape[0], -1, -1), pool.k_norm(k), pool.scale


# ---------------------------------------------------------------- what follows the tokens


def follow_rows(table: Tensor, index: Tensor, num_prefix_tokens: int) -> Tensor:
    """RoPE rows of the tokens `index` (B, M): (B, 1 or H, M - P, D).

    `table` is (n, D), (H, n, D) or, of each image its own, (B, 1 or H, n, D); of patches alone.
    """
    table = table[(None,) * (4 - table.dim())]
    heads = table.shape[1]
    rows = table.transpose(1, 2).flatten(2).expand(index.shape[0], -1, -1)
    rows = gather_rows(rows, index[:, num_prefix_tokens:] - num_prefix_tokens)
    return rows.unflatten(2, (heads, -1)).transpose(1, 2)


def follow_pairs(pairs: Tensor, index: Tensor) -> Tensor:
    """What a mask or bias has for pairs of the tokens `index` (B, M): (B, 1 or H, 1 or M, M).

    `pairs` is (N, N) with or without leading (H) or (1 or B, 1 or H); (B, 1, 1, N) is of keys.
    """
    if not pairs.is_floating_point():
        return follow_pairs(pairs.float(), index) > 0
    pairs = pairs[(None,) * (4 - pairs.dim())]
    _, heads, queries, _ = pairs.shape
    keys = pairs.permute(0, 3, 1, 2).flatten(2).expand(index.shape[0], -1, -1)
    keys = gather_rows(keys, index).unflatten(2, (heads, queries))
    if queries == 1:
        return keys.permute(0, 2, 3, 1)
    both = gather_rows(keys.permute(0, 3, 2, 1).flatten(2), index)
    return both.unflatten(2, (heads, -1)).transpose(1, 2)


def size_bias(sizes: Tensor, x: Tensor) -> Tensor:
    """(B, 1, 1, N) in x's dtype: what merged tokens add to the logits of their keys."""
    return sizes.log()[:, None, None].to(x.dtype)


def logit_bias(context: Context, x: Tensor) -> Tensor | None:
    """What is added to the logits of x's keys: a mask, log sizes, both or nothing (None)."""
    mask = context.arguments.get("attn_mask")
    if context.sizes is None:
        return mask
    bias = size_bias(context.sizes, x)
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def valid_tokens(mask: Tensor | None) -> Tensor | None:
    """(1 or B, N) bool of an attention mask: False for padding, which not even attends itself."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    own = mask[:, :, 0] if mask.shape[2] == 1 else mask.diagonal(dim1=2, dim2=3)
    return (own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2).any(1)


# ---------------------------------------------------------------- attention


def attention(attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """(B, M, H * D) of an attention module's queries, keys and values, fused or as it says.

    Of a bias (B or 1, H or 1, N or 1, N) the first M rows count.
    SDPA stays: the CLS row costs N * C multiply-accumulates beside it, where keeping the whole map
    costs the fused attention (11.1 against 5.6 + 0.5 ms for ViT-S, batch 8, on a CPU).
    """
    if bias is not None and bias.shape[-2] > 1:
        bias = bias[..., : q.shape[2], :]
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    else:
        logits = q * attn.scale @ k.transpose(-2, -1)
        if bias is not None and bias.dtype == torch.bool:
            logits = logits.masked_fill(~bias, -torch.inf)
        elif bias is not None:
            logits = logits + bias
        out = attn.attn_drop(logits.softmax(dim=-1)) @ v
    return out.transpose(1, 2).flatten(2)


_PRODUCT = (Tensor.matmul, Tensor.__matmul__)  # what `q @ k` is, by version of torch


class Watch(TorchFunctionMode):
    """Sees queries and keys as they are multiplied, in attentions that are called whole.

    Appended to `seen`, of each map: q and k, (B, H, N, D), and whether the attention is fused; of
    an eager one q is scaled, and the maps of a head are side by side. To be read by `multiplied`.
    """

    def __init__(self, seen: list[tuple[Tensor, Tensor, bool]]) -> None:
        super().__init__()
        self.seen = seen  # not the mode itself: torch.compile knows lists

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            self.seen.append((args[0], args[1], True))
        elif not self.seen and function in _PRODUCT and args[0].dim() == 4:
            self.seen.append((args[0], args[1].transpose(-2, -1), False))
        return function(*args, **(kwargs or {}))


def multiplied(
    seen: list[tuple[Tensor, Tensor, bool]], scale: float, num_maps: int = 1
) -> tuple[Tensor, Tensor, float]:
    """q and k that a `Watch` saw, the heads of one map after those of the other; their factor."""
    q, k = torch.cat([q for q, _, _ in seen], dim=1), torch.cat([k for _, k, _ in seen], dim=1)
    if seen[0][2]:
        return q, k, scale
    q, k = (t.unflatten(1, (-1, num_maps)).transpose(1, 2).flatten(1, 2) for t in (q, k))
    return q, k, 1.0


def leading(
    weight: Tensor, bias: Tensor | None, x: Tensor, num_rows: int, head_dim: int
) -> list[Tensor]:
    """q of the first rows alone, and k and v of all, (B, H, ., D), from a fused projection.

    Raises no hook and calls no module: `unsplittable` says where that is wrong.
    """
    # By a split: two slices of the weight would each have a gradient of the whole to add.
    widths = [len(weight) // 3, len(weight) // 3 * 2]
    q_weight, kv_weight = weight.split(widths)
    q_bias, kv_bias = (None, None) if bias is None else bias.split(widths)
    q = F.linear(x[:, :num_rows], q_weight, q_bias).unflatten(2, (-1, head_dim))
    kv = F.linear(x, kv_weight, kv_bias).unflatten(2, (2, -1, head_dim))
    return [q.transpose(1, 2), *kv.permute(2, 0, 3, 1, 4).unbind(0)]


def reads_beside_cls(model: Any) -> str | None:
    """`Family.reads_more` of a model whose `global_pool` says what its head reads."""
    if model.global_pool == "token" and getattr(model, "attn_pool", None) is None:
        return None
    return (
        'cls_only_last_block needs a head that reads CLS only, global_pool="token", got '
        f"global_pool={model.global_pool!r}: it reads the other tokens of the last block too"
    )


def unsplittable(qkv: Any) -> str | None:
    """Why `leading` cannot stand for a call of this projection; None where it can."""
    if type(qkv) is nn.Linear and not num_hooks(qkv):
        return None
    return (
        "cls_only_last_block reads the query's part of attn.qkv.weight, without a call: "
        "attn.qkv must be a torch.nn.Linear without hooks, got "
        f"{class_name(type(qkv))} with {num_hooks(qkv)}"
    )


# ---------------------------------------------------------------- what is refused


def as_called(block: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """forward(x) as what the block does when it is called: hooks on it fire, as FSDP's must."""
    before = {key: h for key, h in block._forward_pre_hooks.items() if not isinstance(h, Inside)}
    if not (before or block._forward_hooks or block._backward_pre_hooks or block._backward_hooks):
        return forward(x)
    # The block's own forward stays: another thread may be in it.
    view = object.__new__(type(block))
    vars(view).update(vars(block), forward=forward, _forward_pre_hooks=before)
    return view(x)


class Inside:
    """A pre-hook of blocks that may only be called as `as_called` does."""


def num_hooks(module: nn.Module) -> int:
    """Hooks that a call of the module would fire."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for kind in kinds)


def check_hooks(what: str, block: nn.Module, modules: list[nn.Module]) -> None:
    """Raise ValueError where one of the modules, of a block called `what`, has hooks."""
    for module in modules:
        if count := num_hooks(module):
            name = next(name for name, each in block.named_modules() if each is module)
            raise ValueError(
                f"{name and f'{name} of '}{what}, a {type(module).__name__}, must have no hooks, "
                f"got {count}: they would not fire, as its parts are called; register them on those"
            )


def check_parts(what: str, module: nn.Module, parts: set[str], *known: type | None) -> None:
    """Raise ValueError where a module is of none of the classes, or has parts that they have not.

    Without classes its own is known already.
    """
    name = class_name(type(module))
    if known and type(module) not in known:
        names = " or ".join(class_name(kind) for kind in known if kind is not None)
        raise ValueError(f"{what} must be a {names}, got {name}")
    unknown = {part for part, _ in module.named_children()} - parts
    if unknown:
        raise ValueError(
            f"{what}, a {name}, must have no parts but {sorted(parts)}, got also {sorted(unknown)}"
        )


def class_name(kind: type) -> str:
    """With its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def num_weights(module: nn.Module) -> int:
    """Weights of all linear maps and convolutions, each used once per token or image."""
    linear = (nn.Linear, nn.Conv2d)
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, linear))
