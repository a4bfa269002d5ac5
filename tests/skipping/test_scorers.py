"""Who stays: the scorers that need no attention; the others stand in test_patch.py's SkipViT."""

import pytest
import torch
from test_patch import vit

import skipvit_kernels as sk


@pytest.fixture
def images():
    return torch.randn(3, 3, 48, 48)


def kept(model, images):
    with sk.record_skips(model) as records:
        model(images)
    return records[0].kept()


def test_chance_is_torchs_and_every_image_has_its_own(images):
    model = sk.patch(vit().eval(), "6(55%)+11:score=random")
    torch.manual_seed(7)
    first, second = kept(model, images), kept(model, images)
    torch.manual_seed(7)
    assert torch.equal(kept(model, images), first) and not torch.equal(second, first)
    assert len({tuple(row.tolist()) for row in first}) == 3
    assert first.sum(1).tolist() == [18] * 3 and bool(first[:, 0].all())


def test_chance_prefers_no_patch():
    """4,000 draws of 17 of 36: each patch is kept 1,889 times, give or take five deviations."""
    model = sk.patch(vit(depth=2).eval(), "1(55%)+2:score=random")
    times = kept(model, torch.zeros(4000, 3, 48, 48))[:, 1:].sum(0)
    deviation = (4000 * 17 / 36 * 19 / 36) ** 0.5
    assert float((times - 4000 * 17 / 36).abs().max()) < 5 * deviation


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_draws_the_same_patches(images, reentrant, monkeypatch):
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant)
    model = sk.patch(vit(), "6(55%)+11:score=random").train()
    images.requires_grad_()

    def grads():
        torch.manual_seed(5)
        model.zero_grad()
        model(images).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = grads()
    model.set_grad_checkpointing()
    assert all(torch.equal(got, want) for got, want in zip(grads(), expected, strict=True))


def test_the_largest_keys_stay(images):
    """Scaled up, the keys of ten patches are the longest whatever CLS thinks of them."""
    model = vit().eval()
    chosen = torch.arange(3, 33, 3) + 1
    model.blocks[5].attn.qkv.register_forward_hook(
        lambda _, args, qkv: qkv.index_add(
            1, chosen, 100 * torch.ones_like(qkv[:, chosen]) * (torch.arange(144) // 48 == 1)
        )
    )
    found = kept(sk.patch(model, "6(70%)+11:score=norm"), images)
    assert bool(found[:, chosen].all()) and found.sum(1).tolist() == [12] * 3
