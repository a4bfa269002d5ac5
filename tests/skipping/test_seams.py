"""The seam of families: one is a file and a row, and nothing else changes.

`toy_family.py` teaches a library of its own, which then does all that the known ones do. Eva stands
for models that call their blocks themselves, with arguments that follow the tokens. A method is a
file: `test_merge.py`.
"""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from timm.models.eva import Eva
from torch import nn
from toy_family import Ring

import skipvit_kernels as sk
from skipvit_kernels.skipping import families, floor
from skipvit_kernels.skipping.families.eva import Eva as EvaFamily

ROW = families.Row("toy_family.RingFamily", ("toy_family.Ring",), ("toy_family.RingBlock",))


@pytest.fixture
def ring(monkeypatch):
    monkeypatch.setattr(families, "ROWS", [*families.ROWS, ROW])
    torch.manual_seed(3)
    return Ring().eval()


def plain_ring(model, points, drop_at, keep, rejoin_at):
    """One ring at a time; distances by the places of the tokens."""
    outputs = []
    for ring in points:
        x, places = model.embed(ring.flatten(1).T), torch.arange(model.size)
        full = x
        for layer, block in enumerate(model.blocks, start=1):
            if layer == rejoin_at:
                x, places = full.clone().index_copy(0, places, x), torch.arange(model.size)
            gap = (places[:, None] - places).abs()
            logits = -torch.minimum(gap, model.size - gap).to(x)
            y = block.norm(x)
            q, (k, v) = block.q(y), block.kv(y).chunk(2, 1)
            logits = logits + q @ k.T / 8
            x = x + logits.softmax(-1) @ v
            if layer == drop_at:
                best = logits.mean(0).softmax(0).argsort(descending=True)[:keep].sort().values
                full, x, places = x, x[best], best
            x = x + block.mlp(x)
        outputs.append(x.mean(0))
    return torch.stack(outputs)


def test_a_family_is_a_file_and_a_row(ring):
    points = torch.randn(3, 3, 1, 24)
    assert sk.verify(ring, "2(50%)+5").max_difference < 1e-6
    assert sk.ideal_speedup(ring, "2(50%)+5") > 1
    ring, points = ring.double(), points.double()
    expected = plain_ring(ring, points, 2, 12, 5)
    wanted = torch.autograd.grad(expected.square().sum(), list(ring.parameters()))
    got = sk.patch(ring, "2(50%)+5")(points)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    grads = torch.autograd.grad(got.square().sum(), list(ring.parameters()))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-7, atol=1e-9)
    sk.unpatch(ring)
    with pytest.raises(ValueError, match="a ring does not fuse"):
        sk.patch(ring, "2(50%)+fused")


# --------------------------------------------------------------------------- blocks one by one


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


@pytest.mark.parametrize("text", ["3(55%)+7:mean", "2,4(30%,30%)+7:score=norm", "8(50%)"])
def test_blocks_that_the_model_calls_have_all_that_a_run_has(model, images, text):
    dense, names = model(images), list(model.state_dict())
    blocks = list(model.blocks)
    report = sk.verify(model, text)
    # Without CLS timm's tokens lie channel by channel until a gather, and a mean over them rounds
    # by the layout; learned RoPE rows add their gradients layer by layer in another order.
    assert report.train_difference < 1e-5
    assert report.max_difference == 0 or (model.cls_token is None and report.tolerance < 1e-5)
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


def test_they_compile_to_one_graph(images):
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
    monkeypatch.setattr(EvaFamily, "rows", ())
    model = sk.patch(EVAS["EVA02"](), "3(55%)+7")
    with pytest.raises(ValueError, match="given the tokens, attn_mask alone, got also rope"):
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
