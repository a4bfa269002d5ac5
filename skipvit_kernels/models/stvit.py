"""STViT: after some layers a few semantic tokens take the place of all patches.

Chang et al., Making Vision Transformers Efficient from A Token Sparsification View, CVPR 2023
(arXiv 2303.08685). The parts that both trunks share, and the trunk of DeiT; `stvit_swin` has the
trunk of Swin. Where the paper and the code released for Swin (changsn/STViT-R) differ, an option
chooses; the default here is the paper's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Multi-head attention whose queries and keys are different tokens; timm's `Attention` else.

    Parameters: `q` (C, C), `kv` (2 C, C; the keys' rows first), `proj` (C, C).

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        qkv_bias, proj_bias: whether `q` and `kv`, and `proj`, have a bias.
        attn_drop, proj_drop: rates of dropout on the attention and behind `proj`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")
        if unused.get("qk_norm") or unused.get("scale_norm"):
            raise ValueError("qk_norm and scale_attn_norm must be False with semantic tokens")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, tokens: Tensor, keys: Tensor) -> Tensor:
        """What tokens (B, M, C) read from keys (B, N, C), both normalised: (B, M, C)."""
        return self.attend(self.q(tokens), self.kv(keys))

    def attend(self, q: Tensor, kv: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same from projected q (B, M, C) and kv (B, N, 2 C).

        mask: what SDPA takes as `attn_mask`, broadcast to (B, H, M, N).
        """
        q, k, v = self._heads(q, kv)
        dropout = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def weights(self, tokens: Tensor, keys: Tensor) -> Tensor:
        """How much tokens (B, M, C) take of each key (B, N, C): (B, M, N), mean of the heads."""
        q, k, _ = self._heads(self.q(tokens), self.kv(keys))
        return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1).mean(1)

    def _heads(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = q.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class CrossBlock(Block):
    """timm's block with `CrossAttention`: tokens (B, M, C) read from keys (B, N, C).

        tokens = tokens + drop_path1(ls1(attn(norm1(tokens), norm1(keys))))
        tokens = tokens + drop_path2(ls2(mlp(norm2(tokens))))

    One `norm1` serves tokens and keys, as in the released code.

    Args:
        shortcut: whether the first line has `tokens +`. The released code has it in no first
            generating layer (its `--shortcut` is off in the published runs) and has no drop path
            there then; the paper has it.
        options: as timm's `Block`.
    """

    attn: CrossAttention
    norm1: Any

    def __init__(self, *args: Any, shortcut: bool = True, **options: Any) -> None:
        super().__init__(*args, **{**options, "attn_layer": CrossAttention})
        self.shortcut = shortcut

    def forward(self, tokens: Tensor, keys: Tensor) -> Tensor:  # type: ignore[override]
        return self.feed(tokens, self.attn(self.norm1(tokens), self.norm1(keys)))

    def feed(self, tokens: Tensor, read: Tensor) -> Tensor:
        """Both lines above, with what the attention read."""
        read = self.ls1(read)
        tokens = tokens + self.drop_path1(read) if self.shortcut else read
        return tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))


def windows(x: Tensor, size: tuple[int, int], value: float = 0.0) -> Tensor:
    """(B, H, W, C) -> (B, rows, h, columns, w, C): windows of `size` (h, w).

    Where they do not tile the grid it is padded with `value`, below and on the right.
    """
    height, width = x.shape[1:3]
    below, right = -height % size[0], -width % size[1]
    if below or right:
        x = F.pad(x, (0, 0, 0, right, 0, below), value=value)
    return x.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))


