"""EViT whole, against a plain transcription: several stages, its schedule, counts and files."""

import argparse
import math
from fractions import Fraction

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import skipvit_kernels as sk
from skipvit_kernels.skipping.config import num_kept

# 48 pixels: 36 patches, few enough for loops.
SMALL = dict(img_size=48, patch_size=8, embed_dim=48, depth=12, num_heads=3, num_classes=7)
# Keep rate: tokens behind each of the three stages, CLS included, and GMACs of DeiT-S; fused, not.
TABLE = {
    "0.9": ((179, 163, 148), 4.02, (178, 161, 145), 3.99),
    "0.8": ((159, 129, 105), 3.48, (158, 127, 102), 3.44),
    "0.7": ((140, 100, 72), 3.03, (139, 98, 69), 3.00),
    "0.6": ((120, 74, 46), 2.64, (119, 72, 44), 2.61),
    "0.5": ((100, 52, 28), 2.31, (99, 50, 26), 2.28),
}
ROWS = [
    *((rate, "+fused", row[0], row[1]) for rate, row in TABLE.items()),
    *((rate, "", row[2], row[3]) for rate, row in TABLE.items()),
]
STAGES = [
    "4,7,10(30%,30%,30%)+fused",
    "4,7,10(30%,30%,30%)",
    "2,3,4(10%,30%,50%)+fused",
    "1,2,3,4(50%,50%,50%,50%)+fused",
    "4,7,10(90%,90%,90%)+fused",
    "4,7,10(25t,25t,5t)+fused",
]


def vit(**options):
    torch.manual_seed(3)
    model = VisionTransformer(**{**SMALL, **options}).double().eval()
    for parameter in model.parameters():  # timm starts weights so small that all scores are alike
        if parameter.dim() > 1 and parameter.abs().max() < 0.5:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


MODELS = {
    "CLS": vit,
    "registers": lambda: vit(reg_tokens=4),
    "distilled": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=48, patch_size=8, num_classes=7
    ).double().eval(),
}  # fmt: skip


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(3, 3, 48, 48, dtype=torch.float64)


