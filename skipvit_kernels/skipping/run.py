"""SkipBlock: a run of transformer blocks in which the patches that do not matter are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from skipvit_kernels.ops import cls_scores, gather_topk, gather_topk_fuse, scatter_back
from skipvit_kernels.skipping.config import Ratio, as_ratio, num_kept

# The parts of a block that can drop: a block or an attention with any other part is refused,
# because what we do not call would silently be left out.
_BLOCK = "timm.models.vision_transformer.Block"
_BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_ATTENTION = "timm.layers.attention.Attention"
_ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


class SkipBlock(nn.Module):
    """Run transformer blocks on the patches that CLS looks at, and pass the others by.

    The first block attends to all tokens; between its attention and its MLP the patches with the
    lowest CLS attention leave; the other blocks see the kept ones, and the end of the run puts the
    skipped ones back at their own positions (SkipViT, arXiv 2401.15293). A pure function of the
    tokens: (B, N, C) in, (B, N, C) out, or (B, P + K, C) without a rejoin (one more token with
    method "fuse"). A SkipBlock among `blocks` drops again, for two-stage skipping.

    Args:
        blocks: timm ViT `Block`s, whose own parts are called; the ones after the first may be
            SkipBlocks.
        drop_ratio: share of the patches to skip, in [0, 1]; ceil(kept share) of them stay.
        num_prefix_tokens: P, the leading tokens that are never dropped; the first is CLS.
        method: "skip", or "fuse" for EViT's token that sums up the dropped ones.
        rejoin: put the skipped patches back at the end. Not with method "fuse".
        rejoin_update: "none": they return as they left; "mean": moved by the mean movement of their
            image's kept patches.

    Raises:
        ValueError: on a block that is not known, or settings that contradict each other.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        drop_ratio: Ratio,
        *,
        num_prefix_tokens: int = 1,
        method: str = "skip",
        rejoin: bool = True,
        rejoin_update: str = "none",
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        check_blocks(self.blocks)
        if num_prefix_tokens < 1:
            raise ValueError(f"num_prefix_tokens must count CLS at least, got {num_prefix_tokens}")
        if method not in ("skip", "fuse"):
            raise ValueError(f'method must be "skip" or "fuse", got {method!r}')
        if rejoin_update not in ("none", "mean"):
            raise ValueError(f'rejoin_update must be "none" or "mean", got {rejoin_update!r}')
        if method == "fuse" and rejoin:
            raise ValueError('rejoin must be False with method "fuse", got True')
        if rejoin_update == "mean" and not rejoin:
            raise ValueError('rejoin must be True with rejoin_update "mean", got False')
        self.settings: dict[str, Any] = dict(
            drop_ratio=as_ratio(drop_ratio),
            num_prefix_tokens=num_prefix_tokens,
            method=method,
            rejoin=rejoin,
            rejoin_update=rejoin_update,
        )

    def forward(self, x: Tensor) -> Tensor:
        return skip_run(x, self.blocks, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())


