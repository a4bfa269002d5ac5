"""patch on timm's own models, against an independent SkipViT that keeps the attention map."""

import copy
import inspect
import io
import math
import pickle

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

import skipvit_kernels as sk
from skipvit_kernels.skipping import methods
from skipvit_kernels.skipping.config import num_kept
from skipvit_kernels.skipping.sequence import SkipSequential

SMALL = dict(img_size=48, patch_size=8, embed_dim=48, depth=12, num_heads=3, num_classes=7)
CONFIGS = [
    "6(55%)+11",
    "6(55%)+11:mean",
    "4,7(30%,30%)+10",
    "4,7(30%,30%)+10:mean",
    "6(45%)+fused",
    "4,7(30%,30%)+fused",
    "6(55%)",
    "12(50%)",
    "1(50%)+2",
    "6(100%)+11:mean",
    "4,7(30%,30%)+10:score=mean",
    "6(55%)+11:score=norm",
    "6(45%)+fused:score=mean",
]


def vit(**options):
    torch.manual_seed(3)
    model = VisionTransformer(**{**SMALL, **options})
    for parameter in model.parameters():  # timm starts biases, registers and CLS at nearly zero
        if parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.3)
    return model


def gated():
    model = vit()
    for block in model.blocks:
        block.attn = timm.layers.Attention(48, num_heads=3, qkv_bias=True, gated=True)
    return model


def distilled():
    return timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=48, patch_size=8, depth=12, num_classes=7
    )


MODELS = {
    "plain": vit,
    "LayerScale": lambda: vit(init_values=0.3),
    "q/k norm": lambda: vit(qk_norm=True),
    "registers": lambda: vit(reg_tokens=4, no_embed_class=True),
    "scale norms": lambda: vit(scale_attn_norm=True, scale_mlp_norm=True),
    "pre-norm, average pool": lambda: vit(pre_norm=True, global_pool="avg"),
    "distilled": distilled,
    "no CLS, registers": lambda: vit(class_token=False, reg_tokens=2, global_pool="avg"),
    "no prefix, pooling latent": lambda: vit(class_token=False, global_pool="map"),
}
if "gated" in inspect.signature(timm.layers.Attention).parameters:  # timm 1.0.25 and later
    MODELS["gated"] = gated


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    return request.param().eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 48, 48)


def plain_skipvit(model, images, config):
    """SkipViT and EViT as the papers write them: attention maps, sorting, Python loops."""
    prefix = model.num_prefix_tokens
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    away = []  # (tokens as they left, positions of those that stayed, what stayed as it left)
    for layer, block in enumerate(model.blocks, start=1):
        if layer == config.rejoin_at:
            for full, index, before in reversed(away):
                back = full.clone()
                for b in range(len(x)):
                    if config.rejoin_update == "mean" and index.shape[1] > prefix:
                        back[b] += x[b, prefix:].mean(0) - before[b, prefix:].mean(0)
                    back[b, index[b]] = x[b]
                x = back
        if layer not in config.drop_at:
            x = block(x)
            continue
        attn, y = block.attn, block.norm1(x)
        b, n, _ = y.shape
        q, k, _ = attn.qkv(y).reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        scorer = config.scorer or ("cls" if model.cls_token is not None else "mean")
        if scorer == "norm":
            scores = (k[:, :, prefix:].detach() ** 2).sum(-1).sqrt().mean(1)
        else:
            query = q[:, :, :1] if scorer == "cls" else q[:, :, prefix:].mean(2, keepdim=True)
            attention = (query @ k.transpose(-2, -1) * attn.scale).softmax(-1)
            scores = attention[:, :, 0, prefix:].mean(1)
        x = x + block.drop_path1(block.ls1(attn(y)))
        ratio = config.drop_ratio[config.drop_at.index(layer)]
        keep = num_kept(n - prefix, ratio)
        order = scores.argsort(1, descending=True)
        kept = order[:, :keep].sort(1).values + prefix
        index = torch.cat([torch.arange(prefix).expand(b, -1), kept], 1)
        rows = torch.stack([x[i, index[i]] for i in range(b)])
        if config.rejoin_at:
            away.append((x, index, rows))
        if config.method == "fuse" and keep < n - prefix:
            dropped = order[:, keep:]
            fused = [
                (scores[i, dropped[i], None] * x[i, dropped[i] + prefix]).sum(0) for i in range(b)
            ]
            rows = torch.cat([rows, torch.stack(fused)[:, None]], 1)
        x = rows + block.drop_path2(block.ls2(block.mlp(block.norm2(rows))))
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("text", CONFIGS)
def test_forward_and_gradients_are_skipvit(model, images, text):
    """In double: a single selection that differed would show far above the rounding."""
    model, images = model.double(), images.double()
    config = sk.SkipConfig.parse(text)
    expected = plain_skipvit(model, images, config)
    # EViT trains the scores through the fused token: only then do q and k see it.
    wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    sk.patch(model, config)
    got = model(images)
    # Scores are float32 by contract: 1e-7 relative, in the fused rows' weights only.
    tolerance = (
        dict(rtol=1e-5, atol=1e-6) if config.method == "fuse" else dict(rtol=1e-9, atol=1e-11)
    )
    torch.testing.assert_close(got, expected, **tolerance)
    grads = torch.autograd.grad(got.square().sum(), list(model.parameters()))
    tolerance = (
        dict(rtol=1e-4, atol=1e-5) if config.method == "fuse" else dict(rtol=1e-7, atol=1e-9)
    )
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, **tolerance)