def plain_evit(state, x, num_heads, config, prefix=1, train_scores=True):
    """Tokens behind the last norm, from a DeiT's state dict and its embedded tokens x (B, N, C)."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    stages = dict(zip(config.drop_at, config.drop_ratio, strict=True))
    for layer in range(1, 13):
        name = f"blocks.{layer - 1}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        b, n, width = x.shape
        q, k, v = qkv.reshape(b, n, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) / (width // num_heads) ** 0.5).softmax(-1)
        out = (attention @ v).transpose(1, 2).reshape(b, n, width)
        x = x + linear(out, f"{name}.attn.proj")
        if layer in stages:
            patches, ratio = n - prefix, stages[layer]
            keep = getattr(ratio, "count", None) or math.ceil((1 - ratio) * patches)
            if keep < patches:
                # Float32 is the contract of scores, and so of what comes back to them.
                scores = attention[:, :, 0, prefix:].mean(1).float().double()
                scores = scores if train_scores else scores.detach()
                x = torch.stack(
                    [reorganise(x[i], scores[i], keep, prefix, config.method) for i in range(b)]
                )
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + linear(hidden, f"{name}.mlp.fc2")
    return norm(x, "norm")


def reorganise(x, scores, keep, prefix, method):
    """One image: kept tokens in descending score, as the official code leaves them."""
    order = sorted(range(len(scores)), key=lambda j: -scores[j].item())
    rows = [x[p] for p in range(prefix)] + [x[prefix + j] for j in order[:keep]]
    if method == "fuse":
        rows.append(sum(scores[j] * x[prefix + j] for j in order[keep:]))
    return torch.stack(rows)


def embed(model, images):
    return model._pos_embed(model.patch_embed(images))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", STAGES)
def test_logits_and_gradients_are_evit(images, name, text):
    model, config = MODELS[name](), sk.SkipConfig.parse(text)
    parameters, prefix = dict(model.named_parameters()), model.num_prefix_tokens
    heads = model.blocks[0].attn.num_heads

    def plain(**options):
        x = plain_evit(parameters, embed(model, images), heads, config, prefix, **options)
        return model.forward_head(x)

    def gradients(logits):
        found = torch.autograd.grad(logits.square().sum(), [*parameters.values()])
        return dict(zip(parameters, found, strict=True))

    want = plain()
    wanted = gradients(want)
    if config.method == "fuse":  # the weights of the sum are trained, and it shows
        untrained = gradients(plain(train_scores=False))
        first = f"blocks.{config.drop_at[0] - 1}.attn.qkv.weight"
        assert (wanted[first] - untrained[first]).norm() > 1e-4 * wanted[first].norm()
    sk.patch(model, config)
    with sk.record_skips(model) as records:
        got = model(images)
    # Float64 throughout, and the float32 of the scores is the same on both sides.
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    for parameter, grad in gradients(got).items():
        error = (grad - wanted[parameter]).norm()
        assert error <= 1e-9 * wanted[parameter].norm() + 1e-11, parameter
    for index in records[0].indices:  # prefix tokens stay, first and in their order
        assert (index[:, :prefix] == torch.arange(prefix)).all()


def test_a_fused_token_is_a_candidate_like_others(images):
    """Some are kept in a later stage, some are not: both ways are among those held to EViT."""
    kept = []
    for text in STAGES:
        if text.endswith("fused"):
            model = sk.patch(vit(), text)
            with sk.record_skips(model) as records:
                model(images)
            kept += [(index == -1).sum(1) for index in records[0].indices[1:]]
    kept = torch.cat(kept)
    assert (kept == 0).any() and (kept == 1).any() and (kept > 1).any()


# --------------------------------------------------------------------- counts and arithmetic


@pytest.fixture(scope="module")
def deit_small():
    return timm.create_model("deit_small_patch16_224").eval()


@pytest.mark.parametrize(("rate", "ending", "tokens", "gmacs"), ROWS)
def test_the_published_rows_of_deit_small(deit_small, rate, ending, tokens, gmacs):
    drop = str(1 - Fraction(rate))
    text = f"4,7,10({drop},{drop},{drop}){ending}"
    expected = [count for count in (197, *tokens) for _ in range(3)]
    assert [count.mlp for count in sk.SkipConfig.parse(text).token_counts(12, 196)] == expected
    assert round(sk.macs(deit_small, text) / 1e9, 2) == gmacs
    assert mlp_tokens(sk.patch(deit_small, text), torch.zeros(1, 3, 224, 224)) == expected
    sk.unpatch(deit_small)


def mlp_tokens(model, images):
    """Tokens that the MLP of each block is given."""
    seen, blocks = [], model.blocks._modules.values()
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for block in blocks
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


def test_fixed_numbers_of_tokens_at_evaluation(images):
    """Whatever the ratios and the schedule in training, and the size of the images."""
    text = "4,7,10(30%,30%,30%)+fused:warmup=10,ramp=100"
    large = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    for size in (images, large):
        model = sk.patch(vit(dynamic_img_size=True), text, tokens=(30, 30, 9))
        # 30 of 36 and a fused one; 30 of these 31, and another; 9 of these 31.
        assert mlp_tokens(model, size) == [1 + size.shape[2] ** 2 // 64] * 3 + [32] * 6 + [11] * 3
        named = sk.patch(vit(dynamic_img_size=True), "4,7,10(30t,30t,9t)+fused")
        assert torch.equal(named(size), model(size))
    assert num_kept(196, sk.SkipConfig(4, "196t").drop_ratio[0]) == 196
    everything = sk.patch(vit(), "4(36t)+fused")
    assert torch.equal(everything(images), vit()(images))


def test_impossible_stages_are_refused_by_name(images):
    text = "4,7,10(30%,30%,30%)+fused"
    with pytest.raises(ValueError, match=r"number for each of the layers \(4, 7, 10\), got 2"):
        sk.patch(vit(), text, tokens=(30, 20))
    with pytest.raises(ValueError, match="at most the 36 patches that are there, got 37t"):
        sk.patch(vit(), text, tokens=(37, 20, 5))(images)
    # A stage that keeps all leaves no fused token behind: 36 again, not 37.
    with pytest.raises(ValueError, match="at most the 36 patches that are there, got 37t"):
        sk.SkipConfig.parse("4,7(36t,37t)+fused").token_counts(12, 36)
    for options, message in [
        ("ramp=100/0", "ramp_stairs must be an integer >= 1, .*, got 0 in 100 epochs"),
        ("ramp=0/4", "ramp_stairs must be .* None without ramp_epochs, got 4 in 0 epochs"),
        ("ramp=", 'options must be .*"warmup=15" or "ramp=100", got \'ramp=\''),
    ]:
        with pytest.raises(ValueError, match=message):
            sk.SkipConfig.parse(f"{text}:{options}")
    with pytest.raises(ValueError, match="with a fixed number of tokens, got 5 and 9t"):
        sk.SkipConfig(4, "9t", ramp_epochs=5)
    with pytest.raises(ValueError, match="ramp_epochs must be an integer >= 0, got -1"):
        sk.SkipConfig(4, 0.5, ramp_epochs=-1)


# ------------------------------------------------------------------------------ the schedule


def rate_at(step, steps, start, length, base):
    """EViT's keep rate of an iteration: 1, then half a cosine down to the base, then that."""
    if step < start * steps:
        return 1.0
    if step >= (start + length) * steps:
        return base
    over = (step - start * steps) / (length * steps)
    return base + (1 - base) * (math.cos(math.pi * over) + 1) / 2


