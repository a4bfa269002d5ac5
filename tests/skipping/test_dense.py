"""What is between a drop and its rejoin, in full length: taps, +end; and patches that stay."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import skipvit_kernels as sk


def vit(**options):
    torch.manual_seed(3)
    model = VisionTransformer(
        **{
            **dict(img_size=48, patch_size=8, embed_dim=48, depth=8, num_heads=3, num_classes=7),
            **options,
        }
    )
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def images():
    torch.manual_seed(5)
    return torch.randn(3, 3, 48, 48)


def input_of(model, layer, images):
    """(B, N, C) that the given layer attends to."""
    seen = []
    block = list(model.blocks._modules.values())[layer - 1]
    handle = block.norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(images)
    handle.remove()
    return seen[0]


def drops_of(text):
    return text.partition("+")[0]


TEXTS = ["3(55%)+7", "3(55%)+7:mean", "2,4(30%,30%)+7", "3(55%)", "3(55%)+end", "8(50%)+end"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"class_token": False}], ids=str)
def test_a_tap_gives_what_a_rejoin_there_would(images, text, options):
    if options.get("class_token") is False:
        options = {**options, "global_pool": "avg"}
    model = vit(**options)
    config = sk.SkipConfig.parse(text)
    last_drop, mean = config.drop_at[-1], config.rejoin_update == "mean"
    expected = {}
    for layer in range(1, 8):  # what the next layer is given, rejoined just before it
        drops = [at for at in config.drop_at if at <= layer]
        rejoin = layer + 1
        there = ""
        if drops and not (isinstance(config.rejoin_at, int) and rejoin >= config.rejoin_at):
            ratios = config.drop_ratio[: len(drops)]
            update = config.rejoin_update
            there = sk.SkipConfig(tuple(drops), ratios, rejoin, rejoin_update=update)
        elif drops:
            there = config
        routed = sk.patch(copy.deepcopy(model), there)
        expected[layer - 1] = input_of(routed, rejoin, images)
    sk.patch(model, config)
    final, taps = model.forward_intermediates(images, norm=False, output_fmt="NLC")
    prefix = model.num_prefix_tokens
    assert len(taps) == 8
    for layer, tokens in expected.items():
        assert torch.equal(taps[layer], tokens[:, prefix:]), layer
    whole = config if isinstance(config.rejoin_at, int) else f"{drops_of(text)}+end"
    dense = sk.patch(sk.unpatch(copy.deepcopy(model)), whole).forward_features(images)
    assert torch.equal(final, dense) and final.shape[1] == 36 + prefix
    assert last_drop <= 8 and mean == text.endswith("mean")


def test_every_way_to_tap(images):
    model = sk.patch(vit(), "3(55%)+7")
    _, taps = model.forward_intermediates(images)
    assert [tuple(tap.shape) for tap in taps] == [(3, 48, 6, 6)] * 8
    some = model.forward_intermediates(
        images, indices=[2, 4], stop_early=True, intermediates_only=True
    )
    assert torch.equal(some[0], taps[2]) and torch.equal(some[1], taps[4])
    layers = model.get_intermediate_layers(images, n=[3], reshape=True)
    assert torch.equal(layers[0], taps[3])
    for clone in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        other = clone(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        assert torch.equal(other.forward_intermediates(images)[1][4], taps[4])
        model = other
    model.train().set_grad_checkpointing()
    grads = torch.autograd.grad(model.forward_intermediates(images)[1][4].sum(), model.pos_embed)
    model.set_grad_checkpointing(False)
    again = torch.autograd.grad(model.forward_intermediates(images)[1][4].sum(), model.pos_embed)
    assert torch.equal(grads[0], again[0])
    with sk.record_skips(model) as records:
        model.forward_intermediates(images)
    assert [record.kept().sum().item() for record in records] == [3 * 18]
    sk.unpatch(model)
    assert "forward_intermediates" not in vars(model)


def test_taps_of_a_warm_up_and_of_a_lossless_last_block_are_the_unpatched_ones(images):
    model = vit()
    expected, taps = model.forward_intermediates(images)
    sk.patch(model, "3(55%)+7:cls", warmup_epochs=1)
    got, more = model.forward_intermediates(images)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(more[:7], taps[:7], strict=True))


def test_features_only(images):
    backbone = timm.create_model(
        "vit_tiny_patch16_224", features_only=True, img_size=64, out_indices=(3, 6, 11)
    ).eval()
    dense = backbone(torch.randn(2, 3, 64, 64))
    sk.patch(backbone.model, "5(50%)+11")
    got = backbone(torch.randn(2, 3, 64, 64))
    assert [t.shape for t in got] == [t.shape for t in dense]


def test_fused_tokens_have_no_place(images):
    model = sk.patch(vit(), "3(55%)+fused")
    with pytest.raises(RuntimeError, match="fused tokens never rejoin: it needs unpatch"):
        model.forward_intermediates(images)


def test_blocks_between_which_tokens_change_are_refused(images):
    model = sk.patch(vit(), "3(55%)+7")

    def meddled(self, x):
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x) + 1
        return x

    type(model).forward_intermediates, kept = meddled, type(model).forward_intermediates
    try:
        with pytest.raises(RuntimeError, match="what the block before it gave"):
            model.forward_intermediates(images)
    finally:
        type(model).forward_intermediates = kept


# --------------------------------------------------------------------------- forced keep


@pytest.mark.parametrize(
    "text", ["3(55%)+7", "2,4(30%,30%)+7", "3(55%)+fused", "3(30%):score=norm"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_masked_patches_are_never_dropped(images, text, checkpointing):
    model = sk.patch(vit(), text).train()
    with sk.record_skips(model) as records:
        model(images)
    worst = ~records[0].kept()[:, 1:]
    mask = worst & (worst.cumsum(1) <= 5)
    with sk.record_skips(model) as records, sk.keep_patches(model, mask):
        routed = model(images)
    kept = records[0].kept()[:, 1:]
    assert (kept | ~mask).all() and not (kept == ~worst).all()
    assert (records[0].indices[-1] >= 0).sum() == kept.sum() + 3
    wanted = torch.autograd.grad(routed.square().sum(), model.patch_embed.proj.weight)
    if checkpointing:
        model.set_grad_checkpointing()
        with sk.keep_patches(model, mask):
            routed = model(images)
        # The backward recomputes outside of the context, and selects the same.
        got = torch.autograd.grad(routed.square().sum(), model.patch_embed.proj.weight)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    model.set_grad_checkpointing(False)
    with sk.record_skips(model) as records:
        model(images)
    assert torch.equal(~worst, records[0].kept()[:, 1:])


def test_masked_patches_stay_beside_scores_that_are_nan_or_infinite():
    model = sk.patch(vit(), "1(50%)+2:score=norm")
    tokens = torch.randn(1, 37, 48)
    tokens[0, 1:19] = torch.nan
    mask = torch.zeros(1, 36, dtype=torch.bool)
    mask[0, 30:] = True
    with sk.record_skips(model) as records, sk.keep_patches(model, mask):
        model.blocks(tokens)
    assert records[0].kept()[0, 31:].all() and records[0].kept().sum() == 19


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 36), r"mask must be a bool tensor of shape \(B, n\), got torch.float32"),
        (torch.ones(3, 6, 6, dtype=torch.bool), r"got torch.bool \(3, 6, 6\)"),
        (
            torch.ones(3, 36, dtype=torch.bool),
            "at most 19 patches of an image, what layer 4 leaves under .*, got 36: a smaller",
        ),
    ],
)
def test_masks_that_cannot_be_are_refused(images, mask, message):
    model = sk.patch(vit(), "2,4(30%,30%)+7")
    with pytest.raises(ValueError, match=message), sk.keep_patches(model, mask):
        pass
    wrong = torch.zeros(3, 35, dtype=torch.bool)
    expected = r"mask must have shape \(B, 36\), .* got \(3, 35\)"
    with pytest.raises(ValueError, match=expected), sk.keep_patches(model, wrong):
        model(images)
    assert model.blocks.keep is None
    with pytest.raises(ValueError, match="keep_patches needs a patched model"):
        sk.keep_patches(sk.unpatch(model), wrong).__enter__()
