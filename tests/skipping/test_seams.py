"""The seam of families: one is a file and a row, and nothing else changes.

`eva_family.py` teaches timm's Eva (RoPE, a ModuleList whose blocks the model calls itself), which
then does all that the known ones do. A method is a file: `test_merge.py`.
"""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from eva_family import Eva as EvaFamily
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva
from torch import nn

import skipvit_kernels as sk
from skipvit_kernels.skipping import families, floor
from skipvit_kernels.skipping.config import num_kept

ROW = families.Row("eva_family.Eva", ("timm.models.eva.Eva",), ("timm.models.eva.EvaBlock",))


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(families, "ROWS", [*families.ROWS, ROW])


def eva(**options):
    torch.manual_seed(3)
    model = Eva(
        **{
            **dict(img_size=48, patch_size=8, embed_dim=48, depth=8, num_heads=3, num_classes=7),
            **dict(use_rot_pos_emb=True, ref_feat_shape=(6, 6), global_pool="token"),
            **options,
        }
    )
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


EVAS = {
    "EVA02": lambda: eva(swiglu_mlp=True, scale_mlp=True),
    "DINOv3": lambda: eva(
        num_reg_tokens=4,
        use_abs_pos_emb=False,
        rope_type="dinov3",
        rope_rotate_half=True,
        init_values=0.3,
    ),
    "mixed": lambda: eva(rope_type="mixed", attn_type="rope", use_abs_pos_emb=False),
    "no CLS": lambda: eva(class_token=False, global_pool="avg"),
}


@pytest.fixture(params=EVAS.values(), ids=EVAS)
def model(request):
    return request.param()


@pytest.fixture
def images():
    return torch.randn(3, 3, 48, 48)


def plain_eva(model, images, config):
    """SkipViT on Eva with attention maps, sorting and loops; one image at a time."""
    x, rope = model._pos_embed(model.patch_embed(images))
    x, prefix = model.norm_pre(x), model.num_prefix_tokens
    away, places = [], torch.arange(x.shape[1] - prefix).expand(len(x), -1)
    for layer, block in enumerate(model.blocks, start=1):
        if layer == config.rejoin_at:
            for full, index, old_places in reversed(away):
                x, places = full.clone().scatter(1, index[..., None].expand_as(x), x), old_places
        attn, y = block.attn, block.norm1(x)
        own = rope[layer - 1] if model.rope_mixed else rope
        own = torch.stack([own[..., at, :].expand(attn.num_heads, -1, -1) for at in places])
        b, n, _ = y.shape
        if attn.qkv is not None and getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            qkv = nn.functional.linear(y, attn.qkv.weight, bias)
        else:
            qkv = attn.qkv(y)
        q, k, v = qkv.reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        half = attn.rotate_half
        q, k = (
            torch.cat([t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], own, half)], 2)
            for t in (q, k)
        )
        attention = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1)
        branch = attn.proj(attn.norm((attention @ v).transpose(1, 2).flatten(2)))
        x = x + (branch if block.gamma_1 is None else block.gamma_1 * branch)
        if layer in config.drop_at:
            query = q[:, :, :1] if model.cls_token is not None else q.mean(2, keepdim=True)
            row = (query @ k.transpose(-2, -1) * attn.scale).softmax(-1)
            scores = row[:, :, 0, prefix:].mean(1)
            keep = num_kept(n - prefix, config.drop_ratio[config.drop_at.index(layer)])
            kept = scores.argsort(1, descending=True)[:, :keep].sort(1).values
            index = torch.cat([torch.arange(prefix).expand(b, -1), kept + prefix], 1)
            away.append((x, index, places))
            x, places = torch.stack([x[i, index[i]] for i in range(b)]), places.gather(1, kept)
        branch = block.mlp(block.norm2(x))
        x = x + (branch if block.gamma_2 is None else block.gamma_2 * branch)
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("text", ["3(55%)+7", "2,4(30%,30%)+7", "3(55%)"])
def test_a_new_family_is_skipped_exactly(model, images, text):
    """In double; RoPE rows follow the patches, per layer where each has its own."""
    model, images, config = model.double(), images.double(), sk.SkipConfig.parse(text)
    try:
        model(images)
    except RuntimeError as error:
        pytest.skip(f"this timm's own Eva lacks float64: {error}")
    expected = plain_eva(model, images, config)
    wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    sk.patch(model, config)
    got = model(images)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    grads = torch.autograd.grad(got.square().sum(), list(model.parameters()))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("text", ["3(55%)+7:mean", "2,4(30%,30%)+7:score=norm", "8(50%)"])
