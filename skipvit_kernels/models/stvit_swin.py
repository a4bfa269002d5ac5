"""STViT and STViT-R on the trunk of Swin: a few semantic tokens per window of the third stage.

STViT goes on with the semantic tokens; STViT-R gives the image's tokens back after each of its
dumbbell units, so that every stage has its full map for detection and segmentation. Sources as in
`stvit`; the published STViT-R (changsn/STViT-R, changsn/STViT-R-Object-Detection) is followed where
`form` says so, without its faults: any input size, no window sees padding, and keys are projected
once instead of once per window that sees them.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ConvNormAct,
    PatchEmbed,
    RelPosBias,
    calculate_drop_path_rates,
    resample_abs_pos_embed,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    window_partition,
    window_reverse,
)
from timm.models.swin_transformer import checkpoint_filter_fn as swin_checkpoint_filter_fn
from torch import Tensor, nn

from skipvit_kernels.models.stvit import CrossBlock, MaxPool, SpatialPool, windows


class Form(NamedTuple):
    """Where the paper, the released classification and the released detection code differ.

    Args:
        pool: "spatial" or "max": the first semantic tokens, see `stvit`.
        shortcut: whether the first generating layer adds the pooled tokens to what they read.
        global_centres: whether the first unit's second generating layer has learned centres.
        own_keys: whether the first and the second generating layer have semantic tokens, those of
            the window and those of the neighbouring windows, among their keys.
        margin: how far the first generating layer's keys reach out of the 7 x 7 window, before and
            behind: 3 are the released 10 x 10 keys inwards of a 14 x 14 map.
    """

    pool: str
    shortcut: bool
    global_centres: bool
    own_keys: tuple[bool, bool]
    margin: tuple[int, int]


FORMS = {
    "paper": Form("spatial", True, True, (False, True), (3, 3)),
    "classification": Form("max", False, False, (True, True), (3, 3)),
    "detection": Form("max", True, False, (False, False), (3, 4)),
}


class SwinBlock(SwinTransformerBlock):
    """timm's Swin block for any grid: no token sees padding.

    timm and the official code let windows at the edge read padding as tokens of zeros, and timm
    shifts before it pads, so that opposite edges can meet. Where windows tile the grid this is
    timm's function. A side that one window covers is not shifted.
    """

    def __init__(self, dim: int, input_resolution: Any, **options: Any) -> None:
        super().__init__(dim, input_resolution, always_partition=True, dynamic_mask=True, **options)
        self.attn.fused_attn = True  # type: ignore[misc]

    def _attn(self, x: Tensor) -> Tensor:
        _, height, width, channels = x.shape
        size = self.window_size
        down, right = (
            0 if length <= window else shift
            for length, window, shift in zip(x.shape[1:3], size, self.shift_size, strict=True)
        )
        padding = -height % size[0], -width % size[1]
        mask = None
        if any(padding) or down or right:
            rows = _parts(height, height + padding[0], down, x.device)
            columns = _parts(width, width + padding[1], right, x.device)
            part = (3 * rows[:, None] + columns)[None, :, :, None]
            part = window_partition(part, size).flatten(1)
            mask = x.new_zeros(()).masked_fill(part[:, :, None] != part[:, None], -torch.inf)
            x = F.pad(x, (0, 0, 0, padding[1], 0, padding[0])).roll((-down, -right), (1, 2))
        x = self.attn(window_partition(x, size).flatten(1, 2), mask)
        x = x.view(-1, *size, channels)
        x = window_reverse(x, size, height + padding[0], width + padding[1])
        return x.roll((down, right), (1, 2))[:, :height, :width]


def _parts(length: int, padded: int, shift: int, device: Any) -> Tensor:
    """Of the rows after padding and roll: 0, 1 if they came round, 2 for padding. In one window
    only rows of one kind are neighbours."""
    row = (torch.arange(padded, device=device) + shift) % padded
    return torch.where(row < length, (row < shift).long(), 2)


class Keys(NamedTuple):
    """Tokens to read from: a grid in windows, of which the reading window sees its own and
    `margin` rows and columns more, before and behind. window 0: all is seen."""

    grid: Tensor
    window: int
    margin: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        """Side of what a window sees."""
        return sum(self.margin) + self.window

    def all_seen(self) -> bool:
        """Whether every window sees the whole grid."""
        window, (before, behind) = self.window, self.margin
        return window == 0 or all(
            before >= (length - 1) // window * window and behind >= length - window
            for length in self.grid.shape[1:3]
        )

    def tiles(self) -> bool:
        """Whether every window sees itself, whole."""
        grid = self.grid.shape[1:3]
        return not any(self.margin) and not any(length % self.window for length in grid)

    def mask(self, tokens: Tensor, window: int) -> Tensor:
        """Which of the grid's H * W tokens each of the h * w tokens in windows of `window` sees."""

        def near(num: int, length: int) -> Tensor:
            start = torch.arange(num, device=tokens.device)[:, None] // window * self.window
            place = torch.arange(length, device=tokens.device)
            before, behind = self.margin
            return (place >= start - before) & (place < start + self.window + behind)

        rows, columns = map(near, tokens.shape[1:3], self.grid.shape[1:3])
        return (rows[:, None, :, None] & columns[:, None]).flatten(2).flatten(0, 1)

    def seen(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """kv (B, H, W, C) of the grid's tokens per window (B * windows, K, C), copied once, and
        which of the K are on the grid (windows, K)."""
        before, behind = self.margin

        def inside(length: int) -> Tensor:
            starts = torch.arange(0, length, self.window, device=kv.device)[:, None]
            place = starts + torch.arange(-before, self.window + behind, device=kv.device)
            return (place >= 0) & (place < length)

        rows, columns = map(inside, kv.shape[1:3])
        below, right = (behind + -length % self.window for length in kv.shape[1:3])
        if before or below or right:
            kv = F.pad(kv, (0, 0, before, right, before, below))
        kv = kv.unfold(1, self.size, self.window).unfold(2, self.size, self.window)
        valid = (rows[:, None, :, None] & columns[:, None]).flatten(2).flatten(0, 1)
        return kv.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(0, 2), valid


class GridBlock(CrossBlock):
    """A `CrossBlock` on grids, window by window."""

    def look(self, tokens: Tensor, window: int, *keys: Keys, bias: Tensor | None = None) -> Tensor:
        """Tokens (B, h, w, C), in windows of `window` (0: one), after reading from `keys`.

        bias: added to the logits, (1, heads, tokens of a window, keys of a window).
        """
        q = self.attn.q(self.norm1(tokens))
        kvs = [self.attn.kv(self.norm1(key.grid)) for key in keys]
        # Reading all under a mask copies nothing; on a 14 x 14 map it takes 0.9 of the windows'
        # time, but its arithmetic grows with the map.
        if window == 0 or (
            bias is None
            and sum(kv[0, :, :, 0].numel() for kv in kvs) <= 2 * sum(key.size**2 for key in keys)
        ):
            all_seen = all(key.all_seen() for key in keys)
            mask = bias if all_seen else _joined([key.mask(tokens, window) for key in keys])
            kv = _joined([kv.flatten(1, 2) for kv in kvs])
            return self.feed(tokens, self.attn.attend(q.flatten(1, 2), kv, mask).view_as(tokens))

        batch, height, width, _ = tokens.shape
        q = windows(q, (window, window)).transpose(2, 3)
        grid = q.shape[1:5]
        seen = [key.seen(kv) for key, kv in zip(keys, kvs, strict=True)]
        mask = bias
        if not all(key.tiles() for key in keys):
            mask = _joined([valid for _, valid in seen]).repeat(batch, 1)[:, None, None]
            if bias is not None:
                mask = bias.masked_fill(~mask, -torch.inf)
        read = self.attn.attend(
            q.flatten(3, 4).flatten(0, 2), _joined([kv for kv, _ in seen]), mask
        )
        read = read.view(batch, *grid, -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return self.feed(tokens, read[:, :height, :width])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Generate(nn.Module):
    """The two generating layers of a unit: (B, H, W, C) -> its semantic tokens (B, h, w, C).

    Pool each window; `first` reads the window's surroundings (`Form.margin`) once; `next` reads
    the window and its eight neighbours, which at 224 is the whole map. Queries and residual of
    `next`: tokens + `global_centres` (1, S, C), raster order, std 0.02, resampled bicubically where
    the map is not that of `img_size`; its keys are without them. With conv_pos the pooled tokens of
    each window get a depth-wise 3x3 convolution (zeros around) added.
    """

    def __init__(
        self,
        first: dict[str, Any],
        following: dict[str, Any],
        side: int,
        window: int,
        form: Form,
        map_size: tuple[int, int],
        conv_pos: bool,
    ) -> None:
        super().__init__()
        dim, norm_layer = first["dim"], first["norm_layer"]
        dd = {"device": first["device"], "dtype": first["dtype"]}
        size = window, window
        self.pool = (
            SpatialPool(dim, side, size, norm_layer=norm_layer, **dd)
            if form.pool == "spatial"
            else MaxPool(side, size)
        )
        self.conv_pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if conv_pos else None
        self.first = GridBlock(shortcut=form.shortcut, **first)
        self.next = GridBlock(**following)
        self.side, self.window, self.form = side, window, form
        self.grid = self.pool.cells(map_size[0], 0), self.pool.cells(map_size[1], 1)
        num_tokens = self.grid[0] * self.grid[1]
        self.global_centres = (
            nn.Parameter(torch.empty(1, num_tokens, dim, **dd)) if form.global_centres else None
        )

    def init_weights(self) -> None:
        """Called by timm's initialisation."""
        if self.global_centres is not None:
            nn.init.normal_(self.global_centres, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        side, window = self.side, self.window
        tokens = self.pool(x)
        if self.conv_pos is not None:
            tokens = tokens + self._positions(tokens, self.conv_pos)
        own = (Keys(tokens, side),) if self.form.own_keys[0] else ()
        tokens = self.first.look(tokens, side, *own, Keys(x, window, self.form.margin))
        own = (Keys(tokens, side, (side, side)),) if self.form.own_keys[1] else ()
        if self.global_centres is not None:
            centres = resample_abs_pos_embed(
                self.global_centres, tokens.shape[1:3], self.grid, num_prefix_tokens=0
            )
            tokens = tokens + centres.view(1, *tokens.shape[1:])
        return self.next.look(tokens, side, *own, Keys(x, window, (window, window)))

    def _positions(self, tokens: Tensor, conv: nn.Conv2d) -> Tensor:
        cells = windows(tokens, (self.side, self.side)).transpose(2, 3)
        moved = conv(cells.flatten(0, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        moved = moved.view(cells.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return moved[:, : tokens.shape[1], : tokens.shape[2]]


class SemanticBlock(GridBlock):
    """Semantic tokens (B, h, w, C) among themselves: in a window of `window`, or (0) all.

    rel_pos: rows and columns for a relative position bias, as the released code's `relative_pos`;
    over all tokens only maps of that size are taken.
    """

    def __init__(self, window: int, rel_pos: tuple[int, int] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.window = window
        dd = {"device": options["device"], "dtype": options["dtype"]}
        self.rel_pos = RelPosBias(rel_pos, options["num_heads"], **dd) if rel_pos else None

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        bias = None
        if self.rel_pos is not None:
            size = self.rel_pos.window_size
            if self.window == 0 and tokens.shape[1:3] != size:
                raise ValueError(
                    f"relative_pos needs {size} semantic tokens, those of img_size, "
                    f"got {tuple(tokens.shape[1:3])}"
                )
            bias = self.rel_pos.get_bias()
        return self.look(tokens, self.window, Keys(tokens, self.window), bias=bias)


class DumbbellUnit(nn.Module):
    """Six layers of STViT-R: (B, H, W, C) -> the same.

    `swin`, a Swin block without shift; `generate`; `local` and `across`, semantic tokens among
    themselves in their window and all together; `recover`: the image's tokens read the semantic
    ones of their window and up to four windows further, which at 224 are all.
    """

    def __init__(
        self,
        swin: SwinBlock,
        generate: Generate,
        local: SemanticBlock,
        across: SemanticBlock,
        recover: GridBlock,
    ) -> None:
        super().__init__()
        self.swin, self.generate, self.local = swin, generate, local
        self.across, self.recover = across, recover

    def forward(self, x: Tensor) -> Tensor:
        x = self.swin(x)
        tokens = self.across(self.local(self.generate(x)))
        side, window = self.generate.side, self.generate.window
        return self.recover.look(x, window, Keys(tokens, side, (4 * side, 4 * side)))


class ConvStem(PatchEmbed):
    """The released code's stem: two 3x3 convolutions of stride 2, each with BatchNorm and
    Hardswish, in the place of Swin's 4x4 projection."""

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        norm_layer: Any = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, **options, **dd)
        conv: dict[str, Any] = {"kernel_size": 3, "stride": 2, "act_layer": "hard_swish", **dd}
        self.proj = nn.Sequential(  # type: ignore[assignment]
            ConvNormAct(in_chans, embed_dim // 2, **conv),
            ConvNormAct(embed_dim // 2, embed_dim, **conv),
        )


class STViTSwin(SwinTransformer):
    """A Swin transformer whose third stage makes semantic tokens of its windows.

    STViT (`recover=False`): `base_depth` Swin blocks, the two generating layers, and semantic
    blocks, in a window and over all in turn; the fourth stage merges and goes on with semantic
    tokens, its windows `semantic_side` x `semantic_side`. STViT-R (`recover=True`): units of six
    layers, see `DumbbellUnit`; the other stages are Swin's. Pictures of any size; parameters have
    the names of timm's SwinTransformer.

    Args:
        embed_dim, depths, num_heads: as timm's; with `recover` depths[2] is a multiple of 6.
        window_size: side of a window, one number.
        recover: STViT-R.
        base_depth: Swin blocks of the third stage before the semantic tokens, without `recover`.
        semantic_side: semantic tokens along a window's side: 3 are 9 per window, 4 are 16.
        form: "paper", "classification" or "detection", a row of `FORMS`; default the paper's, with
            `recover` the released classification's.
        pool, shortcut, global_centres: in the place of the form's.
        conv_pos, relative_pos: options of the released code, off in its published runs.
        init_values: of the LayerScale of all blocks but Swin's, None for none; 1e-5 as released.
        options: as timm's SwinTransformer. `global_centres` and `relative_pos` are made for
            `img_size`.

    Raises:
        ValueError: where depths, window, tokens or form cannot be.
    """

    patch_embed: Any

    def __init__(
        self,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int = 7,
        recover: bool = False,
        base_depth: int = 3,
        semantic_side: int = 3,
        form: str | None = None,
        pool: str | None = None,
        shortcut: bool | None = None,
        global_centres: bool | None = None,
        conv_pos: bool = False,
        relative_pos: bool = False,
        init_values: float | None = 1e-5,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: Any = nn.LayerNorm,
        weight_init: str = "",
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"depths must be 4 stages of at least one block, got {depths}")
        if recover and depths[2] % 6:
            raise ValueError(f"depths[2] must be a multiple of 6 with recover, got {depths[2]}")
        if not recover and not 0 <= base_depth <= depths[2] - 2:
            raise ValueError(f"base_depth must be in [0, {depths[2] - 2}], got {base_depth}")
        if not isinstance(window_size, int) or window_size < 1:
            raise ValueError(f"window_size must be a positive int, got {window_size!r}")
        form = form or ("classification" if recover else "paper")
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        stem: Any = partial(ConvStem if recover else PatchEmbed, dynamic_img_pad=True)
        chosen: dict[str, Any] = {
            "pool": pool,
            "shortcut": shortcut,
            "global_centres": global_centres,
        }
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if pool not in (None, "spatial", "max"):
            raise ValueError(f"pool must be 'spatial' or 'max', got {pool!r}")
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim=embed_dim,
            depths=(0,) * len(depths),  # filled below
            num_heads=num_heads,
            window_size=window_size,
            dynamic_img_size=True,
            embed_layer=stem,
            norm_layer=norm_layer,
            weight_init="skip",
            **options,
            **dd,
        )
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        maps: list[Any] = [stage.output_resolution for stage in self.layers]

        def common(stage: int, layer: int) -> dict[str, Any]:
            return {
                "dim": embed_dim * 2**stage,
                "num_heads": num_heads[stage],
                "mlp_ratio": mlp_ratio,
                "qkv_bias": qkv_bias,
                "proj_drop": proj_drop_rate,
                "attn_drop": attn_drop_rate,
                "drop_path": rates[stage][layer],
                "norm_layer": norm_layer,
                **dd,
            }

        def swin(stage: int, layer: int, window: int = window_size, shift: int = 0) -> SwinBlock:
            return SwinBlock(
                input_resolution=maps[stage],
                window_size=window,
                shift_size=shift,
                **common(stage, layer),
            )

        def swins(stage: int, depth: int, window: int = window_size) -> list[nn.Module]:
            return [swin(stage, layer, window, layer % 2 * (window // 2)) for layer in range(depth)]

        def cross(layer: int) -> dict[str, Any]:
            return {"init_values": init_values, **common(2, layer)}

        def generate(layer: int, centres: bool = True) -> Generate:
            parts = FORMS[form]._replace(**chosen)
            parts = parts._replace(global_centres=parts.global_centres and centres)
            layers = cross(layer), cross(layer + 1)
            return Generate(*layers, semantic_side, window_size, parts, maps[2], conv_pos)

        def semantic(layer: int, window: int, grid: tuple[int, int]) -> SemanticBlock:
            size = (window, window) if window else grid
            return SemanticBlock(window, size if relative_pos else None, **cross(layer))

        third: list[nn.Module] = []
        if recover:
            for layer in range(0, depths[2], 6):
                made = generate(layer + 1, centres=layer == 0)
                local = semantic(layer + 3, semantic_side, made.grid)
                across = semantic(layer + 4, 0, made.grid)
                recovery = GridBlock(**cross(layer + 5))
                third.append(DumbbellUnit(swin(2, layer), made, local, across, recovery))
        else:
            made = generate(base_depth)
            third += [*swins(2, base_depth), made]
            for layer in range(base_depth + 2, depths[2]):
                window = 0 if (layer - base_depth) % 2 else semantic_side
                third.append(semantic(layer, window, made.grid))
            for info, halved in zip(self.feature_info[2:], (1, 2), strict=True):
                info["reduction"] = self.patch_embed.img_size[0] * halved // made.grid[0]
        fourth = swins(3, depths[3], window_size if recover else semantic_side)
        blocks = swins(0, depths[0]), swins(1, depths[1]), third, fourth
        for stage, layers in zip(self.layers, blocks, strict=True):
            stage.blocks = nn.Sequential(*layers)
        self.weight_init_mode = weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def no_weight_decay(self) -> set[str]:
        """As timm's, and the global centres."""
        centres = {name for name, _ in self.named_parameters() if name.endswith("global_centres")}
        return super().no_weight_decay() | centres

    def set_input_size(self, img_size: Any = None) -> None:  # type: ignore[override]
        """Nothing to set: pictures of any size are taken as they are."""


_LAYERS = "swin", "generate.first", "generate.next", "local", "across", "recover"


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A released STViT-R file, or one of this model, in this model's names.

    Args:
        state_dict: the file's content, whole or its "model". Released names of the third stage are
            layers.2.blocks.0 to .17, six for a unit; buffers that are computed are left out.
        model: an `STViTSwin`.
    """

    def layer(name: re.Match[str]) -> str:
        unit, place = divmod(int(name[1]), 6)
        return f"layers.2.blocks.{unit}.{_LAYERS[place]}."

    state_dict = state_dict.get("model", state_dict)
    if "layers.2.blocks.1.layer_scale_1" in state_dict:
        renames: dict[str, Any] = {
            r"^layers\.2\.blocks\.(\d+)\.": layer,
            r"^layers\.2\.semantic_token2": "layers.2.blocks.0.generate.global_centres",
            r"\.layer_scale_([12])": r".ls\1.gamma",
            r"\.first\.conv_pos\.proj\.0\.": ".conv_pos.",
            r"\.(local|across)\.attn\.relative": r".\1.rel_pos.relative",
            r"^patch_embed\.proj\.(\d)\.c\.": r"patch_embed.proj.\1.conv.",
            r"^patch_embed\.proj\.2\.": "patch_embed.proj.1.",
        }
        renamed = {}
        for name, value in state_dict.items():
            for old, new in renames.items():
                name = re.sub(old, new, name)
            renamed[name] = value
        state_dict = renamed
    return swin_checkpoint_filter_fn(state_dict, model)


def _cfg(**options: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        **options,
    }


_STEM = {"first_conv": "patch_embed.proj.0.conv"}
default_cfgs = generate_default_cfgs(
    {
        "stvit_swin_tiny_patch4_window7_224.untrained": _cfg(pool_size=(3, 3)),
        "stvit_swin_small_patch4_window7_224.untrained": _cfg(pool_size=(3, 3)),
        "stvit_swin_base_patch4_window7_224.untrained": _cfg(pool_size=(3, 3)),
        "stvit_r_swin_small_patch4_window7_224.untrained": _cfg(**_STEM),
        "stvit_r_swin_base_patch4_window7_224.untrained": _cfg(**_STEM),
    }
)


def _create(variant: str, pretrained: bool, sizes: dict[str, Any], options: Any) -> STViTSwin:
    out_indices = options.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        STViTSwin,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**sizes, **options},
    )


_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "base_depth": 3}
_SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "base_depth": 10}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "base_depth": 10}


@register_model
def stvit_swin_tiny_patch4_window7_224(pretrained: bool = False, **options: Any) -> STViTSwin:
    """STViT on Swin-T, 9 semantic tokens per window: 3.1 GMACs."""
    return _create("stvit_swin_tiny_patch4_window7_224", pretrained, _TINY, options)


@register_model
def stvit_swin_small_patch4_window7_224(pretrained: bool = False, **options: Any) -> STViTSwin:
    """STViT on Swin-S, 9 semantic tokens per window: 5.9 GMACs."""
    return _create("stvit_swin_small_patch4_window7_224", pretrained, _SMALL, options)


@register_model
def stvit_swin_base_patch4_window7_224(pretrained: bool = False, **options: Any) -> STViTSwin:
    """STViT on Swin-B, 9 semantic tokens per window: 10.4 GMACs."""
    return _create("stvit_swin_base_patch4_window7_224", pretrained, _BASE, options)


@register_model
def stvit_r_swin_small_patch4_window7_224(pretrained: bool = False, **options: Any) -> STViTSwin:
    """STViT-R on Swin-S as released for classification; form="detection" for a backbone."""
    sizes = {**_SMALL, "recover": True}
    return _create("stvit_r_swin_small_patch4_window7_224", pretrained, sizes, options)


@register_model
def stvit_r_swin_base_patch4_window7_224(pretrained: bool = False, **options: Any) -> STViTSwin:
    """STViT-R on Swin-B as released for classification; form="detection" for a backbone."""
    sizes = {**_BASE, "recover": True}
    return _create("stvit_r_swin_base_patch4_window7_224", pretrained, sizes, options)
