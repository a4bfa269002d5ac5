"""STViT and STViT-R under timm: published costs, the model interface, refusals.

What the models compute is held elsewhere: the windows of Swin in test_stvit_swin.py.
"""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import skipvit_kernels.models  # noqa: F401  (registers the names)

DEIT = "stvit_deit_small_patch16_224"
SWIN = "stvit_swin_tiny_patch4_window7_224"
STVIT_R = "stvit_r_swin_small_patch4_window7_224"
TINY_SWIN = dict(embed_dim=12, num_heads=(1, 2, 4, 8), img_size=224)
TINY = {
    DEIT: dict(embed_dim=24, num_heads=3, depth=6, base_depth=2, img_size=112, patch_size=8),
    SWIN: {**TINY_SWIN, "depths": (1, 1, 5, 1), "base_depth": 1},
    STVIT_R: {**TINY_SWIN, "depths": (1, 1, 6, 1)},
}


def tiny(name, **options):
    """A small model of the kind whose parameters all matter."""
    torch.manual_seed(1)
    model = timm.create_model(name, **{**TINY[name], "num_classes": 5, **options})
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3:  # LayerScale, offset, biases
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(params=TINY)
def name(request):
    return request.param


def images(name, batch=2):
    size = TINY[name]["img_size"]
    return torch.randn(batch, 3, size, size)


def gmacs(name, **options):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        timm.create_model(name, **options).eval()(torch.empty(1, 3, 224, 224))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("generating, published", [(2, 1.91), (3, 1.97), (4, 2.03)])
def test_multiply_accumulates_of_deit_small(generating, published):
    assert round(gmacs(DEIT, generating_depth=generating), 2) == published


@pytest.mark.parametrize(
    "name, published",
    [
        ("stvit_deit_tiny_patch16_224", 0.52),
        ("stvit_deit_base_patch16_224", 7.26),
        ("stvit_swin_tiny_patch4_window7_224", 3.14),
        ("stvit_swin_small_patch4_window7_224", 5.95),
        ("stvit_swin_base_patch4_window7_224", 10.48),
    ],
)
def test_multiply_accumulates(name, published):
    assert gmacs(name) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("size, width, published", [("small", 384, 5.826), ("base", 512, 10.264)])
def test_multiply_accumulates_of_stvit_r_without_projecting_keys_again(size, width, published):
    """The released code projects keys per window that sees them: 4 x 109 rows for 36 + 196."""
    again = 3 * (4 * 109 - (36 + 196)) * 2 * width**2 / 1e9
    ours = gmacs(f"stvit_r_swin_{size}_patch4_window7_224")
    assert ours + again == pytest.approx(published, rel=0.02)
    assert ours < published


def test_parameters_of_the_published_sizes():
    def parameters(name):
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())

    assert parameters("stvit_r_swin_small_patch4_window7_224") == 49_625_518
    assert parameters("stvit_r_swin_base_patch4_window7_224") == pytest.approx(87.8e6, abs=5e4)


def test_classifier_and_features(name):
    model, x = tiny(name), images(name)
    features = model.forward_features(x)
    assert torch.equal(model(x), model.forward_head(features))
    pooled = features.flatten(1, -2).mean(1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    assert model.default_cfg["classifier"] in {name for name, _ in tiny(name).named_modules()}
    assert model.default_cfg["first_conv"] in {name for name, _ in model.named_modules()}


def test_global_centres_and_positions_take_no_weight_decay(name):
    options = {} if name == DEIT else {"form": "paper"}
    model = tiny(name, **options)
    spared = model.no_weight_decay()
    ours = {key for key, _ in model.named_parameters() if key.endswith("global_centres")}
    assert len(ours) == 1 and ours <= spared
    assert (
        "pos_embed" if name == DEIT else "layers.0.blocks.0.attn.relative_position_bias_table"
    ) in spared


def test_checkpointed_gradients_are_those_of_the_plain_step(name):
    x, gradients = images(name), []
    for enable in (False, True):
        model = tiny(name).train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


def test_compiles_to_one_graph_and_exports(name):
    model, x = tiny(name), images(name)
    with torch.no_grad():
        want = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled, want)
        exported = torch.export.export(model, (x,)).module()(x)
        torch.testing.assert_close(exported, want)


def test_maps_of_deit():
    model = tiny(DEIT, features_only=True, out_indices=(1, 2, 3, 5))
    maps = model(images(DEIT))
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 14, 14)] + 3 * [(24, 4, 4)]
    assert model.feature_info.reduction() == [8, 28, 28, 28]
    whole = tiny(DEIT)
    last, (first, semantic) = whole.forward_intermediates(images(DEIT), (2, 5), output_fmt="NLC")
    assert first.shape == semantic.shape == (2, 16, 24)
    torch.testing.assert_close(whole.norm(semantic), last)
    named = whole.forward_intermediates(images(DEIT), (5,), output_dict=True)
    assert named["image_intermediates"][0].shape == (2, 24, 4, 4)


def test_deit_takes_other_sizes():
    model = tiny(DEIT, img_size=(96, 136))
    assert model(torch.randn(1, 3, 96, 136)).shape == (1, 5)
    model.set_input_size((80, 64))
    assert model(torch.randn(1, 3, 80, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    "name, options, message",
    [
        (DEIT, dict(base_depth=5), r"base_depth must be in \[0, 4\], got 5"),
        (DEIT, dict(generating_depth=1), r"generating_depth must be in \[2, 4\], got 1"),
        (DEIT, dict(generating_depth=5), r"generating_depth must be in \[2, 4\], got 5"),
        (DEIT, dict(semantic_grid=15), r"side must be in \[1, 14\], got 15"),
        (DEIT, dict(semantic_grid=9), r"windows of \(14, 14\) .* all hold patches, got 9"),
        (DEIT, dict(pool="mean"), "pool must be 'spatial' or 'max', got 'mean'"),
        (DEIT, dict(class_token=True), "class_token must be False .*, got True"),
        (DEIT, dict(dynamic_img_size=True), "dynamic_img_size must be False .*, got True"),
        (DEIT, dict(qk_norm=True), "qk_norm .* must be False"),
        (DEIT, dict(num_heads=5), "num_heads|divisible"),
        (SWIN, dict(base_depth=5), r"base_depth must be in \[0, 3\], got 5"),
        (SWIN, dict(depths=(2, 6, 2)), r"depths must be 4 stages .*, got \(2, 6, 2\)"),
        (SWIN, dict(semantic_side=8), r"side must be in \[1, 7\], got 8"),
        (SWIN, dict(semantic_side=5), r"windows of \(7, 7\) .* all hold patches, got 5"),
        (SWIN, dict(window_size=0), "window_size must be a positive int, got 0"),
        (SWIN, dict(form="poster"), "form must be one of paper, .*, got 'poster'"),
        (SWIN, dict(pool="mean"), "pool must be 'spatial' or 'max', got 'mean'"),
        (STVIT_R, dict(depths=(1, 1, 8, 1)), r"depths\[2\] must be a multiple of 6 .*, got 8"),
    ],
)
def test_impossible_sizes_are_refused_by_name(name, options, message):
    with pytest.raises((ValueError, AssertionError), match=message):
        tiny(name, **options)


def test_relative_position_over_all_tokens_refuses_other_maps():
    model = tiny(STVIT_R, relative_pos=True)
    with pytest.raises(ValueError, match=r"relative_pos needs \(6, 6\) .*, got \(6, 7\)"):
        model(torch.randn(1, 3, 224, 256))
