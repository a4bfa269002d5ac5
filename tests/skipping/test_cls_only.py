"""The lossless last block, `cls_only_last_block`, against the unpatched model."""

import copy
import functools
import pickle

import pytest
import timm
import torch
from test_patch import MODELS, distilled, everything_about, vit
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import skipvit_kernels as sk

READS_CLS = {
    name: make for name, make in MODELS.items() if "pool" not in name and "no CLS" not in name
}


@pytest.fixture(params=READS_CLS.values(), ids=READS_CLS)
def model(request):
    return request.param().eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 48, 48)


def output_and_gradients(model, images):
    output = model(images)
    return output, torch.autograd.grad(output.square().sum(), list(model.parameters()))


@pytest.mark.parametrize("text", ["", "6(55%)+11:mean", "5(40%)+12", "6(45%)+fused", "6(55%)"])
def test_logits_and_gradients_are_those_of_the_whole_last_block(model, images, text):
    """In double: rounding alone may differ, by some steps of 2e-16 relative to the largest."""
    model, images = model.double(), images.double()
    config = sk.SkipConfig.parse(text)
    expected, wanted = output_and_gradients(sk.patch(model, config), images)
    sk.unpatch(model)
    got, grads = output_and_gradients(sk.patch(model, config, cls_only_last_block=True), images)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    # Some gradients are 0 but for rounding: a bias of k_norm shifts all logits of a softmax.
    largest = max(float(want.abs().max()) for want in wanted)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-14 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("text", [":cls", "6(55%)+11:cls", "6(45%)+fused:cls"])
def test_verify_measures_the_rounding(model, text, dtype):
    report = sk.verify(model.to(dtype), text)
    assert report.max_difference <= report.tolerance < 0.1
    assert type(model) in (VisionTransformer, timm.models.deit.VisionTransformerDistilled)


def test_verify_catches_a_last_block_that_differs():
    model = vit(init_values=0.3).eval()
    model.blocks[-1].attn.forward = lambda x, attn_mask=None, is_causal=False: x
    with pytest.raises(RuntimeError, match="VisionTransformer with :cls must agree"):
        sk.verify(model, ":cls")


@pytest.mark.parametrize("make", [vit, distilled], ids=["one head", "distilled"])
@pytest.mark.parametrize("text", ["", ":cls", "6(55%)+11", "6(55%)+11:cls", "6(45%)+fused:cls"])
def test_the_work_done_is_the_work_counted(make, images, text):
    """Every multiply-accumulate that torch counts; the scores of CLS are left out by both."""
    model = sk.patch(make().eval(), text)
    for block in model.blocks:
        block.attn.fused_attn = False  # torch 2.11 does not count a CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() == 2 * len(images) * sk.macs(model, text)


def test_each_part_of_the_last_block_sees_what_the_config_counts(images):
    for model, rows in ((vit(), 1), (distilled(), 2), (vit(reg_tokens=4), 1)):
        seen = {}
        sk.patch(model, "6(55%)+11:cls")
        for part in ("norm1", "attn.proj", "mlp"):
            model.blocks[-1].get_submodule(part).register_forward_pre_hook(
                lambda m, args, part=part, seen=seen: seen.update({part: args[0].shape[1]})
            )
        model(images)
        everything = 36 + model.num_prefix_tokens
        assert seen == {"norm1": everything, "attn.proj": rows, "mlp": rows}
        counts = model.blocks.config.token_counts(12, 36, model.num_prefix_tokens, rows)
        assert counts[-1] == (everything, rows) and counts[-2] == (everything, everything)


def test_unpatch_gives_back_exactly_the_model(model, images):
    before, expected = everything_about(model), model(images)
    names = list(model.state_dict())
    sk.patch(model, "4,7(30%,30%)+10:cls")
    assert list(model.state_dict()) == names and isinstance(model, VisionTransformer)
    assert sk.is_patched(model) and not torch.equal(model(images), expected)
    sk.unpatch(model)
    assert everything_about(model) == before
    assert torch.equal(model(images), expected)
    assert model.forward_features(images).shape[1] == 36 + model.num_prefix_tokens


def test_it_stays_on_during_the_warm_up(images):
    model = vit().eval()
    dense = model(images)
    sk.patch(model, "6(55%)+11", warmup_epochs=2, cls_only_last_block=True)
    rows = []
    model.blocks[-1].mlp.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[1]))
    torch.testing.assert_close(model(images), dense, rtol=1e-4, atol=1e-5)
    sk.set_epoch(model, 2)
    assert not torch.allclose(model(images), dense, rtol=1e-4, atol=1e-5)
    assert rows == [1, 1]
    sk.set_epoch(model, 0)
    with pytest.raises(RuntimeError, match="layer 12 computes only what the head reads"):
        model.blocks[-1](torch.randn(1, 37, 48))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_patched_and_independent(images, clone):
    model = sk.patch(distilled().eval(), "4,7(30%,30%)+10:cls")
    other = clone(model)
    assert type(other) is type(model) and torch.equal(other(images), model(images))
    sk.unpatch(other)
    assert other.forward_features(images).shape[1] == 38 and sk.is_patched(model)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("text", [":cls", "6(55%)+11:cls", "6(45%)+fused:cls"])
