"""SkipViT on every block of timm that is patched: attention maps, sorting, loops over images.

Nothing of the package is called. Biases, masks and RoPE are looked up by the place of a token in
the whole image, where the package moves their rows along; the model's own embedding and head run.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn


def transcribed(model, config, scorer):
    """A copy of the model whose blocks are `Step`s, and its parameters in the model's order."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    trunk = getattr(model, "encoder", model)
    head = (model.norm, model.attn_pool) if scorer == "latent" else None
    run = Run(config, scorer, head, getattr(trunk, "num_prefix_tokens", 0))
    for at, block in enumerate(list(trunk.blocks)):
        trunk.blocks[at] = Step(block, at + 1, run)
    return model, parameters


class Run:
    """What the steps of a forward share."""

    def __init__(self, config, scorer, head, prefix):
        self.config, self.scorer, self.head, self.prefix = config, scorer, head, prefix

    def start(self, x):
        self.places = torch.arange(x.shape[1]).expand(len(x), -1)
        self.away = []


class Step(nn.Module):
    def __init__(self, block, layer, run):
        super().__init__()
        self.block, self.layer, self.run = block, layer, run

    def forward(self, x, *positional, **given):
        run, config, block = self.run, self.run.config, self.block
        given |= dict(zip(("rope_cos", "rope_sin", "attn_mask"), positional, strict=False))
        if self.layer == 1:
            run.start(x)
        if self.layer == config.rejoin_at:
            for full, index, places in reversed(run.away):
                back = full.clone()
                for image in range(len(x)):
                    back[image, index[image]] = x[image]
                x, run.places = back, places
        parts = PARTS[type(block).__module__.rpartition(".")[2], type(block).__name__]
        into, attentions, out_of, feed, late = parts(block)
        attended = [attend(attn, into(x, at), given, run.places) for at, attn in attentions]
        branches = [out_of(a["out"], at) for (at, _), a in zip(attentions, attended, strict=True)]
        before, x = x, x + sum(branches)
        if late:
            x = before + feed(before, attended[0]["out"])
        if self.layer in config.drop_at:
            x = self.drop(x, attended, config.drop_ratio[config.drop_at.index(self.layer)])
        return x if late else x + feed(x)

    def drop(self, x, attended, ratio):
        run, prefix = self.run, self.run.prefix
        num_patches = x.shape[1] - prefix
        keep = -int(-(1 - ratio) * num_patches // 1)  # the ceiling
        valid = attended[0]["valid"]
        indices = []
        for image in range(len(x)):
            rows = [score_row(each, image, run, x, valid) for each in attended]
            scores = torch.cat(rows).mean(0)[prefix:]
            if valid is not None:
                scores[~valid[image, prefix:]] = -1e9
            order = scores.detach().argsort(descending=True, stable=True)
            kept = order[:keep].sort().values + prefix
            indices.append(torch.cat([torch.arange(prefix), kept]))
        index = torch.stack(indices)
        run.away.append((x, index, run.places))
        run.places = run.places.gather(1, index)
        return torch.stack([x[image, index[image]] for image in range(len(x))])


def score_row(attended, image, run, x, valid):
    """(H, N): how one query a head attends to every token."""
    if run.scorer == "latent":
        return latent_row(run.head, x[image], None if valid is None else valid[image])
    rows = []
    for logits in attended["logits"]:
        logits = logits[image]
        if run.scorer == "cls":
            row = logits[:, 0]
        else:
            patches = logits[:, run.prefix :]
            if valid is not None:
                patches = patches[:, valid[image, run.prefix :]]
            row = patches.mean(1)
        rows.append(row.softmax(-1))
    return rows[0] if len(rows) == 1 else rows[0] - attended["contrast"] * rows[1]


def latent_row(head, x, valid):
    norm, pool = head
    count, width = pool.num_heads, pool.head_dim
    q = pool.q_norm(pool.q(pool.latent[0]).reshape(count, width))
    k = pool.kv(norm(x[None]))[0, :, : count * width]
    k = pool.k_norm(k.reshape(len(x), count, width))
    logits = torch.einsum("hd,nhd->hn", q, k) * pool.scale
    return (logits if valid is None else logits.masked_fill(~valid, -torch.inf)).softmax(-1)


# ----------------------------------------------------------------- attentions


def attend(attn, y, given, places):
    """Output, logits of each map with all that was added to them, validity of the tokens."""
    kind = (type(attn).__module__.rpartition(".")[2], type(attn).__name__)
    b, n, _ = y.shape
    q, k, v = QKV.get(kind, fused)(attn, y)
    full = given.get("rope"), given.get("rope_cos")
    if full[0] is not None:
        q, k = (rope(attn, heads, full[0], places) for heads in (q, k))
    if full[1] is not None:
        sin = given["rope_sin"].gather(1, places[..., None].expand(-1, -1, q.shape[-1]))
        cos = full[1].gather(1, places[..., None].expand(-1, -1, q.shape[-1]))
        q, k = (two_axes(heads, sin[:, None], cos[:, None]) for heads in (q, k))
    if k.shape[1] < q.shape[1] and v.shape[1] == k.shape[1]:
        group = q.shape[1] // k.shape[1]
        k, v = (torch.stack([t[:, h // group] for h in range(q.shape[1])], 1) for t in (k, v))
    added, valid = biases(attn, given, places)
    scale = getattr(attn, "scale", 1.0)
    if hasattr(attn, "_compute_lambda"):
        lam = attn._compute_lambda()
        q, k = (t.reshape(b, attn.num_heads, 2, n, -1) for t in (q, k))
        logits = [q[:, :, m] @ k[:, :, m].transpose(-2, -1) * scale + added for m in (0, 1)]
        maps = logits[0].softmax(-1) - lam * logits[1].softmax(-1)
        out = attn.sub_norm(maps @ v) * (1 - attn.lambda_init)
    else:
        lam, logits = None, [q @ k.transpose(-2, -1) * scale + added]
        out = logits[0].softmax(-1) @ v
    out = out.transpose(1, 2).reshape(b, n, -1)
    if hasattr(attn, "in_proj"):  # attention and MLP in one: `side_by_side` goes on
        return dict(out=out, logits=logits, contrast=lam, valid=valid)
    if not hasattr(attn, "relative_position_bias_table") and hasattr(attn, "norm"):
        out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(y).sigmoid()
    out = (attn.o_proj if hasattr(attn, "o_proj") else attn.proj)(out)
    return dict(out=out, logits=logits, contrast=lam, valid=valid)


def heads(t, count):
    return t.reshape(*t.shape[:2], count, -1).transpose(1, 2)


def fused(attn, y):
    if attn.qkv is None:
        q, k, v = attn.q_proj(y), attn.k_proj(y), attn.v_proj(y)
        counts = attn.num_heads, *[getattr(attn, "num_kv_heads", attn.num_heads)] * 2
        q, k, v = (heads(t, c) for t, c in zip((q, k, v), counts, strict=True))
    else:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        qkv = F.linear(y, attn.qkv.weight, bias)
        q, k, v = (heads(t, attn.num_heads) for t in qkv.chunk(3, -1))
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    return q, k, v


def differential(attn, y):
    q, k, v = attn.qkv(y).chunk(3, -1)
    q, k = heads(q, 2 * attn.num_heads), heads(k, 2 * attn.num_heads)
    return attn.q_norm(q), attn.k_norm(k), heads(v, attn.num_heads)


def joint(block, y):
    _, q, k, v = block.in_proj(y).split(block.in_split, -1)
    count = block.num_heads * (2 if hasattr(block, "sub_norm") else 1)
    q, k = heads(q, count), heads(k, count)
    return block.q_norm(q), block.k_norm(k), heads(v, block.num_heads)


def gemma(attn, y):
    q, k, v = attn.q_proj(y), attn.k_proj(y), attn.v_proj(y)
    q, k, v = heads(q, attn.num_heads), heads(k, attn.num_kv_heads), heads(v, attn.num_kv_heads)
    return attn.q_norm(q), attn.k_norm(k), attn.v_norm(v)


QKV = {
    ("diff_attention", "DiffAttention"): differential,
    ("vision_transformer", "ParallelScalingBlock"): joint,
    ("vision_transformer", "DiffParallelScalingBlock"): joint,
    ("gemma4_vit", "Gemma4Attention"): gemma,
}


def rope(attn, t, table, places):
    """Patches turned by the rows of their places; the prefix tokens not."""
    prefix, out = attn.num_prefix_tokens, t.clone()
    for image in range(len(t)):
        own = table[image] if table.dim() == 4 else table
        rows = own[..., places[image, prefix:] - prefix, :]
        sin, cos = rows.chunk(2, -1)
        x = t[image, :, prefix:]
        if getattr(attn, "rotate_half", False):
            first, second = x.chunk(2, -1)
            other = torch.cat([-second, first], -1)
        else:
            other = torch.empty_like(x)
            other[..., 0::2], other[..., 1::2] = -x[..., 1::2], x[..., 0::2]
        out[image, :, prefix:] = x * cos + other * sin
    return out


def two_axes(t, sin, cos):
    """Gemma: each half of a head is turned by one axis, half against half."""
    parts = []
    for part, s, c in zip(t.chunk(2, -1), sin.chunk(2, -1), cos.chunk(2, -1), strict=True):
        first, second = part.chunk(2, -1)
        parts.append(part * c + torch.cat([-second, first], -1) * s)
    return torch.cat(parts, -1)


def biases(attn, given, places):
    """What is added to the logits of the tokens at `places`; which of them are no padding."""
    full = 0.0
    if getattr(attn, "relative_position_bias_table", None) is not None:
        table, index = attn.relative_position_bias_table, attn.relative_position_index
        full = full + table[index.reshape(-1)].reshape(*index.shape, -1).permute(2, 0, 1)[None]
    elif getattr(attn, "rel_pos", None) is not None:
        full = full + attn.rel_pos.get_bias()
    for name in ("shared_rel_pos_bias", "shared_rel_pos"):
        if given.get(name) is not None:
            full = full + given[name]
    mask = given.get("attn_mask")
    if mask is not None:
        full = full + mask
    if isinstance(full, float):
        return 0.0, None
    full = full[(None,) * (4 - full.dim())]
    added = []
    for image, at in enumerate(places):
        own = full[image if len(full) > 1 else 0]
        added.append(own[:, :, at] if own.shape[1] == 1 else own[:, at][:, :, at])
    added = torch.stack(added)
    if mask is None:
        return added, None
    own = added[:, 0, 0] if added.shape[2] == 1 else added[:, 0].diagonal(dim1=1, dim2=2)
    return added, own > -1e30


# ----------------------------------------------------------------- blocks
# Each gives: the attention's input, its attentions by number, what is added of an attention's
# output, what the MLP adds, and whether the MLP stands beside the attention, on the same tokens.


def pre_norm(block):
    ls1, ls2 = (getattr(block, name, nn.Identity()) for name in ("ls1", "ls2"))
    gammas = [getattr(block, name, None) for name in ("gamma_1", "gamma_2")]
    g1, g2 = (1.0 if gamma is None else gamma for gamma in gammas)
    return (
        lambda x, _: block.norm1(x),
        [(0, block.attn)],
        lambda out, _: g1 * ls1(out),
        lambda x: g2 * ls2(block.mlp(block.norm2(x))),
        False,
    )


def post_norm(block):
    return (
        lambda x, _: x,
        [(0, block.attn)],
        lambda out, _: block.norm1(out),
        lambda x: block.norm2(block.mlp(x)),
        False,
    )


def twofold(block):
    return (
        lambda x, at: block.attns[at].norm(x),
        list(enumerate(part.attn for part in block.attns)),
        lambda out, at: block.attns[at].ls(out),
        lambda x: sum(ffn.ls(ffn.mlp(ffn.norm(x))) for ffn in block.ffns),
        False,
    )


def side_by_side(block):
    def both(x, out):
        hidden = block.in_proj(block.in_norm(x))[..., : block.in_split[0]]
        if block.mlp_bias is not None:
            hidden = hidden + block.mlp_bias
        hidden = block.mlp_act(hidden)
        if getattr(block, "out_proj", None) is not None:
            return block.ls(block.out_proj(torch.cat([out, hidden], -1)))
        return block.ls(block.attn_out_proj(out) + block.mlp_out_proj(hidden))

    return lambda x, _: block.in_norm(x), [(0, block)], lambda out, _: 0.0, both, True


def sandwich(block):
    return (
        lambda x, _: block.norm1(x),
        [(0, block.attn)],
        lambda out, _: block.norm2(out),
        lambda x: block.norm4(block.mlp(block.norm3(x))),
        False,
    )


PARTS = {
    ("vision_transformer", "Block"): pre_norm,
    ("vision_transformer", "ResPostBlock"): post_norm,
    ("vision_transformer", "ParallelThingsBlock"): twofold,
    ("vision_transformer", "ParallelScalingBlock"): side_by_side,
    ("vision_transformer", "DiffParallelScalingBlock"): side_by_side,
    ("eva", "EvaBlock"): pre_norm,
    ("eva", "EvaBlockPostNorm"): post_norm,
    ("beit", "Block"): pre_norm,
    ("vision_transformer_relpos", "RelPosBlock"): pre_norm,
    ("vision_transformer_relpos", "ResPostRelPosBlock"): post_norm,
    ("deepseek_vit", "DeepseekVitBlock"): pre_norm,
    ("gemma4_vit", "Gemma4Block"): sandwich,
}
