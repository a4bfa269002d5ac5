"""The parts of STViT on grids of any size, held against loops over what each token may see."""

import math
import types

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from skipvit_kernels.models import stvit_swin
from skipvit_kernels.models.stvit import MaxPool, SpatialPool
from skipvit_kernels.models.stvit_swin import (
    FORMS,
    Generate,
    GridBlock,
    Keys,
    SemanticBlock,
    SwinBlock,
)

STVIT_R = "stvit_r_swin_small_patch4_window7_224"
PARTS = dict(num_heads=2, qkv_bias=True, norm_layer=nn.LayerNorm)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def lively(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def attention(attn, q, kv, bias=None):
    """Of q (M, C) to kv (N, 2 C), both projected, head by head: (M, C)."""
    heads = []
    for head in range(attn.num_heads):
        width = q.shape[1] // attn.num_heads
        at = slice(head * width, (head + 1) * width)
        k, v = kv[:, : q.shape[1]][:, at], kv[:, q.shape[1] :][:, at]
        logits = q[:, at] @ k.T / math.sqrt(width)
        logits = logits if bias is None else logits + bias[:, :, head]
        heads.append(logits.softmax(-1) @ v)
    return attn.proj(torch.cat(heads, 1))


def fed(block, tokens, read):
    read = block.ls1(read)
    tokens = tokens + read if getattr(block, "shortcut", True) else read
    return tokens + block.ls2(block.mlp(block.norm2(tokens)))


def looked(block, tokens, window, *keys, bias=None):
    """`GridBlock.look`, one token at a time; bias (places in a window, the same, heads)."""
    out = torch.empty_like(tokens)
    for b, i, j in torch.cartesian_prod(*map(torch.arange, tokens.shape[:3])).tolist():
        seen, biases = [], []
        for grid, size, (before, behind) in keys:
            for r, c in torch.cartesian_prod(*map(torch.arange, grid.shape[1:3])).tolist():
                if size == 0 or all(
                    first * size - before <= place < (first + 1) * size + behind
                    for place, first in ((r, i // (window or 1)), (c, j // (window or 1)))
                ):
                    seen.append(grid[b, r, c])
                    if bias is not None:
                        own, other = i % window * window + j % window, r % size * size + c % size
                        biases.append(bias[own, other])
        q = block.attn.q(block.norm1(tokens[b, i, j][None]))
        kv = block.attn.kv(block.norm1(torch.stack(seen)))
        out[b, i, j] = attention(block.attn, q, kv, torch.stack(biases)[None] if biases else None)[
            0
        ]
    return fed(block, tokens, out)


@pytest.mark.parametrize("height, width", [(14, 14), (9, 20), (5, 16), (7, 7), (3, 2)])
@pytest.mark.parametrize("margin", [(0, 0), (3, 4), (7, 7), (2, 13)])
def test_tokens_read_what_lies_around_their_window(height, width, margin):
    block = lively(GridBlock(8, **PARTS))
    x, tokens = (
        torch.randn(2, height, width, 8),
        MaxPool(3, (7, 7))(torch.randn(2, height, width, 8)),
    )
    keys = Keys(tokens, 3, (3, 3)), Keys(x, 7, margin)
    torch.testing.assert_close(block.look(tokens, 3, *keys), looked(block, tokens, 3, *keys))
    keys = (Keys(tokens, 3, (12, 12)),)
    torch.testing.assert_close(block.look(x, 7, *keys), looked(block, x, 7, *keys))


@pytest.mark.parametrize("rows, columns", [(6, 6), (4, 5), (2, 3)])
@pytest.mark.parametrize("relative_pos", [False, True])
def test_semantic_tokens_among_themselves(rows, columns, relative_pos):
    parts = dict(dim=8, device=None, dtype=None, **PARTS)
    local = lively(SemanticBlock(3, (3, 3) if relative_pos else None, **parts))
    x, bias = torch.randn(2, rows, columns, 8), None
    if relative_pos:
        places = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        offset = places[:, None] - places + 2
        bias = local.rel_pos.relative_position_bias_table[offset[..., 0] * 5 + offset[..., 1]]
    torch.testing.assert_close(local(x), looked(local, x, 3, Keys(x, 3), bias=bias))
    across = lively(SemanticBlock(0, **parts))
    torch.testing.assert_close(across(x), looked(across, x, 0, Keys(x, 0)))


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("height, width", [(14, 14), (9, 20), (12, 7), (5, 16)])
def test_swin_block_reads_its_shifted_window_and_no_padding(height, width, shift):
    block = SwinBlock(8, (14, 14), num_heads=2, window_size=7, shift_size=shift)
    lively(block)
    x = torch.randn(2, height, width, 8)
    shifts = [0 if length <= 7 else shift for length in (height, width)]
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    window = (places - torch.tensor(shifts)).div(7, rounding_mode="floor")
    qkv, read = block.attn.qkv(block.norm1(x)), torch.empty_like(x)
    for (i, j), own in zip(places.tolist(), window, strict=True):
        seen = places[(window == own).all(1)]
        offset = torch.tensor([i, j]) - seen + 6
        bias = block.attn.relative_position_bias_table[offset[:, 0] * 13 + offset[:, 1]]
        for b in range(2):
            kv = qkv[b, seen[:, 0], seen[:, 1], 8:]
            read[b, i, j] = attention(block.attn, qkv[b, i, j, None, :8], kv, bias[None])[0]
    want = x + read
    want = want + block.mlp(block.norm2(want))
    torch.testing.assert_close(block(x), want)


def test_swin_block_is_timms_where_windows_tile():
    ours = lively(SwinBlock(8, (14, 14), num_heads=2, window_size=7, shift_size=3))
    timms = SwinTransformerBlock(8, (14, 21), num_heads=2, window_size=7, shift_size=3).eval()
    timms.load_state_dict(ours.state_dict())
    x = torch.randn(2, 14, 21, 8)
    torch.testing.assert_close(ours(x), timms(x))


def pooled(x, side, window, cell):
    """Rows of `cell(first row, rows of the window)` over both sides; cells without rows go."""

    def cells(length):
        for start in range(0, length, window):
            for index in range(side):
                rows = [start + row for row in cell(index) if 0 <= row < window]
                rows = [row for row in rows if row < length]
                if rows:
                    yield start, index, rows

    return list(cells(x.shape[1])), list(cells(x.shape[2]))


@pytest.mark.parametrize("height, width", [(14, 14), (9, 20), (1, 12)])
@pytest.mark.parametrize("side", [2, 3, 4])
def test_max_pool(height, width, side):
    x = torch.randn(2, height, width, 5) - 3  # zeros of padding would be the largest
    rows, columns = pooled(
        x, side, 7, lambda index: range(index * 7 // side, -(-(index + 1) * 7 // side))
    )
    want = [x[:, r][:, :, c].amax((1, 2)) for _, _, r in rows for _, _, c in columns]
    got = MaxPool(side, (7, 7))(x)
    assert got.shape[1:3] == (len(rows), len(columns))
    torch.testing.assert_close(got.flatten(1, 2), torch.stack(want, 1))


@pytest.mark.parametrize("inter_window", [False, True])
@pytest.mark.parametrize("height, width, side, window", [(14, 14, 4, 14), (9, 16, 3, 7)])
def test_spatial_pool(height, width, side, window, inter_window):
    pool = lively(SpatialPool(5, side, (window, window), inter_window))
    x = torch.randn(2, height, width, 5)
    region = math.ceil(window / side)
    before = (region * side - window) // 2
    start = lambda index: index * region - before  # noqa: E731
    rows, columns = pooled(
        x, side, window, lambda index: range(start(index), start(index) + region)
    )

    def read(image, row, column):
        row, column = row.clamp(0, height - 1), column.clamp(0, width - 1)
        r, c = row.floor().long().clamp(max=height - 2), column.floor().long().clamp(max=width - 2)
        down, right = row - r, column - c
        upper = image[r, c] * (1 - right) + image[r, c + 1] * right
        lower = image[r + 1, c] * (1 - right) + image[r + 1, c + 1] * right
        return upper * (1 - down) + lower * down

    want = []
    for image in x:
        for first_row, row_index, r in rows:
            for first_column, column_index, c in columns:
                top, left = first_row + start(row_index), first_column + start(column_index)
                patches = torch.zeros(5, region, region)
                for i in r:
                    for j in c:
                        patches[:, i - top, j - left] = image[i, j]
                scores = pool.norm(pool.conv(patches[None])[0].permute(1, 2, 0))
                scores = pool.score(nn.functional.gelu(scores))[..., 0]
                inside = [(i, j) for i in r for j in c]
                weights = torch.stack([scores[i - top, j - left] for i, j in inside]).softmax(0)
                token = sum(w * image[i, j] for w, (i, j) in zip(weights, inside, strict=True))
                if inter_window:
                    down, right = pool.offset(token).tanh() * region
                    token = sum(
                        w * read(image, i + down, j + right)
                        for w, (i, j) in zip(weights, inside, strict=True)
                    )
                want.append(token)
    got = pool(x)
    assert got.shape == (2, len(rows), len(columns), 5)
    torch.testing.assert_close(got.flatten(0, 2), torch.stack(want))


@pytest.mark.parametrize("form", FORMS)
def test_generating_layers_follow_their_form(form):
    parts = dict(dim=8, device=None, dtype=None, **PARTS)
    form = FORMS[form]
    made = lively(Generate(parts, parts, 3, 7, form, (9, 16), conv_pos=False))
    x = torch.randn(2, 9, 16, 8)
    tokens = made.pool(x)
    own = [Keys(tokens, 3)] if form.own_keys[0] else []
    tokens = looked(made.first, tokens, 3, *own, Keys(x, 7, form.margin))
    own = [Keys(tokens, 3, (3, 3))] if form.own_keys[1] else []
    if form.global_centres:
        tokens = tokens + made.global_centres.view(1, *tokens.shape[1:])
    torch.testing.assert_close(made(x), looked(made.next, tokens, 3, *own, Keys(x, 7, (7, 7))))


@pytest.mark.parametrize("form", ["classification", "detection"])
def test_padding_has_no_influence(form, monkeypatch):
    """What padding holds does not matter, at sizes that no window tiles, nor do its gradients."""
    sizes = dict(embed_dim=12, depths=(1, 1, 6, 2), num_heads=(1, 2, 4, 8))
    model = timm.create_model(STVIT_R, features_only=True, form=form, dtype=torch.float64, **sizes)
    lively(model)
    x = torch.randn(1, 3, 288, 160, requires_grad=True)

    def run():
        maps = model(x)
        return maps, torch.autograd.grad(sum(m.square().sum() for m in maps), x)[0]

    maps, gradient = run()
    assert [tuple(m.shape[2:]) for m in maps] == [(72, 40), (36, 20), (18, 10), (9, 5)]
    pad = nn.functional.pad
    poisoned = types.SimpleNamespace(**vars(nn.functional))
    poisoned.pad = lambda x, padding, value=1e3: pad(x, padding, value=value)
    monkeypatch.setattr(stvit_swin, "F", poisoned)
    again, gradient_again = run()
    for before, after in zip(maps, again, strict=True):
        torch.testing.assert_close(after, before)
    torch.testing.assert_close(gradient_again, gradient)


def released(width, heads, depths=(2, 2, 18, 2), classes=10, options=True):
    """A file as the released code writes it, by the names of its parameters and buffers."""
    state = {}

    def norm(name, size):
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(2, size)

    def linear(name, out, size, bias=True):
        state[f"{name}.weight"] = torch.randn(out, size)
        if bias:
            state[f"{name}.bias"] = torch.randn(out)

    for place, (out, size) in {0: (width // 2, 3), 2: (width, width // 2)}.items():
        state[f"patch_embed.proj.{place}.c.weight"] = torch.randn(out, size, 3, 3)
        norm(f"patch_embed.proj.{place}.bn", out)
        state[f"patch_embed.proj.{place}.bn.running_mean"] = torch.randn(out)
        state[f"patch_embed.proj.{place}.bn.running_var"] = torch.rand(out) + 0.5
        state[f"patch_embed.proj.{place}.bn.num_batches_tracked"] = torch.tensor(3)
    for stage, depth in enumerate(depths):
        dim = width * 2**stage
        for block in range(depth):
            name, inside = f"layers.{stage}.blocks.{block}", block % 6
            norm(f"{name}.norm1", dim)
            norm(f"{name}.norm2", dim)
            linear(f"{name}.attn.proj", dim, dim)
            linear(f"{name}.mlp.fc1", 4 * dim, dim)
            linear(f"{name}.mlp.fc2", dim, 4 * dim)
            if stage != 2 or inside == 0:
                linear(f"{name}.attn.qkv", 3 * dim, dim)
                table = torch.randn(169, heads[stage])
                state[f"{name}.attn.relative_position_bias_table"] = table
                state[f"{name}.attn.relative_position_index"] = torch.zeros(
                    49, 49, dtype=torch.long
                )
                if block % 2 and stage < 2:
                    state[f"{name}.attn_mask"] = torch.zeros(16 ** (2 - stage) // 4, 49, 49)
                continue
            linear(f"{name}.attn.q", dim, dim)
            linear(f"{name}.attn.kv", 2 * dim, dim)
            state[f"{name}.layer_scale_1"], state[f"{name}.layer_scale_2"] = torch.randn(2, dim)
            if options and inside == 1:
                state[f"{name}.conv_pos.proj.0.weight"] = torch.randn(dim, 1, 3, 3)
                state[f"{name}.conv_pos.proj.0.bias"] = torch.randn(dim)
            if options and inside in (3, 4):
                rows = {3: 5, 4: 11}[inside]
                table = torch.randn(rows**2, heads[stage])
                state[f"{name}.attn.relative_position_bias_table"] = table
        if stage < 3:
            norm(f"layers.{stage}.downsample.norm", 4 * dim)
            linear(f"layers.{stage}.downsample.reduction", 2 * dim, 4 * dim, bias=False)
    if options:
        state["layers.2.semantic_token2"] = torch.randn(1, 36, 4 * width)
    norm("norm", 8 * width)
    linear("head", classes, 8 * width)
    return state


@pytest.mark.parametrize("options", [False, True])
def test_released_files_load_strictly(tmp_path, options):
    sizes = dict(embed_dim=8, num_heads=(1, 2, 4, 8), dtype=torch.float64)
    state = released(8, (1, 2, 4, 8), options=options)
    torch.save({"model": state, "epoch": 299}, tmp_path / "released.pth")
    flags = dict(global_centres=options, conv_pos=options, relative_pos=options)
    model = timm.create_model(
        STVIT_R,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "released.pth"), num_classes=10),
        **sizes,
        **flags,
    )
    computed = ("relative_position_index", "attn_mask")
    want = {name: value for name, value in state.items() if not name.endswith(computed)}
    got = model.state_dict()
    assert len(got) == len(want)
    unit = got["layers.2.blocks.2.recover.attn.kv.weight"]
    assert torch.equal(unit, state["layers.2.blocks.17.attn.kv.weight"])
    assert torch.equal(got["layers.3.downsample.norm.bias"], state["layers.2.downsample.norm.bias"])
    sums = [sorted(value.double().sum().item() for value in file.values()) for file in (got, want)]
    torch.testing.assert_close(*map(torch.tensor, sums))

    model.load_state_dict(stvit_swin.checkpoint_filter_fn(dict(got), model))  # its own file too
    del state["layers.2.blocks.3.attn.q.bias"]
    with pytest.raises(RuntimeError, match=r"blocks\.0\.local\.attn\.q\.bias"):
        model.load_state_dict(stvit_swin.checkpoint_filter_fn({"model": state}, model))
