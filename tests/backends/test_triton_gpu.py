"""What only a GPU can show: `make test-gpu` runs this beside the shared suite, on the device."""

import os

import pytest
import torch
from torch.library import opcheck

import skipvit_kernels as sk
from skipvit_kernels import ops, reference

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    if "triton" in os.environ.get("SKIPVIT_REQUIRE", "").split(","):
        pytest.fail("triton is required and there is no CUDA or ROCm GPU", pytrace=False)
    pytest.skip("needs a CUDA or ROCm GPU", allow_module_level=True)

from skipvit_kernels.backends import triton as kernels


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def inputs(batch=4, num_tokens=197, columns=384, heads=6, dtype=torch.bfloat16):
    x = torch.randn(batch, num_tokens, columns, device="cuda", dtype=dtype)
    scores = torch.rand(batch, num_tokens - 1, device="cuda")
    qkv = torch.randn(batch, num_tokens, 3, heads, columns // heads, device="cuda", dtype=dtype)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return x, scores, q[:, :, 0], k


def there_and_back(x, q, k, num_keep=89):
    scores = sk.cls_scores(q, k)
    tokens, index = sk.gather_topk(x, scores, num_keep)
    return sk.scatter_back(x, tokens * 2, index, update=tokens.mean(1))


# ------------------------------------------------------------------------------ dispatcher


def test_every_operator_has_its_kernel_at_the_cuda_key():
    for name in ops.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"skipvit::{name}", "CUDA")


def test_opcheck():
    x, scores, q, k = inputs(2, 17, 16, 2, torch.float32)
    index = reference.gather_topk(x, scores, 5)[1]
    tokens, update = x[:, :6].contiguous(), x[:, 0].contiguous()
    owner = reference.match_kept(x, index)
    arguments = {
        "cls_scores": (q, k),
        "gather_topk": (x, scores, 5),
        "gather_topk_fuse": (x, scores, 5),
        "gather_topk_fuse_backward": (x[:, :7].contiguous(), x, scores, index),
        "gather_rows": (x, index),
        "gather_rows_backward": (tokens, index, 17),
        "scatter_back": (x, tokens, index),
        "scatter_back_backward": (x, index, True),
        "match_higher": (x, scores.float()),
        "match_kept": (x, index),
        "merge_rows": (x, owner, 6),
        "merge_rows_backward": (tokens, owner, None, torch.ones(2, 6, device="cuda")),
        "restore_rows": (x, tokens, tokens * 2, owner),
        "restore_rows_backward": (x, owner, 6),
    }
    options = {"cls_scores": dict(scale=0.5), "scatter_back": dict(update=update)}
    assert set(arguments) == set(ops.OPERATORS)
    for name, args in arguments.items():
        opcheck(getattr(torch.ops.skipvit, name).default, args, options.get(name))


def test_gradcheck():
    x = torch.randn(2, 9, 3, dtype=torch.float64, device="cuda", requires_grad=True)
    scores = torch.rand(2, 8, dtype=torch.float64, device="cuda", requires_grad=True)
    index = reference.gather_topk(x, scores, 3)[1]
    tokens = torch.randn(2, 4, 3, dtype=torch.float64, device="cuda", requires_grad=True)
    update = torch.randn(2, 3, dtype=torch.float64, device="cuda", requires_grad=True)
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(lambda x: sk.gather_topk(x, scores, 3)[0], (x,))
    assert gradcheck(lambda x, s: sk.gather_topk_fuse(x, s, 3)[0], (x, scores))
    assert gradcheck(lambda x: sk.gather_rows(x, index), (x,))
    assert gradcheck(lambda x, t, u: sk.scatter_back(x, t, index, update=u), (x, tokens, update))
    owner = sk.match_kept(x, index)
    assert gradcheck(lambda x: sk.merge_rows(x, owner, 4)[0], (x,))
    assert gradcheck(lambda x, t: sk.restore_rows(x, t, t * 2, owner), (x, tokens))


# ------------------------------------------------------------------------- at real sizes


@pytest.mark.parametrize("num_tokens", [2, 197, 1025, 4097, 16385])
@pytest.mark.parametrize("batch", [1, 7])
def test_long_and_short_sequences(batch, num_tokens):
    x, scores, q, k = inputs(batch, num_tokens, 128, 2)
    scores = (scores * 500).floor() / 500  # many ties
    num_keep = (num_tokens - 1) // 2
    tokens, index = kernels.gather_topk(x, scores, num_keep, num_prefix_tokens=1)
    expected = reference.gather_topk(x.cpu(), scores.cpu(), num_keep)
    assert torch.equal(index.cpu(), expected[1]) and torch.equal(tokens.cpu(), expected[0])
    back = kernels.scatter_back(x, tokens, index)
    assert torch.equal(back, x)
    got, want = kernels.cls_scores(q, k), reference.cls_scores(q, k)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-7)


def test_more_images_than_a_grid_dimension_holds():
    x, scores, *_ = inputs(70_000, 3, 8, 1)
    tokens, index = kernels.gather_topk(x, scores, 1, num_prefix_tokens=1)
    expected = reference.gather_topk(x, scores, 1)
    assert torch.equal(index, expected[1]) and torch.equal(tokens, expected[0])