def test_a_new_family_has_all_that_the_known_ones_have(model, images, text):
    dense, names = model(images), list(model.state_dict())
    blocks = list(model.blocks)
    report = sk.verify(model, text)
    # Without CLS timm's tokens lie channel by channel until a gather, and a mean over them rounds
    # by the layout.
    assert report.identical or (model.cls_token is None and report.tolerance < 1e-5)
    counts = sk.SkipConfig.parse(text).token_counts(8, 36, model.num_prefix_tokens)
    assert seen_by_mlps(floor.sliced(model, text), images) == [count.mlp for count in counts]
    sk.patch(model, text)
    assert seen_by_mlps(model, images) == [count.mlp for count in counts]
    assert sk.ideal_speedup(model, text) > 1 and list(model.state_dict()) == names
    with sk.record_skips(model) as records:
        routed = model(images)
    assert records[0].kept().sum(1).tolist() == [counts[-1 if "8(" in text else 5].mlp] * 3
    for clone in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        assert torch.equal(clone(model)(images), routed)
    model.set_grad_checkpointing()
    assert torch.equal(model(images), routed)
    model.set_grad_checkpointing(False)
    sk.unpatch(model)
    assert torch.equal(model(images), dense) and list(model.blocks) == blocks
    assert type(model.blocks) is nn.ModuleList and "forward_intermediates" not in vars(model)


def seen_by_mlps(model, images):
    seen = {}
    handles = [
        block.norm2.register_forward_pre_hook(
            lambda _, args, at=at: seen.__setitem__(at, args[0].shape[1])
        )
        for at, block in enumerate(model.blocks._modules.values())
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return [seen[at] for at in range(len(handles))]


def test_a_new_family_compiles_to_one_graph(images):
    model = sk.patch(EVAS["DINOv3"](), "3(55%)+7").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = compiled(images), model(images)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got.sum().backward()


def test_ways_around_blocks_that_the_model_calls_itself_are_refused(images):
    model = sk.patch(EVAS["EVA02"](), "3(55%)+7")
    with pytest.raises(RuntimeError, match=r"3\(55%\)\+7.* unpatch"):
        model.blocks[2](torch.randn(1, 37, 48))
    assert model.blocks[2].attn is list(model.blocks)[2].attn and len(model.blocks) == 8


def test_a_family_that_does_not_know_an_argument_refuses_it(monkeypatch, images):
    monkeypatch.setattr(EvaFamily, "narrow", staticmethod(families.Family.narrow))
    model = sk.patch(EVAS["EVA02"](), "3(55%)+7")
    with pytest.raises(ValueError, match="given the tokens alone, got also rope"):
        model(images)


# ----------------------------------------------------------------- what loads what


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import skipvit_kernels as sk; sk.gather_rows", ("timm", "matplotlib", "rich")),
        ("from skipvit_kernels.backends import cpu, npu, triton", ("timm", "triton.language")),
        ("import skipvit_kernels as sk; sk.patch", ("timm", "matplotlib")),
    ],
)
def test_an_operator_loads_neither_timm_nor_a_clock(statement, absent):
    absent = (*absent, "skipvit_kernels.lab", "skipvit_kernels.skipping.families.vit")
    code = f"{statement}; import sys; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