@pytest.mark.parametrize("text", CONFIGS)
def test_routing_that_drops_nothing_changes_no_bit(model, text):
    report = sk.verify(model, text)
    assert report.identical and report.max_difference == 0
    assert not sk.is_patched(model)


def test_verify_catches_a_model_whose_routing_changes_it(images):
    model = vit().eval()
    model.blocks[5].attn.scale *= 1.5  # SDPA does not look at it; the routing must not either
    assert sk.verify(model, "6(55%)+11").identical
    model.blocks[5].attn.forward = lambda x, attn_mask=None, is_causal=False: 2 * x
    for text in ("6(55%)+11", "6(55%)+11:warmup=15"):
        with pytest.raises(RuntimeError, match=r"VisionTransformer with 6.0%..11 must agree"):
            sk.verify(model, text)


@pytest.mark.parametrize("text", ["6(55%)+11", ":cls"])  # identical, and run again in double
def test_verify_leaves_the_model_as_it_is(text):
    model = sk.patch(vit().train(), "4(50%)+7", warmup_epochs=2)
    before, config = everything_about(model), model.blocks.config
    sk.verify(model, text)
    assert everything_about(model) == before and model.blocks.config == config
    assert all(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("text", CONFIGS)
def test_each_block_sees_the_tokens_that_the_config_counts(images, text):
    model, seen = vit().eval(), {}
    for layer, block in enumerate(model.blocks, start=1):
        for part in ("attn.qkv", "mlp"):
            block.get_submodule(part).register_forward_pre_hook(
                lambda m, args, key=(layer, part): seen.__setitem__(key, args[0].shape[1])
            )
    sk.patch(model, text)(images)
    counts = sk.SkipConfig.parse(text).token_counts(12, 36)
    assert [seen[layer, "attn.qkv"] for layer in range(1, 13)] == [c.attention for c in counts]
    assert [seen[layer, "mlp"] for layer in range(1, 13)] == [c.mlp for c in counts]


def test_eager_attention_is_respected(images):
    """TIMM_FUSED_ATTN=0: no SDPA in the patched model either, and scores at attention's scale."""
    model = vit().eval()
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.scale *= 40
    assert sk.verify(model, "6(55%)+11").identical
    for text in ("6(55%)+11", "6(45%)+fused"):
        expected = plain_skipvit(model, images, sk.SkipConfig.parse(text))
        torch.testing.assert_close(sk.patch(model, text)(images), expected, rtol=1e-4, atol=1e-5)
        sk.unpatch(model)


def test_the_mean_update_is_taken_in_float32():
    """Around 64 bfloat16 steps by 1/2: its means of 64 and of 64 + 1/8 would be the same."""
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    x = torch.zeros(1, 7, 48, dtype=torch.bfloat16)
    x[:, 1:5] = 64
    skip = methods.make("skip", "mean", "rejoin", True)
    left = skip.reduce(methods.Candidates(x, x[:, None], scores, 4, 1, None))
    moves = torch.tensor([0, 0.5, 0, 0, 0], dtype=torch.bfloat16)[:, None]
    back = skip.restore(x, left, left.tokens + moves, 1)
    assert back[0, :, 0].tolist() == [0, 64.5, 64, 64, 64, 0.125, 0.125]


def test_a_skip_block_is_the_patched_run(images):
    model = vit(reg_tokens=2).eval()
    tokens = torch.randn(2, 39, 48)
    blocks = list(model.blocks)
    inner = sk.SkipBlock(blocks[6:9], "0.3", num_prefix_tokens=3)
    outer = sk.SkipBlock([*blocks[3:6], inner], 0.3, num_prefix_tokens=3)
    expected = nn.Sequential(*blocks[:3], outer, *blocks[9:])(tokens)
    sk.patch(model, "4,7(30%,30%)+10")
    assert torch.equal(model.blocks(tokens), expected)
    assert "drop_ratio=3/10" in repr(outer)


# ------------------------------------------------------- the model stays what it was


def everything_about(model):
    return {
        name: (
            type(module),
            sorted(vars(module)),
            list(module._modules),
            list(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }


def test_unpatch_gives_back_exactly_the_model(model, images):
    before, blocks = everything_about(model), model.blocks
    expected = model(images)
    assert sk.patch(model, "4,7(30%,30%)+10") is model
    assert sk.is_patched(model) and not torch.equal(model(images), expected)
    assert sk.unpatch(model) is model
    assert not sk.is_patched(model) and model.blocks is blocks
    assert everything_about(model) == before
    assert torch.equal(model(images), expected)


def test_names_and_state_stay(model, images):
    names = [name for name, _ in model.named_parameters()]
    modules = [name for name, _ in model.named_modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    sk.patch(model, "6(55%)+11")
    assert [name for name, _ in model.named_parameters()] == names
    assert [name for name, _ in model.named_modules()] == modules
    assert list(model.state_dict()) == list(state)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model.load_state_dict(state)
    other = copy.deepcopy(sk.unpatch(model))
    other.load_state_dict(sk.patch(model, "6(55%)+11").state_dict())


def test_a_run_of_training_resumes_from_a_checkpoint(images):
    """Optimizer and weights saved patched, loaded into an unpatched model that is then patched."""
    labels = torch.tensor([0, 1, 2])

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    model = sk.patch(vit(), "6(55%)+11")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps(model, optimizer, 2)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps(model, optimizer, 2)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = vit()
    resumed.load_state_dict(saved["model"])
    sk.patch(resumed, "6(55%)+11")
    other = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    other.load_state_dict(saved["optimizer"])
    steps(resumed, other, 2)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_patched_and_independent(images, clone):
    model = sk.patch(vit().eval(), "4,7(30%,30%)+10", warmup_epochs=2)
    other = clone(model)
    sk.set_epoch(other, 2)
    dense = model(images)
    sk.set_epoch(model, 2)
    assert torch.equal(other(images), model(images))
    assert not torch.equal(dense, model(images))
    sk.unpatch(other)
    assert torch.equal(other(images), dense) and sk.is_patched(model)
    other.blocks[3](torch.randn(1, 5, 48))  # no trace of the patch is left in the copy


def test_training_and_evaluation_both_drop(images):
    model = sk.patch(vit(), "6(55%)+11")
    for mode in (True, False):
        model.train(mode)
        assert all(block.training is mode for block in model.blocks)
        with sk.record_skips(model) as records:
            model(images)
        assert records[0].kept().sum(1).tolist() == [1 + 17] * 3


@pytest.mark.parametrize("fused", [True, False], ids=["SDPA", "eager"])
def test_drop_path_and_dropout_draw_what_the_unpatched_model_draws(images, fused):
    """The same modules in the same order: with nothing dropped the random numbers agree."""
    model = vit(drop_path_rate=0.5, attn_drop_rate=0.3, proj_drop_rate=0.2).train()
    for block in model.blocks:
        block.attn.fused_attn = fused
    torch.manual_seed(1)
    expected = model(images)
    sk.patch(model, "6(0%)+11")
    torch.manual_seed(1)
    assert torch.equal(model(images), expected)
    routed = model.eval()(images)
    assert torch.equal(routed, sk.unpatch(model)(images))  # none at all in evaluation


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("text", ["6(55%)+11", "4,7(30%,30%)+10:mean", "6(45%)+fused"])
def test_gradient_checkpointing(images, text, reentrant, monkeypatch):
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant)
    model = sk.patch(vit(drop_path_rate=0.2), text).train()
    images.requires_grad_()

    def grads():
        torch.manual_seed(5)
        output = model(images)
        model.zero_grad()
        output.square().sum().backward()
        return [output.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = grads()
    model.set_grad_checkpointing()
    for got, want in zip(grads(), expected, strict=True):
        assert torch.equal(got, want)
    dropped = 12 - len(list(model.blocks.children()))
    assert dropped == {"6(55%)+11": 4, "4,7(30%,30%)+10:mean": 5, "6(45%)+fused": 6}[text]


def test_forward_features_gives_every_token_back(images):
    model = vit().eval()
    shape = model.forward_features(images).shape
    assert sk.patch(model, "6(55%)+11").forward_features(images).shape == shape


def test_slices_of_the_blocks_are_plain(images):
    model = sk.patch(vit().eval(), "6(55%)+11")
    assert type(model.blocks[:5]) is nn.Sequential and len(model.blocks[:5]) == 5
    assert model.blocks[-1] is list(model.blocks)[11]
    assert type(model.blocks) is SkipSequential


def test_data_parallel_replicas_use_their_own_blocks(images):
    """replicate() copies modules without their Python attributes' contents."""
    model = sk.patch(vit().eval(), "4,7(30%,30%)+10")
    blocks = model.blocks._replicate_for_data_parallel()
    for name, block in copy.deepcopy(dict(model.blocks._modules)).items():
        for parameter in block.parameters():
            parameter.data.zero_()
        setattr(blocks, name, block)
    tokens = torch.randn(1, 37, 48)
    assert torch.equal(blocks(tokens), tokens)  # zeroed blocks add nothing: not the originals


def test_distributed_data_parallel(images, tmp_path):
    """One process: buckets, hooks and reduction run as with many."""
    model = sk.patch(vit(), "4,7(30%,30%)+10", warmup_epochs=1)
    expected = copy.deepcopy(model)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for epoch in (0, 1):
            sk.set_epoch(wrapped, epoch)
            sk.set_epoch(expected, epoch)
            for module in (wrapped, expected):
                module.zero_grad()
                module(images).square().sum().backward()
            for got, want in zip(model.parameters(), expected.parameters(), strict=True):
                assert torch.equal(got.grad, want.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_compile_is_one_graph_forward_and_backward(images):
    model = sk.patch(vit(), "4,7(30%,30%)+10:mean").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (3, 2):
        got, want = compiled(images[:batch]), model(images[:batch])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        got.sum().backward()


def test_export_of_a_patched_model(images):
    model = sk.patch(vit().eval(), "6(55%)+11")
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images))


def test_autocast(images):
    model = sk.patch(vit(), "6(55%)+11:mean").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
    output.float().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    half = sk.patch(vit().bfloat16().eval(), "6(55%)+11:mean")
    assert half(images.bfloat16()).dtype == torch.bfloat16


# ---------------------------------------------------------------------- warm-up, records


def test_nothing_is_dropped_before_the_warm_up_ends(images):
    model = vit().eval()
    dense = model(images)
    sk.patch(model, "6(55%)+11", warmup_epochs=2)
    for epoch in (0, 1):
        sk.set_epoch(model, epoch)
        assert torch.equal(model(images), dense)
        model.forward_intermediates(images)  # dense, hence allowed
    sk.set_epoch(model, 2)
    dropped = model(images)
    assert not torch.equal(dropped, dense)
    sk.set_epoch(model, 0)  # a restart
    assert torch.equal(model(images), dense)
    wrapped = nn.Sequential(model)
    sk.set_epoch(wrapped, 7)
    assert torch.equal(wrapped(images), dropped)


def test_a_forward_of_the_warm_up_leaves_no_record(images):
    model = sk.patch(vit().eval(), "6(55%)+11", warmup_epochs=1)
    with sk.record_skips(model) as records:
        model(images)
        assert records == []
        sk.set_epoch(model, 1)
        model(images)
    assert [len(record.indices) for record in records] == [1]


@pytest.mark.parametrize("text", ["6(55%)+11", "4,7(30%,30%)+10", "4,7(30%,30%)+fused"])
def test_records_hold_positions_of_the_full_sequence(images, text):
    model = sk.patch(vit(reg_tokens=2).eval(), text)
    config = model.blocks.config
    inputs = {}

    def keep(name):
        return lambda module, args: inputs.__setitem__(name, args[0])

    for layer in config.drop_at:
        model.blocks[layer - 1].norm1.register_forward_pre_hook(keep(("attention", layer)))
        model.blocks[layer - 1].norm2.register_forward_pre_hook(keep(("mlp", layer)))
    with sk.record_skips(model) as records:
        model(images)
        model(images[:1])
    assert [len(record.indices[0]) for record in records] == [3, 1]
    record = records[1]
    counts = config.token_counts(12, 36, 3)
    for drop, (layer, index) in enumerate(zip(config.drop_at, record.indices, strict=True)):
        fused = config.method == "fuse"
        assert index.shape[1] + fused == counts[layer - 1].mlp
        assert index[0, :3].tolist() == [0, 1, 2]
        positions = index[0][index[0] >= 0]
        assert positions.tolist() == sorted(set(positions.tolist()))
        kept = record.kept(drop)
        assert kept.shape == (1, 39) and kept[0].nonzero()[:, 0].tolist() == positions.tolist()
        assert len(positions) == index.shape[1] - (fused and drop > 0 and -1 in index)
    assert set(record.indices[-1][0].tolist()) - {-1} <= set(record.indices[0][0].tolist())
    assert model.blocks.recorder is None


def test_recorded_patches_are_those_that_cls_looks_at(images):
    model = vit().eval()
    tokens = model._pos_embed(model.patch_embed(images))
    block = model.blocks[0]
    b, n, _ = tokens.shape
    qkv = block.attn.qkv(block.norm1(tokens)).reshape(b, n, 3, 3, 16).permute(2, 0, 3, 1, 4)
    scores = (qkv[0] @ qkv[1].transpose(-2, -1) / 4).softmax(-1)[:, :, 0, 1:].mean(1)
    sk.patch(model, "1(50%)+2")
    with sk.record_skips(model) as records:
        model(images)
    for image in range(b):
        best = scores[image].topk(18).indices + 1
        assert records[0].indices[0][image].tolist() == [0, *sorted(best.tolist())]


def test_the_innermost_of_nested_contexts_records(images):
    model = sk.patch(vit().eval(), "6(55%)+11")
    with sk.record_skips(model) as outer:
        with sk.record_skips(model) as inner:
            model(images)
        model(images[:1])
    assert [len(r.indices[0]) for r in inner] == [3] and [len(r.indices[0]) for r in outer] == [1]


def test_a_failing_context_stops_the_recording(images):
    model = sk.patch(vit().eval(), "6(55%)+11")
    with pytest.raises(KeyError), sk.record_skips(model):
        raise KeyError
    assert model.blocks.recorder is None


# ------------------------------------------------------------------------------ refusals


def refusals():
    return {
        "Swin": (
            timm.create_model("swin_tiny_patch4_window7_224"),
            "6(55%)+11",
            "model must be a timm VisionTransformer, VisionTransformerDistilled, Eva, Beit, ",
        ),
        "CLS scores without CLS": (
            timm.create_model("vit_small_patch16_224", class_token=False, global_pool="avg"),
            "6(55%)+11:score=cls",
            'scorer must not be "cls" on a model without a CLS token, got a VisionTransformer '
            "(global_pool='avg'): \"mean\" suits it",
        ),
        "13 of 12": (vit(), "13(55%)+14", "drop_at must be at most 12, the model's depth, got 13"),
        "rejoin at 13": (vit(), "6(55%)+13", "rejoin_at must be at most 12, the model's depth"),
        "notation": (vit(), "6(120%)", "ratios must lie between 0% and 100%, got 120%"),
        "wrapped": (
            nn.Sequential(vit()),
            "6(55%)+11",
            "model must be a timm VisionTransformer, ",
        ),
    }


def test_what_cannot_be_patched_is_refused_by_name():
    for name, (model, text, message) in refusals().items():
        before = everything_about(model)
        with pytest.raises(ValueError) as caught:
            sk.patch(model, text)
        assert str(caught.value).startswith(message), name
        assert everything_about(model) == before, f"{name}: something half-done is left behind"


def test_an_unknown_part_of_a_known_block_is_refused():
    """A part that a later timm adds would silently be left out."""
    model = vit()
    model.blocks[7].attn.sink = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"attention of block 2 of the run.*got also \['sink'\]"):
        sk.patch(model, "6(55%)+11")
    sk.patch(model, "9(55%)+11")  # outside the run it does not matter


def test_a_subclass_of_a_known_block_is_refused():
    class MyBlock(Block):
        pass

    with pytest.raises(ValueError, match="MyBlock"):
        sk.patch(vit(block_fn=MyBlock), "6(55%)+11")


def test_misuse_raises_and_leaves_the_model(images):
    model = vit().eval()
    for call in (
        sk.unpatch,
        lambda m: sk.set_epoch(m, 1),
        lambda m: sk.record_skips(m).__enter__(),
    ):
        with pytest.raises(ValueError, match="needs a patched model, got a VisionTransformer"):
            call(model)
    sk.patch(model, "6(55%)+11")
    expected = model(images)
    with pytest.raises(ValueError, match=r"not be patched already, .* 6\(55%\)\+11: call unpatch"):
        sk.patch(model, "4(55%)+11")
    for epoch in (-1, math.nan, "1"):
        with pytest.raises(ValueError, match=f"epoch must be a number >= 0, got {epoch!r}"):
            sk.set_epoch(model, epoch)
    assert torch.equal(model(images), expected)
    sk.unpatch(model)
    with pytest.raises(ValueError, match="unpatch needs a patched model"):
        sk.unpatch(model)


def test_ways_around_the_patched_blocks_are_refused(images):
    model = sk.patch(vit().eval(), "6(55%)+11")
    for call in (
        lambda: model(images, attn_mask=torch.ones(37, 37, dtype=torch.bool)),
        lambda: model.blocks[5](torch.randn(1, 37, 48)),
    ):
        with pytest.raises(RuntimeError, match=r"layer 6 drops tokens .* unpatch"):
            call()
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match="must not checkpoint gradients while recording"):
        sk.record_skips(model).__enter__()


def test_skip_block_refuses_settings_that_contradict():
    blocks = list(vit().blocks)[:2]
    for options, message in [
        (dict(drop_ratio=1.2), r"drop_ratio must be in \[0, 1\]"),
        (dict(drop_ratio=0.5, method="blend"), "method must be .* got 'blend'"),
        (dict(drop_ratio=0.5, method="fuse"), 'rejoin must be False with method "fuse"'),
        (dict(drop_ratio=0.5, rejoin=False, rejoin_update="mean"), "needs a rejoin, got False"),
        (
            dict(drop_ratio=0.5, num_prefix_tokens=-1, scorer="norm"),
            "num_prefix_tokens must be at least 0",
        ),
        (
            dict(drop_ratio=0.5, num_prefix_tokens=0, scorer="cls"),
            'num_prefix_tokens must be at least 1 with scorer "cls", got 0',
        ),
        (dict(drop_ratio=0.5, scorer="luck"), "scorer must be one of"),
        (dict(drop_ratio=0.5, match="hue"), "match must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            sk.SkipBlock(blocks, **options)
    with pytest.raises(ValueError, match="blocks must hold at least one block, got none"):
        sk.SkipBlock([], 0.5)
    with pytest.raises(ValueError, match=r"block 1 of the run must be .*, got .*Linear"):
        sk.SkipBlock([blocks[0], nn.Linear(2, 2)], 0.5)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    model = sk.patch(vit().eval(), "6(55%)+11:mean")
    assert model(torch.randn(batch, 3, 48, 48)).shape == (batch, 7)


def test_nan_in_one_image_stays_there(images):
    model = sk.patch(vit().eval(), "6(55%)+11")
    images[1] = math.nan
    output = model(images)
    assert bool(output[1].isnan().all()) and bool(output[[0, 2]].isfinite().all())