def test_more_than_2_31_elements():
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip(f"needs 24 GiB of GPU memory, {free / 2**30:.0f} are free")
    batch, num_tokens, columns = 14_200, 197, 768  # 2.15e9 elements, 4 GiB
    x = torch.zeros(batch, num_tokens, columns, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(num_tokens, columns, device="cuda")
    scores = torch.rand(batch, num_tokens - 1, device="cuda")
    tokens, index = kernels.gather_topk(x, scores, 89, num_prefix_tokens=1)
    assert torch.equal(tokens[-1], x[-1][index[-1]])
    back = kernels.scatter_back(torch.zeros_like(x), tokens, index)
    assert torch.equal(back[-1][index[-1]], tokens[-1])


def test_the_same_bits_in_100_runs():
    x, scores, q, k = inputs(32)
    grad = torch.randn_like(x)

    def everything():
        tokens, index = kernels.gather_topk_fuse(x, scores, 89, num_prefix_tokens=1)
        return (
            tokens,
            index,
            *kernels.gather_topk_fuse_backward(tokens, x, scores, index),
            *kernels.scatter_back_backward(grad, index, True),
            kernels.cls_scores(q, k),
        )

    first = everything()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))


# ----------------------------------------------------------------- compile and CUDA graphs


def test_one_graph_serves_every_batch_size():
    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (7, 3, 33):
            x, _, q, k = inputs(batch)
            x.requires_grad_()
            grad = torch.randn_like(x)
            (got,) = torch.autograd.grad(compiled(x, q, k), x, grad)
            (want,) = torch.autograd.grad(there_and_back(x, q, k), x, grad)
            assert torch.allclose(got, want, rtol=2e-2, atol=2e-2)


def test_no_operator_synchronises():
    x, scores, q, k = inputs()
    x.requires_grad_()
    there_and_back(x, q, k).sum().backward()  # compiled, loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        there_and_back(x, q, k).sum().backward()
        sk.gather_topk_fuse(x, scores, 89)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("config", ["6(55%)+11:mean", "6(55%)+11:cls", "6(45%)+fused"])
def test_cuda_graphs_capture_a_patched_model_forward_and_backward(config):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224").cuda()
    sk.patch(model, config)
    images = torch.randn(8, 3, 224, 224, device="cuda")

    def step(run):
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(images).float().square().mean()
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return [loss.detach().clone(), *gradients]

    expected = step(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warm-up, capture, replays
        torch.compiler.cudagraph_mark_step_begin()
        got = step(compiled)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm() + 1e-6


def test_a_graph_of_our_own_replays_on_new_inputs():
    x, _, q, k = inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there_and_back(x, q, k)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = there_and_back(x, q, k)
    x.copy_(torch.randn_like(x))
    k.copy_(torch.randn_like(k))
    graph.replay()
    assert torch.equal(out, there_and_back(x, q, k))


# ------------------------------------------------------------------------------- measuring


def test_a_model_is_measured_on_the_device():
    """Training under autocast, inference as a CUDA graph, blocks, and advice: all code paths."""
    pytest.importorskip("timm")
    from skipvit_kernels.lab import bench

    shared = dict(device="cuda", bfloat16=True, rounds=3)
    configs = ("6(55%)+11", ":cls", "6(45%)+fused:cls")
    rows: list[bench.Measurement] = []
    job = bench.Job("vit_small_patch16_224", configs, 32, training=True, **shared)
    bench.run(job, rows)
    assert all(row.memory_saved >= 0.9 * row.activations_saved for row in rows[1:4])
    bench.run(
        bench.Job("vit_small_patch16_224", configs, 1, False, cuda_graph=True, **shared), rows
    )
    assert all(min(row.seconds) > 0 for row in rows)
    blocks = bench.block_seconds(job, rounds=2)
    assert list(blocks) == ["unpatched", *configs] and len(blocks[":cls"]) == 12
    advice = sk.advise(bench.build(job), 64, bfloat16=True, seconds=20)
    assert {finding.config for finding in advice.findings} > {":cls", "6(55%)+11:cls"}


# ------------------------------------------------------------------------------- bad input


def test_devices_that_differ_are_both_named():
    x, scores, q, k = inputs()
    index = torch.zeros(4, 90, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"scores must be on x's device, cuda:0, got cpu"):
        sk.gather_topk(x, scores.cpu(), 89)
    with pytest.raises(ValueError, match=r"index must be on x's device, cuda:0, got cpu"):
        sk.gather_rows(x, index)
    with pytest.raises(ValueError, match=r"k must be on q's device, cuda:0, got cpu"):
        sk.cls_scores(q, k.cpu())
    with pytest.raises(ValueError, match=r"tokens must be on x's device, cuda:0, got cpu"):
        sk.scatter_back(x, x[:, :90].cpu(), index.cuda())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_than_the_current_device():
    x, scores, q, k = (t.to("cuda:1") for t in inputs())
    assert torch.cuda.current_device() == 0
    tokens, _ = sk.gather_topk(x, scores, 89)
    expected = reference.gather_topk(x, scores, 89)
    assert tokens.device.index == 1 and torch.equal(tokens, expected[0])
    assert torch.allclose(sk.cls_scores(q, k), reference.cls_scores(q, k), rtol=1e-4, atol=1e-7)


def test_an_index_out_of_range_touches_no_other_memory():
    """Undefined rows, but zeros or nothing: never somebody else's memory."""
    x = torch.randn(2, 9, 16, device="cuda")
    index = torch.tensor([[0, 2**40], [-1, 3]], device="cuda")
    out = kernels.gather_rows(x, index)
    assert torch.equal(out[0, 0], x[0, 0]) and not out[0, 1].any() and not out[1, 0].any()
    kernels.scatter_back(x, x[:, :2], index)
    torch.cuda.synchronize()
