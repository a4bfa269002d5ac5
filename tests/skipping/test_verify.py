"""verify finds each thing that could go wrong, on a package in which just that does."""

import timm
import torch
from pytest import fixture, mark, raises
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import skipvit_kernels as sk
from skipvit_kernels.skipping import verify as module
from skipvit_kernels.skipping.families.vit import ViT
from skipvit_kernels.skipping.run import Drop

TEXT = "2(50%)+4"


def vit(**options):
    sizes = dict(img_size=48, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=7)
    return VisionTransformer(**{**sizes, **options})


@fixture
def model():
    return vit(drop_path_rate=0.2, proj_drop_rate=0.2, attn_drop_rate=0.2)


@mark.parametrize(
    "text", [TEXT, "1,2(30%,30%)+4:mean", "2(45%)+fused", "1-3(3p)+4:merge,score=similar", ""]
)
def test_the_report(model, text):
    report = sk.verify(model, text)
    assert report.identical and report.train_difference == report.tolerance == 0
    assert report.num_gradients == 1 + len(list(model.parameters()))
    assert list(report.token_counts) == sk.SkipConfig.parse(text).token_counts(4, 36)


def test_a_lossless_last_block_is_within_the_rounding(model):
    report = sk.verify(model, "2(50%)+4:cls,score=random")
    assert not report.identical and report.token_counts[-1] == (37, 1)
    # A backward of 4 layers rounds by some steps of float32; a step of 2^-23 is the least.
    assert 0 < report.train_difference <= report.train_tolerance < 1e-4


def test_nothing_is_left_changed(model):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.inference_mode():
        sk.verify(model, TEXT + ":score=random", images=torch.zeros(1, 3, 48, 48))
    torch.manual_seed(7)
    sk.verify(model, TEXT)
    assert not torch.equal(state, torch.get_rng_state())  # not its own seed either
    torch.set_rng_state(state)
    sk.verify(model, TEXT)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_what_is_not_trained_has_no_gradient(model):
    model.blocks.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sk.verify(model, TEXT).num_gradients == 1 + len(trained)


def test_two_outputs_in_training():
    sizes = dict(img_size=48, patch_size=8, embed_dim=48, depth=4, num_heads=3)
    model = timm.create_model("deit_tiny_distilled_patch16_224", **sizes)
    model.set_distilled_training(True)
    assert sk.verify(model, TEXT).identical


# ----------------------------------------------------------- what it is there to find


def test_an_output_in_training_that_differs(model, monkeypatch):
    """Other random numbers than the unpatched model draws."""
    feed = ViT.feed

    def drawing(block, x):
        torch.rand(1)
        return feed(block, x)

    monkeypatch.setattr(ViT, "feed", staticmethod(drawing))
    with raises(RuntimeError, match=r"2\(0%\)\+4 must give, in training, the output of"):
        sk.verify(model, TEXT)
    assert sk.verify(vit(), TEXT).identical  # draws nothing


def test_a_gradient_that_differs(monkeypatch):
    def feed(block, x):
        return x + block.mlp(block.norm2(x.detach()))

    monkeypatch.setattr(ViT, "feed", staticmethod(feed))
    with raises(RuntimeError, match=r"the gradient of images .* of its norm, got a difference"):
        sk.verify(vit(), TEXT)
    monkeypatch.setattr(ViT, "feed", staticmethod(lambda block, x: x + block.mlp(block.norm2(x))))
    assert sk.verify(vit(), TEXT).identical


def test_tokens_that_were_not_to_be_there(model, monkeypatch):
    kept = Drop.num_keep
    monkeypatch.setattr(Drop, "num_keep", lambda self, n: min(n - 1, kept(self, n) + 1))
    message = r"2\(50%\)\+4 must work in layer 2 on 37 tokens in the attention and 19 in the MLP, "
    with raises(RuntimeError, match=message + "got 37 and 20"):
        sk.verify(model, TEXT)


def test_keys_that_change(model, monkeypatch):
    def patch(model, config):
        model.register_buffer("count", torch.zeros(1))
        return sk.patch(model, config)

    monkeypatch.setattr(module, "patch", patch)
    with raises(RuntimeError, match=r"state dict's keys, got changes in \['count'\]"):
        sk.verify(model, TEXT)


@mark.parametrize(
    ("leave", "where"),
    [
        (lambda model: model.blocks[1].register_forward_pre_hook(print), "blocks.1"),
        (lambda model: setattr(model.blocks, "config", None), "blocks"),
        (lambda model: setattr(model, "norm", nn.LayerNorm(48)), "norm"),
        (lambda model: setattr(model.head, "__class__", nn.LazyLinear), "head"),
    ],
)
def test_an_unpatch_that_leaves_something(model, monkeypatch, leave, where):
    def unpatch(model):
        leave(sk.unpatch(model))
        return model

    monkeypatch.setattr(module, "unpatch", unpatch)
    with raises(RuntimeError, match=rf"the model's modules, got others: \['{where}'\]"):
        sk.verify(model, TEXT)
