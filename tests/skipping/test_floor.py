"""The sliced floor: the same tokens in the same blocks, with the selection for free."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import skipvit_kernels as sk
from skipvit_kernels.skipping import scorers
from skipvit_kernels.skipping.floor import sliced

CONFIGS = ("6(55%)+11", "6(55%)+11:mean", "4,7(30%,30%)+10", "6(45%)+fused", "5(40%)", "")


def make_model():
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=4, num_classes=10, embed_dim=32, depth=12, num_heads=2
    )


def tokens_seen(model):
    """Per block what its attention and its MLP work on in one forward."""
    seen = {}
    handles = [
        part.register_forward_pre_hook(
            lambda _, args, at=(number, name): seen.__setitem__(at, args[0].shape[1])
        )
        for number, block in enumerate(model.blocks._modules.values())
        for name, part in (("attention", block.norm1), ("mlp", block.norm2))
    ]
    model(torch.randn(2, 3, 32, 32))
    for handle in handles:
        handle.remove()
    return [(seen[number, "attention"], seen[number, "mlp"]) for number in range(12)]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_floor_works_on_the_tokens_that_the_config_counts(config):
    counted = [tuple(count) for count in sk.SkipConfig.parse(config).token_counts(12, 64)]
    assert tokens_seen(sliced(make_model(), config)) == counted


@pytest.mark.parametrize("config", ["6(55%)+11", "4,7(30%,30%)+10", "5(40%)"])
def test_the_floor_is_the_patched_model_that_chose_the_first_patches(config, monkeypatch):
    def first_patches(q, k, *, scale, num_prefix_tokens):
        patches = k.shape[2] - num_prefix_tokens
        return torch.arange(patches, 0.0, -1.0).expand(k.shape[0], -1)

    monkeypatch.setattr(scorers, "cls_scores", first_patches)
    model = make_model()
    floor, patched = sliced(model, config), sk.patch(model, config)
    images = torch.randn(3, 3, 32, 32)
    ours, expected = floor(images), patched(images)
    torch.testing.assert_close(ours, expected)
    ours.square().sum().backward()
    expected.square().sum().backward()
    for ours, expected in zip(floor.parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def test_the_floor_of_a_patched_model_in_warm_up_drops_all_the_same():
    model = sk.patch(make_model(), "6(45%)+fused", warmup_epochs=3)
    floor = sliced(model, sk.SkipConfig.parse("6(55%)+11:warmup=15"))
    assert tokens_seen(floor)[6] == (30, 30)
    assert tokens_seen(model) == [(65, 65)] * 12
    assert model.blocks.config == sk.SkipConfig.parse("6(45%)+fused:warmup=3")


def test_the_floor_can_be_moved_and_stays_one_under_checkpointing():
    floor = sliced(make_model(), "6(55%)+11").double().train()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = floor(images)
    floor.set_grad_checkpointing()
    assert torch.equal(floor(images), expected)
    patched = sk.patch(make_model().double(), "6(55%)+11").train()
    assert not torch.allclose(patched(images), expected)
