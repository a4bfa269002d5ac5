"""STViT and STViT-R in plain loops over windows, from a state dict: an oracle for the models.

Written from the papers and from notes on the released code, not from the models' code: no padding,
no masks and no rolls, only lists of the rows and columns that a window has, and that it reads.
Tokens are (B, C) each, kept in a dict by their place; parameters have the models' names.
"""

import itertools
import math

import torch

WINDOW = 7


class Plain:
    """Operations on named parameters."""

    def __init__(self, state, eps, layer_scale):
        self.state, self.eps, self.layer_scale = state, eps, layer_scale

    def has(self, name):
        return name in self.state

    def linear(self, x, name):
        x = x @ self.state[f"{name}.weight"].T
        return x + self.state[f"{name}.bias"] if self.has(f"{name}.bias") else x

    def norm(self, x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def scale(self, x, name, branch):
        """LayerScale: on a Swin trunk, of every block that has q and kv apart."""
        scaled = self.layer_scale and self.has(f"{name}.attn.q.weight")
        return x * self.state[f"{name}.ls{branch}.gamma"] if scaled else x

    def feed(self, x, name):
        hidden = gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + self.scale(self.linear(hidden, f"{name}.mlp.fc2"), name, 2)

    def read(self, tokens, keys, name, heads, bias=None):
        """What tokens (B, M, C) read from keys (B, N, C), both not yet normalised; (B, M, C).

        bias: (M, N, heads), added to the logits.
        """
        tokens, keys = (self.norm(x, f"{name}.norm1") for x in (tokens, keys))
        if self.has(f"{name}.attn.qkv.weight"):
            q = self.linear(tokens, f"{name}.attn.qkv").chunk(3, -1)[0]
            k, v = self.linear(keys, f"{name}.attn.qkv").chunk(3, -1)[1:]
        else:
            q = self.linear(tokens, f"{name}.attn.q")
            k, v = self.linear(keys, f"{name}.attn.kv").chunk(2, -1)
        width, outs = q.shape[-1] // heads, []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            logits = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(width)
            if bias is not None:
                logits = logits + bias[..., head]
            outs.append(logits.softmax(-1) @ v[..., own])
        return self.scale(self.linear(torch.cat(outs, -1), f"{name}.attn.proj"), name, 1)


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def depthwise(grid, kernel, bias):
    """3x3 with zeros around, of a grid {(row, column): (B, C)}: by its definition."""
    out = {}
    for i, j in grid:
        out[i, j] = bias
        for di, dj in itertools.product(range(3), range(3)):
            seen = grid.get((i + di - 1, j + dj - 1))
            if seen is not None:
                out[i, j] = out[i, j] + seen * kernel[:, 0, di, dj]
    return out


def as_grid(x):
    """(B, H, W, C) as a dict of tokens."""
    rows = [row.unbind(1) for row in x.unbind(1)]
    return {(i, j): token for i, row in enumerate(rows) for j, token in enumerate(row)}


def stacked(grid, places):
    return torch.stack([grid[place] for place in places], 1)


def put(grid, places, tokens):
    grid.update(zip(places, tokens.unbind(1), strict=True))


def sides(grid):
    """Rows and columns of a grid."""
    return tuple(max(place[side] for place in grid) + 1 for side in (0, 1))


# ------------------------------------------------------------- pooling of a window


def adaptive_max(plain, name, grid, top, left, window, side):
    """{(row, column) in the window's cells: token} of the patches that are there."""
    cells = {}
    for i, j in itertools.product(range(side), range(side)):
        rows, columns = (
            range(first + at * length // side, first + -(-(at + 1) * length // side))
            for first, at, length in ((top, i, window[0]), (left, j, window[1]))
        )
        there = [place for place in itertools.product(rows, columns) if place in grid]
        if there:
            cells[i, j] = stacked(grid, there).amax(1)
    return cells


def weighted_mean(plain, name, grid, top, left, window, side, inter_window=True):
    """The same by the learned mask (intra-window), then around moved places (inter-window)."""
    height, width = (-(-length // side) for length in window)
    above, before = (
        (size * side - length) // 2 for size, length in zip((height, width), window, strict=True)
    )
    cells = {}
    for i, j in itertools.product(range(side), range(side)):
        region = {}
        for a, b in itertools.product(range(height), range(width)):
            inside = i * height + a - above, j * width + b - before
            place = top + inside[0], left + inside[1]
            if all(0 <= at < n for at, n in zip(inside, window, strict=True)) and place in grid:
                region[a, b] = place
        if not region:
            continue
        values = {at: grid[place] for at, place in region.items()}
        zeros = torch.zeros_like(next(iter(values.values())))
        full = {at: values.get(at, zeros) for at in itertools.product(range(height), range(width))}
        kernel, bias = (plain.state[f"{name}.conv.{what}"] for what in ("weight", "bias"))
        mask = depthwise(full, kernel, bias)
        scores = [
            plain.linear(gelu(plain.norm(mask[at], f"{name}.norm")), f"{name}.score")
            for at in region
        ]
        weights = torch.stack(scores, 1).softmax(1)  # (B, patches of the region, 1)
        token = (weights * torch.stack(list(values.values()), 1)).sum(1)
        if inter_window:
            move = torch.tanh(plain.linear(token, f"{name}.offset"))
            places = torch.tensor(list(region.values()))
            down = places[:, 0] + move[:, :1] * height
            right = places[:, 1] + move[:, 1:] * width
            token = (weights * bilinear(grid, down, right)).sum(1)
        cells[i, j] = token
    return cells


def bilinear(grid, down, right):
    """(B, K, C): the grid (H, W) at places (B, K), cut to it."""
    height, width = sides(grid)
    x = stacked(grid, sorted(grid))
    down, right = down.clamp(0, height - 1), right.clamp(0, width - 1)
    images = []
    for tokens, r, c in zip(x, down, right, strict=True):
        found = 0
        for a, b in itertools.product((0, 1), (0, 1)):
            i, j = r.detach().floor() + a, c.detach().floor() + b
            share = (1 - (r - i).abs()) * (1 - (c - j).abs())  # 0 beyond the last row or column
            at = i.clamp(max=height - 1) * width + j.clamp(max=width - 1)
            found = found + share[:, None] * tokens[at.long()]
        images.append(found)
    return torch.stack(images)


POOLS = {"max": adaptive_max, "spatial": weighted_mean}


# -------------------------------------------------------------------------- DeiT


def deit(state, images, *, heads, depth, base, generating, side=4, pool="spatial",
         inter_window=True, global_centres=True, shortcut=True):  # fmt: skip
    """Logits of STViT on a DeiT trunk."""
    plain = Plain(state, eps=1e-6, layer_scale=False)
    x = embedded(plain, images)
    rows, columns = x.shape[1:3]
    x = x.flatten(1, 2) + state["pos_embed"]
    tokens = None
    for layer in range(depth):
        name = f"blocks.{layer}"
        if layer == base:
            grid = as_grid(x.unflatten(1, (rows, columns)))
            options = {"inter_window": inter_window} if pool == "spatial" else {}
            cells = POOLS[pool](plain, f"{name}.pool", grid, 0, 0, (rows, columns), side, **options)
            pooled = stacked(cells, sorted(cells))
            tokens = plain.read(pooled, x, name, heads)
            tokens = plain.feed(pooled + tokens if shortcut else tokens, name)
        elif base < layer < base + generating:
            query = tokens
            if layer == base + 1 and global_centres:
                query = tokens + state[f"{name}.global_centres"]
            read = plain.read(query, torch.cat([tokens, x], 1), name, heads)
            tokens = plain.feed(query + read, name)
        elif layer < base:
            x = plain.feed(x + plain.read(x, x, name, heads), name)
        else:
            tokens = plain.feed(tokens + plain.read(tokens, tokens, name, heads), name)
    return plain.linear(plain.norm(tokens, "norm").mean(1), "head")


# -------------------------------------------------------------------------- Swin


def segments(length, window, shift):
    """Neighbours along one side: rows that a window holds together."""
    if -(-length // window) == 1:
        shift = 0
    cuts = [0, *range(shift or window, length, window), length]
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def windows_of(grid, window, shift=0):
    rows, columns = sides(grid)
    pairs = itertools.product(segments(rows, window, shift), segments(columns, window, shift))
    return [list(itertools.product(*pair)) for pair in pairs]


def relative(table, places, others, rows, columns):
    """(M, N, heads) of a table of (2 rows - 1) x (2 columns - 1) differences."""
    at = [
        [(i - k + rows - 1) * (2 * columns - 1) + j - n + columns - 1 for k, n in others]
        for i, j in places
    ]
    return table[torch.tensor(at)]


def swin_block(plain, grid, name, heads, window, shift):
    out, table = {}, plain.state[f"{name}.attn.relative_position_bias_table"]
    for places in windows_of(grid, window, shift):
        x = stacked(grid, places)
        bias = relative(table, places, places, window, window)
        put(out, places, plain.feed(x + plain.read(x, x, name, heads, bias), name))
    return out


def merged(plain, grid, name):
    """Four cells to one, zeros beyond an odd edge."""
    zeros, out = torch.zeros_like(grid[0, 0]), {}
    rows, columns = sides(grid)
    for i, j in itertools.product(range(0, rows, 2), range(0, columns, 2)):
        cells = [grid.get((i + a, j + b), zeros) for a, b in ((0, 0), (1, 0), (0, 1), (1, 1))]
        x = plain.norm(torch.cat(cells, -1), f"{name}.norm")
        out[i // 2, j // 2] = plain.linear(x, f"{name}.reduction")
    return out


def generated(plain, grid, name, heads, side, form):
    """Semantic tokens of a map: {(row, column): token}, `side` rows of them in a whole window."""
    rows, columns = sides(grid)
    options = {} if form["pool"] == "max" else {"inter_window": True}
    pooled, first = {}, {}
    corners = list(itertools.product(range(0, rows, WINDOW), range(0, columns, WINDOW)))
    for top, left in corners:
        cells = POOLS[form["pool"]](
            plain, f"{name}.pool", grid, top, left, (WINDOW, WINDOW), side, **options
        )
        if form.get("conv_pos"):
            kernel, bias = (plain.state[f"{name}.conv_pos.{what}"] for what in ("weight", "bias"))
            added = depthwise(cells, kernel, bias)
            cells = {at: token + added[at] for at, token in cells.items()}
        base = top // WINDOW * side, left // WINDOW * side
        pooled[top, left] = {(base[0] + i, base[1] + j): token for (i, j), token in cells.items()}
    before, behind = form["margin"]
    for (top, left), cells in pooled.items():
        own = stacked(cells, sorted(cells))
        reach = itertools.product(
            range(max(top - before, 0), min(top + WINDOW + behind, rows)),
            range(max(left - before, 0), min(left + WINDOW + behind, columns)),
        )
        keys = stacked(grid, list(reach))
        keys = torch.cat([own, keys], 1) if form["own_keys"][0] else keys
        tokens = plain.read(own, keys, f"{name}.first", heads)
        tokens = plain.feed(own + tokens if form["shortcut"] else tokens, f"{name}.first")
        put(first, sorted(cells), tokens)
    places, queries = sorted(first), dict(first)
    if form["global_centres"]:
        centres = plain.state[f"{name}.global_centres"]
        queries = {place: first[place] + centres[:, at] for at, place in enumerate(places)}
    out = {}
    for (top, left), cells in pooled.items():
        reach = itertools.product(
            range(max(top - WINDOW, 0), min(top + 2 * WINDOW, rows)),
            range(max(left - WINDOW, 0), min(left + 2 * WINDOW, columns)),
        )
        keys = stacked(grid, list(reach))
        if form["own_keys"][1]:
            near = close(places, (top // WINDOW, left // WINDOW), side, 1)
            keys = torch.cat([stacked(first, near), keys], 1)  # fmt: skip
        query = stacked(queries, sorted(cells))
        read = plain.read(query, keys, f"{name}.next", heads)
        put(out, sorted(cells), plain.feed(query + read, f"{name}.next"))
    return out


def close(places, window, side, reach):
    """Semantic tokens of the windows at most `reach` windows away."""
    return [
        (i, j)
        for i, j in places
        if abs(i // side - window[0]) <= reach and abs(j // side - window[1]) <= reach
    ]


def semantic_block(plain, tokens, name, heads, side, form):
    """Among the semantic tokens of a window of `side`, or of all (None)."""
    rows, columns = sides(tokens)
    groups = [sorted(tokens)] if side is None else windows_of(tokens, side)
    out = {}
    for places in groups:
        x, bias = stacked(tokens, places), None
        if form.get("relative_pos"):
            shape = (rows, columns) if side is None else (side, side)
            table = plain.state[f"{name}.rel_pos.relative_position_bias_table"]
            bias = relative(table, places, places, *shape)
        put(out, places, plain.feed(x + plain.read(x, x, name, heads, bias), name))
    return out


def recovered(plain, grid, tokens, name, heads, side):
    """The map, after each window read semantic tokens of those up to four windows further."""
    out = {}
    for places in windows_of(grid, WINDOW):
        own = [at // WINDOW for at in places[0]]
        near = close(sorted(tokens), own, side, 4)
        x = stacked(grid, places)
        read = plain.read(x, stacked(tokens, near), name, heads)
        put(out, places, plain.feed(x + read, name))
    return out


def stem(plain, x):
    """Two convolutions of stride 2 with BatchNorm (of evaluation) and Hardswish."""
    for at in (0, 1):
        name = f"patch_embed.proj.{at}"
        mean, variance, scale, bias = (
            plain.state[f"{name}.bn.{what}"][:, None, None]
            for what in ("running_mean", "running_var", "weight", "bias")
        )
        x = torch.nn.functional.conv2d(x, plain.state[f"{name}.conv.weight"], None, 2, 1)
        x = (x - mean) / (variance + 1e-5).sqrt() * scale + bias
        x = x * (x + 3).clamp(0, 6) / 6
    return as_grid(x.movedim(1, -1))


def embedded(plain, images):
    """(B, H, W, C): patches under one linear map."""
    kernel, bias = (plain.state[f"patch_embed.proj.{what}"] for what in ("weight", "bias"))
    x = torch.nn.functional.conv2d(images, kernel, bias, kernel.shape[-1])
    return x.movedim(1, -1)


def patches(plain, images):
    """Swin's own: 4x4 patches and a norm."""
    x = embedded(plain, images)
    return as_grid(plain.norm(x, "patch_embed.norm"))


def swin(state, images, *, depths, heads, form, recover, base=None, side=3):
    """Logits of STViT on a Swin trunk, or of STViT-R."""
    plain = Plain(state, eps=1e-5, layer_scale=True)
    # Of pictures that patches do not tile; the released code does so before either stem.
    images = torch.nn.functional.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4))
    grid = stem(plain, images) if recover else patches(plain, images)
    for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        name = f"layers.{stage}"
        if stage > 0:
            grid = merged(plain, grid, f"{name}.downsample")
        if stage == 2 and recover:
            for unit in range(depth // 6):
                at = f"{name}.blocks.{unit}"
                grid = swin_block(plain, grid, f"{at}.swin", count, WINDOW, 0)
                tokens = generated(plain, grid, f"{at}.generate", count, side, form)
                tokens = semantic_block(plain, tokens, f"{at}.local", count, side, form)
                tokens = semantic_block(plain, tokens, f"{at}.across", count, None, form)
                form = form | {"global_centres": False}  # the first unit's only
                grid = recovered(plain, grid, tokens, f"{at}.recover", count, side)
            continue
        usual = base if stage == 2 else depth
        window = side if stage == 3 and not recover else WINDOW
        for block in range(usual):
            shift = window // 2 if block % 2 else 0
            grid = swin_block(plain, grid, f"{name}.blocks.{block}", count, window, shift)
        if stage == 2:
            grid = generated(plain, grid, f"{name}.blocks.{base}", count, side, form)
            for at in range(depth - base - 2):
                where = side if at % 2 == 0 else None
                block = f"{name}.blocks.{base + 1 + at}"
                grid = semantic_block(plain, grid, block, count, where, form)
    x = plain.norm(stacked(grid, sorted(grid)), "norm")
    return plain.linear(x.mean(1), "head.fc")