def test_gradient_checkpointing(images, text, reentrant, monkeypatch):
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant)
    model = sk.patch(vit(drop_path_rate=0.2), text).train()
    images.requires_grad_()
    torch.manual_seed(5)
    expected, wanted = output_and_gradients(model, images)
    model.set_grad_checkpointing()
    torch.manual_seed(5)
    output = model(images)
    output.square().sum().backward()
    assert torch.equal(output, expected)
    for parameter, want in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(parameter.grad, want)


def test_drop_path_draws_what_the_unpatched_model_draws(images):
    model = vit(drop_path_rate=0.5).double().train()
    torch.manual_seed(1)
    expected = model(images.double())
    sk.patch(model, "", cls_only_last_block=True)
    torch.manual_seed(1)
    torch.testing.assert_close(model(images.double()), expected, rtol=1e-12, atol=1e-13)


def test_eager_attention_is_respected(images):
    model = vit().double().eval()
    for block in model.blocks:
        block.attn.fused_attn = False
    expected = model(images.double())
    sk.patch(model, ":cls")
    torch.testing.assert_close(model(images.double()), expected, rtol=1e-12, atol=1e-13)


def test_compile_and_export_are_one_graph(images):
    model = sk.patch(vit(), "6(55%)+11:mean,cls").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (3, 2):
        got, want = compiled(images[:batch]), model(images[:batch])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        got.sum().backward()
    program = torch.export.export(model.eval(), (images,))
    torch.testing.assert_close(program.module()(images), model(images))


def test_autocast(images):
    model = sk.patch(vit(), ":cls").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
    output.float().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


# ------------------------------------------------------------------------------ refusals


def my_model():
    class MyViT(VisionTransformer):
        pass

    return MyViT(img_size=48, patch_size=8, embed_dim=48, depth=12, num_heads=3)


def low_rank():
    model = vit()
    model.blocks[-1].attn.qkv = nn.Sequential(model.blocks[-1].attn.qkv)
    return model


def hooked(register):
    model = vit()
    getattr(model.blocks[-1].attn.qkv, register)(lambda *args: None)
    return model


def own_linear():
    class LoRA(nn.Linear):
        pass

    model = vit()
    model.blocks[-1].attn.qkv.__class__ = LoRA
    return model


REFUSED = {
    "average pool": (
        lambda: vit(global_pool="avg"),
        ":cls",
        'cls_only_last_block needs a head that reads CLS only, global_pool="token", got '
        "global_pool='avg'",
    ),
    "no pool": (lambda: vit(global_pool=""), ":cls", "cls_only_last_block needs a head that reads"),
    "map": (lambda: vit(global_pool="map"), ":cls", "cls_only_last_block needs a head that reads"),
    "unknown head": (my_model, ":cls", "cls_only_last_block needs a timm VisionTransformer or"),
    "adapter": (low_rank, ":cls", "cls_only_last_block reads the query's part of attn.qkv.weight"),
    **{
        register: (
            functools.partial(hooked, register),
            ":cls",
            "cls_only_last_block reads the query's part of attn.qkv.weight",
        )
        for register in (
            *("register_forward_pre_hook", "register_forward_hook"),
            *("register_full_backward_pre_hook", "register_full_backward_hook"),
        )
    },
    "subclass": (own_linear, ":cls", "cls_only_last_block reads the query's part of attn.qkv.weig"),
    "drop in the last layer": (
        vit,
        "12(50%):cls",
        "drop_at must be below 12, the last layer, with cls_only_last_block: only the CLS row "
        "leaves it; got (12,)",
    ),
}


@pytest.mark.parametrize(("make", "text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_lossless_is_refused(make, text, message):
    model = make()
    before = everything_about(model)
    with pytest.raises(ValueError) as caught:
        sk.patch(model, text)
    assert str(caught.value).startswith(message)
    assert everything_about(model) == before


def test_callers_that_want_other_tokens_are_refused(images):
    model = sk.patch(vit().eval(), ":cls")
    with pytest.raises(RuntimeError, match="forward_features gives every token, and cls_only"):
        model.forward_features(images)
    for call in (
        lambda: model(images, attn_mask=torch.ones(37, 37, dtype=torch.bool)),
        lambda: model.blocks[-1](torch.randn(1, 37, 48)),
    ):
        with pytest.raises(RuntimeError, match=r"layer 12 computes only what the head .* unpatch"):
            call()
    model.reset_classifier(5, "avg")
    with pytest.raises(ValueError, match="needs a head that reads CLS only"):
        model(images)