def skip_run(
    x: Tensor,
    blocks: Iterable[Any],
    *,
    drop_ratio: Fraction,
    num_prefix_tokens: int = 1,
    method: str = "skip",
    rejoin: bool = True,
    rejoin_update: str = "none",
    record: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """SkipBlock as a function of x and `blocks`; `record` is given the index of what was kept."""
    first, *rest = blocks
    num_patches = x.shape[1] - num_prefix_tokens
    num_keep = num_kept(num_patches, drop_ratio)
    fuse = method == "fuse" and num_keep < num_patches

    branch, q_cls, k = _attention(first.attn, first.norm1(x))
    x = x + first.drop_path1(first.ls1(branch))
    if fuse:
        scores = _TrainedScores.apply(q_cls, k, first.attn.scale, num_prefix_tokens)
        gather = gather_topk_fuse
    else:
        scores = cls_scores(q_cls, k, scale=first.attn.scale, num_prefix_tokens=num_prefix_tokens)
        gather = gather_topk
    kept, index = gather(x, scores, num_keep, num_prefix_tokens=num_prefix_tokens)
    if record is not None:
        record(index)

    tokens = kept + first.drop_path2(first.ls2(first.mlp(first.norm2(kept))))
    for block in rest:
        tokens = block(tokens)
    if not rejoin:
        return tokens
    update = None
    if rejoin_update == "mean" and num_keep > 0:
        update = _patch_mean(tokens, num_prefix_tokens) - _patch_mean(kept, num_prefix_tokens)
        update = update.to(x.dtype)
    return scatter_back(x, tokens, index, update=update)


class ClsBlock(nn.Module):
    """A transformer block of which only the first rows are wanted: (B, N, C) in, (B, rows, C) out.

    Keys and values of all tokens, but queries, projection and MLP of those rows alone. They are the
    block's own up to rounding, as is every gradient (dropout inside the block draws other numbers).

    Args:
        block: a timm ViT `Block`, whose own parts are called.
        num_rows: leading tokens to compute, at least 1: CLS, and what else the head reads.

    Raises:
        ValueError: on a block that is not known.
    """

    def __init__(self, block: nn.Module, num_rows: int = 1) -> None:
        super().__init__()
        check_cls_block(block)
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        self.block, self.num_rows = block, num_rows

    def forward(self, x: Tensor) -> Tensor:
        return cls_run(x, self.block, self.num_rows)

    def extra_repr(self) -> str:
        return f"num_rows={self.num_rows}"


def cls_run(x: Tensor, block: Any, num_rows: int) -> Tensor:
    """ClsBlock as a function of x and `block`."""
    branch, _, _ = _attention(block.attn, block.norm1(x), num_queries=num_rows)
    x = x[:, :num_rows] + block.drop_path1(block.ls1(branch))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class _TrainedScores(torch.autograd.Function):
    """cls_scores with a gradient: EViT trains q and k through the weights of the fused token.

    The forward is the operator in every mode, so that a recomputation selects the same patches.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, scale: float, num_prefix_tokens: int) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.scale, ctx.num_prefix_tokens = scale, num_prefix_tokens
        return cls_scores(q, k, scale=scale, num_prefix_tokens=num_prefix_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k = ctx.saved_tensors
        dtype = torch.promote_types(q.dtype, torch.float32)
        weights = (torch.einsum("bhd,bhnd->bhn", q.to(dtype), k.to(dtype)) * ctx.scale).softmax(-1)
        grad_weights = F.pad(grad.to(dtype) / q.shape[1], (ctx.num_prefix_tokens, 0))[:, None]
        centred = grad_weights - (weights * grad_weights).sum(-1, keepdim=True)
        grad_logits = ctx.scale * weights * centred
        grad_q = torch.einsum("bhn,bhnd->bhd", grad_logits, k.to(dtype))
        grad_k = grad_logits[..., None] * q[:, :, None].to(dtype)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), None, None


def _patch_mean(tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """(B, C) in float32: in bfloat16 the difference of two such means would be rounding."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return tokens[:, num_prefix_tokens:].mean(dim=1, dtype=dtype)


def _attention(
    attn: Any, x: Tensor, num_queries: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """timm's Attention.forward on its own parts; beside its output the CLS query and the keys.

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
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    else:
        out = attn.attn_drop((q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
    out = attn.norm(out.transpose(1, 2).flatten(2))
    if gate is not None:
        out = out * gate
    return attn.proj_drop(attn.proj(out)), q[:, :, 0], k


def check_blocks(blocks: Iterable[Any]) -> None:
    """Raise ValueError, by name, where a run holds a block whose parts are not known."""
    blocks = list(blocks)
    if not blocks:
        raise ValueError("blocks must hold at least one block, got none")
    for position, block in enumerate(blocks):
        if isinstance(block, SkipBlock | ClsBlock) and position > 0:
            continue
        _check_parts(f"block {position} of the run", block, _BLOCK, _BLOCK_PARTS)
        _check_parts(
            f"attention of block {position} of the run", block.attn, _ATTENTION, _ATTENTION_PARTS
        )


def check_cls_block(block: Any) -> None:
    """Raise ValueError, by name, where a block's first rows cannot be computed alone."""
    check_blocks([block])
    qkv = block.attn.qkv
    name = f"{type(qkv).__module__}.{type(qkv).__qualname__}"
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    hooks = sum(len(getattr(qkv, kind)) for kind in kinds)
    if type(qkv) is not nn.Linear or hooks:
        raise ValueError(
            "cls_only_last_block reads the query's part of attn.qkv.weight, without a call: "
            f"attn.qkv must be a torch.nn.Linear without hooks, got {name} with {hooks}"
        )


def _check_parts(what: str, module: nn.Module, known: str, parts: set[str]) -> None:
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name != known:
        raise ValueError(f"{what} must be a {known}, got {name}")
    unknown = {part for part, _ in module.named_children()} - parts
    if unknown:
        raise ValueError(
            f"{what}, a {name}, must have no parts but {sorted(parts)}, got also {sorted(unknown)}"
        )