@pytest.mark.parametrize("base", [0.9, 0.7, 0.5])
def test_the_keep_rate_falls_with_every_step_as_evits(base):
    steps, start, length = 37, 2, 5
    drop = round(1 - base, 1)
    config = sk.SkipConfig(4, drop, method="fuse", warmup_epochs=start, ramp_epochs=length)
    counts = []
    for step in range(9 * steps):
        ratio = config.at(step // steps + step % steps / steps).drop_ratio
        counts.append(num_kept(196, ratio[0]) if ratio else 196)
        assert counts[-1] == math.ceil(rate_at(step, steps, start, length, base) * 196)
    assert len(set(counts)) == 196 - counts[-1] + 1  # every count on the way
    assert config.at() == sk.SkipConfig(4, drop, method="fuse")


def test_each_layer_has_a_rate_of_its_own_in_training_too(images):
    text = "4,7,10(10%,30%,50%)+fused:warmup=1,ramp=2"
    model = sk.patch(vit(), text)

    def tokens(epoch):
        sk.set_epoch(model, epoch)
        seen = [mlp_tokens(model.train(mode), images) for mode in (True, False)]
        assert seen[0] == seen[1]
        return seen[0][3::3]

    assert mlp_tokens(model, images) == tokens(0.99) * 4 == tokens(1) * 4 == [37] * 12
    # Halfway 5, 15, 25 %: 35 of 36 and one, 31 of 36 and one, 24 of 32 and one; CLS on top.
    assert tokens(2) == [37, 33, 26]
    # At last 10, 30, 50 %: 33 of 36 and one, 24 of 34 and one, 13 of 25 and one; CLS on top.
    assert tokens(3) == tokens(300) == [35, 26, 15]
    assert tokens(2) == [37, 33, 26]  # a restart
    final = sk.patch(vit(), text.partition(":")[0])
    sk.set_epoch(model, 3)
    assert torch.equal(model(images), final(images))
    assert str(model.blocks.config) == text


def test_stairs_turn_with_the_epochs():
    config = sk.SkipConfig.parse("4,7(40%,8p)+fused:ramp=4/4")
    assert str(config) == "4,7(40%,8p)+fused:ramp=4/4"
    assert [str(config.at(epoch)) for epoch in (0, 0.9, 1, 2, 3, 4)] == [
        *("", "", "4,7(10%,2p)+fused", "4,7(30%,6p)+fused"),
        *("4,7(40%,8p)+fused",) * 2,
    ]


# ---------------------------------------------------------------------------- official files


def official_state():
    """The names and shapes of EViT-DeiT-S's file, at 48 pixels and 48 channels."""
    torch.manual_seed(7)
    shapes = {
        "cls_token": (1, 1, 48),
        "pos_embed": (1, 37, 48),
        "patch_embed.proj.weight": (48, 3, 8, 8),
        "patch_embed.proj.bias": (48,),
        "norm.weight": (48,),
        "norm.bias": (48,),
        "head.weight": (7, 48),
        "head.bias": (7,),
    }
    for layer in range(12):
        parts = {
            **{"norm1.weight": (48,), "norm1.bias": (48,)},
            **{"attn.qkv.weight": (144, 48), "attn.qkv.bias": (144,)},
            **{"attn.proj.weight": (48, 48), "attn.proj.bias": (48,)},
            **{"norm2.weight": (48,), "norm2.bias": (48,)},
            **{"mlp.fc1.weight": (192, 48), "mlp.fc1.bias": (192,)},
            **{"mlp.fc2.weight": (48, 192), "mlp.fc2.bias": (48,)},
        }
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in parts.items()}
    return {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("patched", [False, True], ids=["before patching", "behind it"])
def test_official_checkpoints_load(images, tmp_path, patched):
    """What the official training script saves: weights, their average, and how they came to be."""
    state, average = official_state(), official_state()
    average["head.bias"] += 1
    saved = {
        **{"model": state, "model_ema": average, "optimizer": {"state": {}}, "epoch": 299},
        **{"lr_scheduler": {"last_epoch": 299}, "args": argparse.Namespace(base_keep_rate=0.7)},
    }
    torch.save(saved, tmp_path / "evit.pth")
    config = sk.SkipConfig.parse("4,7,10(30%,30%,30%)+fused")
    model = timm.create_model("deit_small_patch16_224", **SMALL).eval()
    if patched:
        sk.patch(model, config)
    timm.models.load_checkpoint(model, str(tmp_path / "evit.pth"), use_ema=False)  # strict
    if not patched:
        sk.patch(model, config)
    state = {name: value.double() for name, value in state.items()}
    patches = torch.nn.functional.conv2d(images, state["patch_embed.proj.weight"], stride=8)
    patches = patches.flatten(2).transpose(1, 2) + state["patch_embed.proj.bias"]
    cls = state["cls_token"].expand(len(images), -1, -1)
    x = plain_evit(
        state, torch.cat([cls, patches], 1) + state["pos_embed"], SMALL["num_heads"], config
    )
    logits = x[:, 0] @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(model.double()(images), logits, rtol=1e-9, atol=1e-10)