class MaxPool(nn.Module):
    """The first semantic tokens of the released code: an adaptive max pooling of each window.

    Cell i of a window of w rows covers the rows floor(i w / side) to ceil((i + 1) w / side) - 1:
    7 rows into 3 overlap (0-2, 2-4, 4-6). Windows that reach over the grid's edge are pooled where
    there are patches; cells without any are left out. No parameters.

    Args:
        side: cells along a window's side.
        window: rows and columns of a window.

    Raises:
        ValueError: where a window has fewer rows or columns than `side`.
    """

    def __init__(self, side: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.side = side
        self.set_window(window)

    def set_window(self, window: tuple[int, int]) -> None:
        """Pool windows of another size from now on; raises as the constructor."""
        if not 1 <= self.side <= min(window):
            raise ValueError(f"side must be in [1, {min(window)}], got {self.side}")
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, semantic rows, semantic columns, C)."""
        batch, height, width, _ = x.shape
        x = windows(x, self.window, -torch.inf)
        rows, columns = x.shape[1], x.shape[3]
        x = F.adaptive_max_pool2d(x.permute(0, 1, 3, 5, 2, 4).flatten(0, 2), self.side)
        x = x.unflatten(0, (batch, rows, columns)).permute(0, 1, 4, 2, 5, 3)
        x = x.flatten(3, 4).flatten(1, 2)
        return x[:, : self.cells(height, 0), : self.cells(width, 1)]

    def cells(self, length: int, dim: int) -> int:
        """How many semantic rows (dim 0) or columns (1) a grid of `length` of them gives."""
        whole, rest = divmod(length, self.window[dim])
        return whole * self.side + -(-rest * self.side // self.window[dim])


class SpatialPool(MaxPool):
    """The first semantic tokens of the paper: the weighted mean of each region of a window.

    Intra-window, as the author gives it: the window (h, w) is padded evenly (the odd row and column
    behind) to side x side regions of ceil(h / side) x ceil(w / side) patches; in each region, which
    the convolution does not look out of, a depth-wise 3x3 convolution (zeros around), norm, GELU
    and a linear map to one channel give a score per patch; softmax over the region's patches, the
    padding left out; the token is the weighted sum of the patches.

    Inter-window: the source says only that an offset moves the centre. Here every token of the
    first step gives an offset (down, right) = tanh(offset(token)) * (region height, width); all
    patch positions of its region move by it, are cut to the grid [0, H - 1] x [0, W - 1] and read
    bilinearly; the second sum has the weights of the first. The offset starts at 0: no movement,
    and the gradient of a position on a patch is that between its two neighbours.

    Windows that reach over the grid's edge have that part left out too; regions without any patch
    are left out.

    Parameters: `conv` (C, 1, 3, 3 and bias), `norm`, `score` (1, C, no bias), `offset` (2, C and
    bias).

    Args:
        dim: channels C.
        side: regions along a window's side.
        window: rows and columns of a window.
        inter_window: whether the second step is done.
        norm_layer: the norm.

    Raises:
        ValueError: where a region would hold no patch of its window.
    """

    def __init__(
        self,
        dim: int,
        side: int,
        window: tuple[int, int],
        inter_window: bool = True,
        norm_layer: Any = LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(side, window)
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm = norm_layer(dim, **dd)
        self.score = nn.Linear(dim, 1, bias=False, **dd)
        self.offset = nn.Linear(dim, 2, **dd) if inter_window else None

    def init_weights(self) -> None:
        """The offset starts at 0. timm's initialisation calls this after that of the parts."""
        if self.offset is not None:
            nn.init.zeros_(self.offset.weight)
            nn.init.zeros_(self.offset.bias)

    def set_window(self, window: tuple[int, int]) -> None:
        """Pool windows of another size from now on; raises as the constructor."""
        super().set_window(window)
        for size in window:
            region, _, behind = self._padding(size)
            if behind >= region:
                raise ValueError(
                    f"side must cut windows of {window} into regions that all hold patches, "
                    f"got {self.side}"
                )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, semantic rows, semantic columns, C)."""
        height, width = x.shape[1:3]
        rows, inside_rows = self._positions(height, 0, x.device)
        columns, inside_columns = self._positions(width, 1, x.device)
        padding = (*self._padding(self.window[1])[1:], 0, 0, *self._padding(self.window[0])[1:])
        patches = F.pad(windows(x, self.window), (0, 0, *padding))
        patches = patches.unflatten(4, (self.side, -1)).unflatten(2, (self.side, -1))
        patches = patches.flatten(4, 5).flatten(1, 2)[:, : len(rows), :, : len(columns)]
        patches = patches.transpose(2, 3).contiguous()  # (B, R, Q, h, w, C): R x Q regions of h x w

        scores = self.conv(patches.flatten(0, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        scores = self.score(F.gelu(self.norm(scores))).view(patches.shape[:-1])
        outside = ~(inside_rows[:, None, :, None] & inside_columns[:, None])
        weights = scores.masked_fill(outside, -torch.inf).flatten(3).softmax(-1)
        tokens = (weights.unsqueeze(3) @ patches.flatten(3, 4)).squeeze(3)
        if self.offset is None:
            return tokens

        # One row of weights over the grid per token: an index less than grid_sample and a copy of
        # every region, and sums that do not depend on the order of threads in the backward.
        # Positions in at least float32: bfloat16 has none between 128 and 129.
        offset = self.offset(tokens).tanh()
        down, right = (
            offset.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(-2).unbind(-1)
        )
        down = _near(rows[:, None] + down * rows.shape[1], height)
        right = _near(columns + right * columns.shape[1], width)
        weights = weights.unflatten(3, (rows.shape[1], -1)).to(down.dtype)
        weights = (down.transpose(3, 4) @ weights @ right).to(x.dtype)
        tokens = weights.flatten(3, 4).flatten(1, 2) @ x.flatten(1, 2)
        return tokens.unflatten(1, (len(rows), -1))

    def cells(self, length: int, dim: int) -> int:
        """How many semantic rows (dim 0) or columns (1) a grid of `length` of them gives."""
        whole, rest = divmod(length, self.window[dim])
        region, before, _ = self._padding(self.window[dim])
        return whole * self.side + (-(-(rest + before) // region) if rest else 0)

    def _padding(self, window: int) -> tuple[int, int, int]:
        """A region's length, and the padding before and behind a window, along one side."""
        region = -(-window // self.side)
        padding = region * self.side - window
        return region, padding // 2, padding - padding // 2

    def _positions(self, length: int, dim: int, device: Any) -> tuple[Tensor, Tensor]:
        """Per region along one side of a grid of `length`, the positions (R, h) of its patches,
        and which of them are patches of its window."""
        window = self.window[dim]
        region, before, behind = self._padding(window)
        num = self.cells(length, dim)
        within = torch.arange(-before, window + behind, device=device)
        starts = torch.arange(0, length, window, device=device)[:, None]
        inside = (within >= 0) & (within < window) & (starts + within < length)
        return (starts + within).view(-1, region)[:num], inside.view(-1, region)[:num]


def _near(positions: Tensor, length: int) -> Tensor:
    """(..., h) positions on a side of `length` patches -> (..., h, length): how much each reads of
    each patch, linearly between two."""
    positions = positions.clamp(0, length - 1).unsqueeze(-1)
    patches = torch.arange(length, device=positions.device)
    return (1 - (positions - patches).abs()).clamp(min=0)


class GenerateFirst(CrossBlock):
    """The first generating layer: patches -> pooled semantic tokens that have read all patches.

    (B, N, C) -> (B, S + N, C): the S semantic tokens in raster order, then the patches as they
    came. Keys: the patches. `pool`: a `SpatialPool` or `MaxPool` with one window, the whole grid.
    """

    def __init__(self, *args: Any, pool: MaxPool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        tokens = self.pool(x.unflatten(1, self.pool.window)).flatten(1, 2)
        return torch.cat([super().forward(tokens, x), x], dim=1)


class GenerateNext(CrossBlock):
    """A later generating layer: semantic tokens read themselves and all patches once more.

    (B, S + N, C) -> the same, or (B, S, C) from the last one: the patches end there. Queries and
    residual: tokens + `global_centres` (where there are some); keys: all S + N rows as they came.

    `global_centres` (1, S, C): learned, from a normal distribution (std 0.02); the second layer
    alone has them.
    """

    def __init__(
        self, *args: Any, num_tokens: int, global_centres: bool, last: bool, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.num_tokens = num_tokens
        self.last = last
        centres = self.norm1.weight.new_empty(1, num_tokens, len(self.norm1.weight))
        self.global_centres = nn.Parameter(centres) if global_centres else None

    def init_weights(self) -> None:
        """Called by timm's initialisation."""
        if self.global_centres is not None:
            nn.init.normal_(self.global_centres, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        tokens, patches = x[:, : self.num_tokens], x[:, self.num_tokens :]
        if self.global_centres is not None:
            tokens = tokens + self.global_centres
        tokens = super().forward(tokens, x)
        return tokens if self.last else torch.cat([tokens, patches], dim=1)


class STViT(VisionTransformer):
    """A DeiT that leaves its patches for semantic tokens.

    `base_depth` usual layers on all patches, `generating_depth` layers that make the semantic
    tokens, and the rest of `depth` on these alone; no CLS, then norm, the tokens' mean, head.
    Parameters have the names of timm's VisionTransformer; blocks[base_depth] is a `GenerateFirst`,
    the others up to blocks[base_depth + generating_depth - 1] are `GenerateNext`. DeiT-S at 224:
    1.91, 1.97 and 2.03 GMACs with 2, 3 and 4 generating layers, against 4.6.

    Args:
        depth: all layers.
        base_depth: layers before the semantic tokens.
        generating_depth: layers that make them; at least 2.
        semantic_grid: semantic tokens along each side: 4 are 16 tokens.
        pool: "spatial" (paper) or "max" (released code), see `SpatialPool` and `MaxPool`.
        inter_window: whether the pool "spatial" moves its centres.
        global_centres: whether the second generating layer has learned centres G (paper; off in
            the published runs of the released code).
        shortcut: whether the first generating layer adds the pooled tokens to what they read
            (paper; off in the published runs of the released code).
        options: as timm's VisionTransformer. There is no CLS token, and pictures have one size.

    Raises:
        ValueError: where depths or `semantic_grid` cannot be, or an option does not fit.
    """

    def __init__(
        self,
        depth: int = 12,
        base_depth: int = 4,
        generating_depth: int = 2,
        semantic_grid: int = 4,
        pool: str = "spatial",
        inter_window: bool = True,
        global_centres: bool = True,
        shortcut: bool = True,
        **options: Any,
    ) -> None:
        if not 0 <= base_depth <= depth - 2:
            raise ValueError(f"base_depth must be in [0, {depth - 2}], got {base_depth}")
        if not 2 <= generating_depth <= depth - base_depth:
            raise ValueError(
                f"generating_depth must be in [2, {depth - base_depth}], got {generating_depth}"
            )
        if pool not in ("spatial", "max"):
            raise ValueError(f"pool must be 'spatial' or 'max', got {pool!r}")
        fixed = {"class_token": False, "reg_tokens": 0, "dynamic_img_size": False}
        for name, value in {**fixed, "patch_drop_rate": 0.0, "block_fn": Block}.items():
            if options.setdefault(name, value) != value:
                raise ValueError(
                    f"{name} must be {value} with semantic tokens, got {options[name]}"
                )

        def block(dim: int, depth: int, **parts: Any) -> nn.Module:
            layer = depth - base_depth
            if layer == 0:
                dd = {"device": parts["device"], "dtype": parts["dtype"]}
                grid, norm = self.patch_embed.grid_size, parts["norm_layer"]
                first = (
                    SpatialPool(dim, semantic_grid, grid, inter_window, norm, **dd)
                    if pool == "spatial"
                    else MaxPool(semantic_grid, grid)
                )
                return GenerateFirst(dim, depth=depth, pool=first, shortcut=shortcut, **parts)
            if 0 < layer < generating_depth:
                return GenerateNext(
                    dim,
                    depth=depth,
                    num_tokens=semantic_grid**2,
                    global_centres=global_centres and layer == 1,
                    last=layer == generating_depth - 1,
                    **parts,
                )
            return Block(dim, depth=depth, **parts)

        options = {"global_pool": "avg", "fc_norm": False, **options, "block_fn": block}
        super().__init__(depth=depth, **options)
        self.base_depth, self.generating_depth = base_depth, generating_depth
        self.semantic_grid = semantic_grid
        for info in self.feature_info[base_depth:]:
            info["reduction"] = self.patch_embed.img_size[0] // semantic_grid

    def no_weight_decay(self) -> set[str]:
        """As timm's, and the global centres."""
        return super().no_weight_decay() | {f"blocks.{self.base_depth + 1}.global_centres"}

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """As timm's. The number of semantic tokens stays; their regions grow with the grid."""
        super().set_input_size(img_size, patch_size)
        first: Any = self.blocks[self.base_depth]
        first.pool.set_window(self.patch_embed.grid_size)

    @torch.no_grad()
    def clusters(self, images: Tensor) -> Tensor:
        """The semantic token that takes most of each patch in the last generating layer.

        (B, N) int64 for images (B, 3, H, W): the token's place in the semantic grid, row by row.
        """
        last: Any = self.blocks[self.base_depth + self.generating_depth - 1]
        seen: list[Tensor] = []
        with last.attn.register_forward_pre_hook(lambda _, read: seen.extend(read)):
            self(images)
        return last.attn.weights(*seen)[:, :, last.num_tokens :].argmax(1)

    def forward_intermediates(  # type: ignore[override]
        self, x: Tensor, indices: Any = None, output_fmt: str = "NCHW", **options: Any
    ) -> Any:
        """As timm's. From the first generating layer on the maps are those of the semantic grid."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        out: Any = super().forward_intermediates(x, indices, output_fmt="NLC", **options)
        if options.get("output_dict"):
            maps = out["image_intermediates"]
        else:
            maps = out if options.get("intermediates_only") else out[1]
        for place, tokens in enumerate(maps):
            grid = self.patch_embed.grid_size
            if tokens.shape[1] != self.patch_embed.num_patches:
                grid = self.semantic_grid, self.semantic_grid
                tokens = tokens[:, : self.semantic_grid**2]
            if output_fmt == "NCHW":
                tokens = tokens.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
            maps[place] = tokens
        return out


def _cfg(**options: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **options,
    }


default_cfgs = generate_default_cfgs(
    {
        "stvit_deit_tiny_patch16_224.untrained": _cfg(),
        "stvit_deit_small_patch16_224.untrained": _cfg(),
        "stvit_deit_base_patch16_224.untrained": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, **options: Any) -> STViT:
    out_indices = options.pop("out_indices", 3)
    return build_model_with_cfg(
        STViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **options,
    )


@register_model
def stvit_deit_tiny_patch16_224(pretrained: bool = False, **options: Any) -> STViT:
    """STViT on DeiT-T."""
    sizes = {"embed_dim": 192, "num_heads": 3}
    return _create("stvit_deit_tiny_patch16_224", pretrained, **{**sizes, **options})


@register_model
def stvit_deit_small_patch16_224(pretrained: bool = False, **options: Any) -> STViT:
    """STViT on DeiT-S."""
    sizes = {"embed_dim": 384, "num_heads": 6}
    return _create("stvit_deit_small_patch16_224", pretrained, **{**sizes, **options})


@register_model
def stvit_deit_base_patch16_224(pretrained: bool = False, **options: Any) -> STViT:
    """STViT on DeiT-B."""
    sizes = {"embed_dim": 768, "num_heads": 12}
    return _create("stvit_deit_base_patch16_224", pretrained, **{**sizes, **options})
