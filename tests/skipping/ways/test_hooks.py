"""Hooks on blocks, which FSDP and what looks inside a model live on, fire where a block drops."""

import pytest
import timm
import torch
from skipping.ways import matrix

import skipvit_kernels as sk


@pytest.fixture
def model():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=48, depth=4, num_classes=7
    )


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("2(50%)+4", [(37, 37), (37, 19), (19, 19), (37, 37)]),
        ("1,2(50%,50%)+4:merge", [(37, 19), (19, 10), (10, 10), (37, 37)]),
        ("3(50%):cls", [(37, 37), (37, 37), (37, 19), (19, 1)]),
    ],
)
def test_hooks_on_a_block_that_drops_fire_as_on_any_other(model, text, seen):
    images = torch.randn(2, 3, 48, 48)
    sk.patch(model, text)
    want = model(images)
    there, back, calls = [], [], []

    def forward_hook(module, args, output):
        there.append((args[0].shape[1], output.shape[1]))

    def backward_hook(module, gradient, output_gradient):
        back.append((gradient[0].shape[1], output_gradient[0].shape[1]))

    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: calls.append(module.mlp))
        block.register_forward_hook(forward_hook)
        block.register_full_backward_hook(backward_hook)
    assert torch.equal(model(images), want)
    assert there == seen and calls == [block.mlp for block in model.blocks]
    model(images).sum().backward()
    assert sorted(back) == sorted(seen)
    assert all("forward" not in vars(block) for block in model.blocks)


def test_hooks_on_a_block_that_is_run_by_its_parts_fire():
    """Behind a drop BEiT's bias must follow the tokens, which its block cannot be told."""
    model = sk.patch(matrix.build("BEiT: relative bias"), "2(50%)+4").eval()
    want, seen = model(matrix.images()), []
    for block in model.blocks[:]:
        block.register_forward_hook(lambda m, args, output: seen.append(output.shape[1]))
    assert torch.equal(model(matrix.images()), want) and seen == [37, 19, 19, 37]


def test_a_hook_may_change_what_a_block_that_drops_gives(model):
    images = torch.randn(2, 3, 48, 48)
    sk.patch(model, "2(50%)")
    want = model(images)
    handle = model.blocks[1].register_forward_hook(lambda module, args, output: 2 * output)
    assert not torch.equal(model(images), want)
    handle.remove()
    with pytest.raises(RuntimeError, match="layer 2 drops tokens"):
        model.blocks[1](torch.randn(1, 37, 48))


def test_torchscript_is_refused_by_name(model):
    images = torch.randn(2, 3, 48, 48)
    sk.patch(model.eval(), "2(50%)+4")
    for ask in (torch.jit.script, lambda m: torch.jit.trace(m, images)):
        with pytest.raises(RuntimeError, match=r"2\(50%\)\+4\): use torch\.export"):
            ask(model)
