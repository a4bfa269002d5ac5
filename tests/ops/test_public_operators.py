"""The public functions: argument checks, autograd, torch.compile, export, on the CPU."""

import importlib
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import skipvit_kernels as sk
from skipvit_kernels import ops, reference

DOUBLE = torch.float64


@pytest.fixture(params=["kernel", "reference", "differentiated reference"])
def route(request, monkeypatch):
    """The public functions over the C++ kernels, and over the plain PyTorch behind them."""
    if request.param == "kernel":
        reason = sk.backends.cpu.unavailable_reason()
        if reason:
            pytest.skip(f"lacks the C++ kernels: {reason}")
    elif request.param == "differentiated reference":
        with sk.reference_operators():
            yield
        return
    else:
        use_references(monkeypatch)
    yield


def use_references(monkeypatch):
    for name, group in ops.OPERATORS.items():
        module = importlib.import_module(f"skipvit_kernels.ops.{group}")
        monkeypatch.setattr(module, f"_{name}", getattr(reference, name))


# ---------------------------------------------------------------------------- autograd


def gradcheck(function, *inputs):
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=False)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("heads", [None, 3])
def test_every_operator_passes_gradcheck_alone(heads):
    x = torch.randn(2, 9, 3, dtype=DOUBLE, requires_grad=True)
    scores = torch.rand((2, 8) if heads is None else (2, heads, 8), dtype=DOUBLE)
    _, index = sk.gather_topk(x, scores, 3)
    tokens = torch.randn(2, 4, 3, dtype=DOUBLE, requires_grad=True)
    update = torch.randn(2, 3, dtype=DOUBLE, requires_grad=True)
    gradcheck(lambda x: sk.gather_topk(x, scores, 3)[0], x)
    gradcheck(lambda x: sk.gather_rows(x, index), x)
    gradcheck(lambda x, t: sk.scatter_back(x, t, index), x, tokens)
    gradcheck(lambda x, t, u: sk.scatter_back(x, t, index, update=u), x, tokens, update)
    # Only one of the inputs wants a gradient.
    gradcheck(lambda t: sk.scatter_back(x.detach(), t, index), tokens)
    gradcheck(lambda u: sk.scatter_back(x.detach(), tokens.detach(), index, update=u), update)
    scores.requires_grad_()
    gradcheck(lambda x, s: sk.gather_topk_fuse(x, s, 3)[0], x, scores)
    gradcheck(lambda s: sk.gather_topk_fuse(x.detach(), s, 3)[0], scores)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("sized", [False, True])
def test_merging_and_restoring_pass_gradcheck(sized):
    x = torch.randn(2, 9, 3, dtype=DOUBLE, requires_grad=True)
    owner = torch.tensor([[0, 1, 1, 2, 3, 1, 2, 2, 1], [3, 3, 3, 3, 0, 3, 1, 2, 3]])
    sizes = torch.rand(2, 9) + 0.5 if sized else None
    before, after = torch.randn(2, 2, 4, 3, dtype=DOUBLE).unbind()
    before.requires_grad_()
    after.requires_grad_()
    gradcheck(lambda x: sk.merge_rows(x, owner, 4, sizes=sizes)[0], x)
    gradcheck(lambda x, b, a: sk.restore_rows(x, b, a, owner), x, before, after)
    gradcheck(lambda b: sk.restore_rows(x.detach(), b, after.detach(), owner), before)


@pytest.mark.usefixtures("route")
def test_merged_and_restored_at_once_is_every_row_itself():
    """Nothing was gained in between: the gradient of a row is that of its copy."""
    x = torch.randn(2, 9, 3, dtype=DOUBLE, requires_grad=True)
    _, index = sk.gather_topk(x, torch.rand(2, 8), 3)
    owner = sk.match_kept(x, index)
    tokens, _ = sk.merge_rows(x, owner, 4)
    restored = sk.restore_rows(x, tokens, tokens, owner)
    assert torch.allclose(restored, x, rtol=1e-15, atol=1e-15)
    weights = torch.randn_like(x)
    (grad,) = torch.autograd.grad(restored, x, weights)
    assert torch.allclose(grad, weights, rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("route")
def test_scores_have_no_gradient():
    q = torch.randn(2, 3, 4, requires_grad=True)
    k = torch.randn(2, 3, 9, 4, requires_grad=True)
    scores = sk.cls_scores(q, k)
    assert not scores.requires_grad
    x = torch.randn(2, 9, 5, requires_grad=True)
    tokens, index = sk.gather_topk(x, scores.requires_grad_(), 3)
    assert not index.requires_grad
    tokens.sum().backward()
    assert scores.grad is None and x.grad is not None


@pytest.mark.usefixtures("route")
def test_features_and_sizes_have_no_gradient():
    x, features = torch.randn(2, 2, 9, 5, requires_grad=True).unbind()
    sizes = torch.ones(2, 9, requires_grad=True)
    index = torch.tensor([[0, 3, 4], [0, 1, 8]])
    ranks = torch.rand(2, 8, requires_grad=True)
    assert not sk.match_higher(features, ranks).requires_grad
    owner = sk.match_kept(features, index)
    tokens, merged_sizes = sk.merge_rows(x, owner, 3, sizes=sizes)
    assert not owner.requires_grad and not merged_sizes.requires_grad
    tokens.sum().backward()
    assert sizes.grad is None


@pytest.mark.usefixtures("route")
def test_the_index_may_be_all_that_is_used():
    x = torch.randn(2, 9, 5, requires_grad=True)
    tokens, index = sk.gather_topk(x, torch.rand(2, 8), 3)
    (sk.gather_rows(torch.randn(2, 9, 2, requires_grad=True), index).sum()).backward()
    assert x.grad is None and tokens.grad_fn is not None


def test_backward_saves_the_index_alone():
    """Peak memory: a gather that saved its input would keep a whole activation alive."""
    saved = []
    x = torch.randn(2, 9, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tokens, index = sk.gather_topk(x, torch.rand(2, 8), 3)
        sk.scatter_back(x, tokens, index, update=torch.randn(2, 5, requires_grad=True))
        owner = sk.match_kept(x, index)
        merged, _ = sk.merge_rows(x, owner, 4)
        sk.restore_rows(x, merged, merged * 2, owner)
    moved, merging = saved[:2], saved[2:5]
    assert [t.dtype for t in moved] == [torch.int64] * 2
    assert [t.numel() for t in moved] == [8, 8]
    assert [(t.dtype, t.numel()) for t in merging if t is not None] == [
        (torch.int64, 18), (torch.float32, 8), (torch.int64, 18),
    ]  # fmt: skip


# ----------------------------------------------------------- opcheck, compile and export


def _samples(dtype=torch.float32):
    x = torch.randn(2, 9, 4, dtype=dtype)
    scores, heads = torch.rand(2, 8), torch.rand(2, 3, 8)
    _, index = reference.gather_topk(x, scores, 3)
    rows, update = torch.randn(2, 4, 4, dtype=dtype), torch.randn(2, 4, dtype=dtype)
    q, k = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 3, 9, 4, dtype=dtype)
    permuted = torch.randn(4, 9, 2, dtype=dtype).permute(2, 1, 0)
    two = dict(num_prefix_tokens=2)
    owner, sizes = reference.match_kept(x, index), torch.rand(2, 9) + 0.5
    merged_sizes = reference.merge_rows(x, owner, 4, sizes=sizes)[1]
    return {
        "cls_scores": [
            ((q, k), {}),
            ((q, k.transpose(1, 2).contiguous().transpose(1, 2)), dict(scale=1.0, **two)),
        ],
        "gather_topk": [
            ((x, scores, 3), {}),
            ((x, heads[..., 1:], 0), two),
            ((permuted, scores, 8), {}),
        ],
        "gather_topk_fuse": [((x, scores, 3), {}), ((permuted, heads[..., 1:], 3), two)],
        "gather_topk_fuse_backward": [
            ((torch.cat([rows, rows[:, :1]], 1), x, scores, index), {}),
            ((torch.cat([rows, rows[:, :1]], 1), permuted, heads, index), {}),
        ],
        "gather_rows": [((x, index), {}), ((permuted, index), {})],
        "gather_rows_backward": [
            ((rows, index, 9), {}),
            ((rows.transpose(0, 1), index[:1].expand(4, -1)[:, :2], 9), {}),
        ],
        "scatter_back": [((x, rows, index), {}), ((permuted, rows, index), dict(update=update))],
        "scatter_back_backward": [((x, index, False), {}), ((permuted, index, True), {})],
        "match_higher": [
            ((x, scores.float()), {}),
            ((x[:, None].expand(-1, 3, -1, -1), scores.t().contiguous().t()[:, 1:]), two),
        ],
        "match_kept": [((x, index), {}), ((x[:, None].expand(-1, 3, -1, -1), index), two)],
        "merge_rows": [((x, owner, 4), {}), ((permuted, owner, 4), dict(sizes=sizes))],
        "merge_rows_backward": [
            ((rows, owner, None, merged_sizes), {}),
            ((rows, owner, sizes, merged_sizes), {}),
        ],
        "restore_rows": [((x, rows, rows * 2, owner), {}), ((permuted, rows, rows, owner), {})],
        "restore_rows_backward": [((x, owner, 4), {}), ((permuted, owner, 5), {})],
    }


def test_every_operator_has_opcheck_samples():
    assert set(_samples()) == set(ops.OPERATORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ops.OPERATORS)
def test_opcheck(name, dtype):
    for arguments, options in _samples(dtype)[name]:
        opcheck(getattr(torch.ops.skipvit, name).default, arguments, options)


def route_there_and_back(x, q, k, num_keep):
    scores = sk.cls_scores(q, k)
    tokens, index = sk.gather_topk(x, scores, num_keep)
    fused, _ = sk.gather_topk_fuse(x, scores, num_keep)
    tokens = tokens * 2 + fused[:, -1:]
    update = (tokens - sk.gather_rows(x, index)).mean(1)
    x = sk.scatter_back(x, tokens, index, update=update)
    owner = sk.match_kept(k, sk.gather_topk(k[:, 0], -sk.match_higher(k, scores), num_keep)[1])
    merged, sizes = sk.merge_rows(x, owner, index.shape[1])
    return sk.restore_rows(x, merged, merged * sizes[..., None], owner)


def test_compile_is_one_graph_for_every_batch_size():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(route_there_and_back, fullgraph=True, dynamic=True, backend=counter)
    for batch in (6, 3, 7):  # torch compiles a size of 1 apart, and sizes that coincide
        x = torch.randn(batch, 17, 8, requires_grad=True)
        q, k = torch.randn(batch, 2, 4), torch.randn(batch, 2, 17, 4)
        got, want = compiled(x, q, k, 5), route_there_and_back(x, q, k, 5)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
        weights = torch.randn_like(got)
        got, want = (torch.autograd.grad(y, x, weights)[0] for y in (got, want))
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_export_keeps_the_operators():
    class Route(torch.nn.Module):
        def forward(self, x, q, k):
            return route_there_and_back(x, q, k, 5)

    arguments = torch.randn(2, 17, 8), torch.randn(2, 2, 4), torch.randn(2, 2, 17, 4)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(Route(), arguments, dynamic_shapes=(batch, batch, batch))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    for name in ops.__all__[2:]:
        assert f"skipvit.{name}.default" in names
    other = torch.randn(5, 17, 8), torch.randn(5, 2, 4), torch.randn(5, 2, 17, 4)
    assert torch.equal(program.module()(*other), Route()(*other))


# ------------------------------------------------------------------------------ bad input

X = torch.randn(2, 197, 8)
SCORES = torch.rand(2, 196)
INDEX = torch.zeros(2, 1, dtype=torch.int64)
ROWS = torch.randn(2, 1, 8)
Q, K = torch.randn(2, 3, 4), torch.randn(2, 3, 197, 4)
OWNER = (torch.arange(197) % 3).expand(2, -1)

BAD = [
    # gather_topk and gather_topk_fuse share their checks
    (
        sk.gather_topk,
        (X[0], SCORES, 3),
        {},
        ValueError,
        "x must have shape (B, N, C), got (197, 8)",
    ),
    (
        sk.gather_topk,
        (X, SCORES[:1], 3),
        {},
        ValueError,
        "scores must have shape (2, 196) or (2, H, 196) with at least one head, got (1, 196)",
    ),
    (
        sk.gather_topk,
        (X, SCORES, 3),
        {"num_prefix_tokens": 2},
        ValueError,
        "scores must have shape (2, 195) or (2, H, 195) with at least one head, got (2, 196)",
    ),
    (
        sk.gather_topk,
        (X, SCORES[None, None], 3),
        {},
        ValueError,
        "scores must have shape (2, 196) or (2, H, 196) with at least one head, got (1, 1, 2, 196)",
    ),
    (
        sk.gather_topk,
        (X, torch.rand(2, 0, 196), 3),
        {},
        ValueError,
        "scores must have shape (2, 196) or (2, H, 196) with at least one head, got (2, 0, 196)",
    ),
    (sk.gather_topk, (X, SCORES, 300), {}, ValueError, "num_keep must be in [0, 196], got 300"),
    (sk.gather_topk, (X, SCORES, -1), {}, ValueError, "num_keep must be in [0, 196], got -1"),
    (sk.gather_topk, (X, SCORES, 0.5), {}, TypeError, "num_keep must be an int, got 0.5"),
    (
        sk.gather_topk,
        (X, SCORES, 3),
        {"num_prefix_tokens": 198},
        ValueError,
        "num_prefix_tokens must be in [0, 197], got 198",
    ),
    (
        sk.gather_topk,
        (X.int(), SCORES, 3),
        {},
        TypeError,
        "x must be float32, float16, bfloat16 or float64, got int32",
    ),
    (
        sk.gather_topk,
        (X, SCORES.long(), 3),
        {},
        TypeError,
        "scores must be float32, float16, bfloat16 or float64, got int64",
    ),
    (
        sk.gather_topk,
        (X, SCORES.to("meta"), 3),
        {},
        ValueError,
        "scores must be on x's device, cpu, got meta",
    ),
    (
        sk.gather_topk_fuse,
        (X, SCORES, 197),
        {},
        ValueError,
        "num_keep must be in [0, 196], got 197",
    ),
    # cls_scores
    (sk.cls_scores, (Q[0], K), {}, ValueError, "q must have shape (B, H, D), got (3, 4)"),
    (
        sk.cls_scores,
        (Q, K[:, :2]),
        {},
        ValueError,
        "k must have shape (2, 3, N, 4), got (2, 2, 197, 4)",
    ),
    (
        sk.cls_scores,
        (Q, K.half()),
        {},
        TypeError,
        "k must have the dtype of q, float32, got float16",
    ),
    (
        sk.cls_scores,
        (Q.long(), K.long()),
        {},
        TypeError,
        "q must be float32, float16, bfloat16 or float64, got int64",
    ),
    (sk.cls_scores, (Q, K.to("meta")), {}, ValueError, "k must be on q's device, cpu, got meta"),
    (
        sk.cls_scores,
        (Q, K),
        {"num_prefix_tokens": 198},
        ValueError,
        "num_prefix_tokens must be in [0, 197], got 198",
    ),
    (
        sk.cls_scores,
        (Q[:, :0], K[:, :0]),
        {},
        ValueError,
        "q must have at least one head of width 1, got (2, 0, 4)",
    ),
    # gather_rows and scatter_back
    (sk.gather_rows, (X, INDEX.int()), {}, TypeError, "index must be int64, got int32"),
    (sk.gather_rows, (X, INDEX[:1]), {}, ValueError, "index must have shape (2, M), got (1, 1)"),
    (
        sk.gather_rows,
        (X, INDEX.to("meta")),
        {},
        ValueError,
        "index must be on x's device, cpu, got meta",
    ),
    (sk.gather_rows, (X, INDEX + 197), {}, ValueError, "index must hold rows in [0, 197), got 197"),
    (
        sk.scatter_back,
        (X, ROWS[..., :7], INDEX),
        {},
        ValueError,
        "tokens must have shape (2, 1, 8), got (2, 1, 7)",
    ),
    (
        sk.scatter_back,
        (X, ROWS.half(), INDEX),
        {},
        TypeError,
        "tokens must have the dtype of x, float32, got float16",
    ),
    (
        sk.scatter_back,
        (X, ROWS.to("meta"), INDEX),
        {},
        ValueError,
        "tokens must be on x's device, cpu, got meta",
    ),
    (
        sk.scatter_back,
        (X, ROWS, INDEX),
        {"update": torch.zeros(2, 8, device="meta")},
        ValueError,
        "update must be on x's device, cpu, got meta",
    ),
    (
        sk.scatter_back,
        (X, ROWS, INDEX),
        {"update": torch.zeros(8)},
        ValueError,
        "update must have shape (2, 8), got (8,)",
    ),
    (
        sk.scatter_back,
        (X, ROWS, INDEX),
        {"update": torch.zeros(2, 8).half()},
        TypeError,
        "update must have the dtype of x, float32, got float16",
    ),
    (
        sk.scatter_back,
        (X, ROWS, INDEX - 1),
        {},
        ValueError,
        "index must hold rows in [0, 197), got -1",
    ),
    (
        sk.scatter_back,
        (X, ROWS.repeat(1, 2, 1), INDEX.repeat(1, 2)),
        {},
        ValueError,
        "index must hold each row of an image once, got 0 twice in image 0",
    ),
    # match_higher, match_kept, merge_rows and restore_rows
    (
        sk.match_higher,
        (X, torch.rand(2, 197)),
        {},
        ValueError,
        "ranks must have shape (2, 196), got (2, 197)",
    ),
    (
        sk.match_higher,
        (X, torch.rand(2, 196).double()),
        {},
        TypeError,
        "ranks must be float32, got float64",
    ),
    (
        sk.match_higher,
        (X, torch.rand(2, 196)),
        {"num_prefix_tokens": 198},
        ValueError,
        "num_prefix_tokens must be in [0, 197], got 198",
    ),
    (
        sk.match_higher,
        (K[:, :0], torch.rand(2, 196)),
        {},
        ValueError,
        "features must have shape (B, N, D) or (B, H, N, D) with at least one head, "
        "got (2, 0, 197, 4)",
    ),
    (
        sk.match_kept,
        (X[0], INDEX),
        {},
        ValueError,
        "features must have shape (B, N, D) or (B, H, N, D) with at least one head, got (197, 8)",
    ),
    (
        sk.match_kept,
        (K[:, :0], INDEX),
        {},
        ValueError,
        "features must have shape (B, N, D) or (B, H, N, D) with at least one head, "
        "got (2, 0, 197, 4)",
    ),
    (
        sk.match_kept,
        (X.int(), INDEX),
        {},
        TypeError,
        "features must be float32, float16, bfloat16 or float64, got int32",
    ),
    (
        sk.match_kept,
        (X, INDEX),
        {},
        ValueError,
        "index must hold at least one kept patch behind 1 prefix tokens, "
        "got shape (2, 1) for 197 tokens",
    ),
    (
        sk.match_kept,
        (X, INDEX),
        {"num_prefix_tokens": 2},
        ValueError,
        "num_prefix_tokens must be in [0, 1], got 2",
    ),
    (
        sk.match_kept,
        (X, INDEX + 197),
        {"num_prefix_tokens": 0},
        ValueError,
        "index must hold rows in [0, 197), got 197",
    ),
    (
        sk.merge_rows,
        (X, OWNER[:, 1:], 3),
        {},
        ValueError,
        "owner must have shape (2, 197), got (2, 196)",
    ),
    (sk.merge_rows, (X, OWNER.int(), 3), {}, TypeError, "owner must be int64, got int32"),
    (sk.merge_rows, (X, OWNER, 198), {}, ValueError, "num_rows must be in [0, 197], got 198"),
    (
        sk.merge_rows,
        (X, OWNER, 2),
        {},
        ValueError,
        "owner must hold rows in [0, 2), got 2",
    ),
    (
        sk.merge_rows,
        (X, OWNER, 4),
        {},
        ValueError,
        "owner must hold every row in [0, 4), got no 3 in image 0",
    ),
    (
        sk.merge_rows,
        (X, OWNER, 3),
        {"sizes": torch.ones(2, 197).half()},
        TypeError,
        "sizes must be float32, got float16",
    ),
    (
        sk.merge_rows,
        (X, OWNER, 3),
        {"sizes": torch.ones(2, 3)},
        ValueError,
        "sizes must have shape (2, 197), got (2, 3)",
    ),
    (
        sk.merge_rows,
        (X, OWNER, 3),
        {"sizes": torch.ones(2, 197).index_fill(1, torch.tensor([5]), -2)},
        ValueError,
        "sizes must be positive, got -2",
    ),
    (
        sk.merge_rows,
        (X, OWNER, 3),
        {"sizes": torch.zeros(2, 197)},
        ValueError,
        "sizes must be positive, got 0",
    ),
    (
        sk.restore_rows,
        (X, ROWS, ROWS[..., :7], OWNER),
        {},
        ValueError,
        "after must have shape (2, 1, 8), got (2, 1, 7)",
    ),
    (
        sk.restore_rows,
        (X, ROWS.half(), ROWS, OWNER),
        {},
        TypeError,
        "before must have the dtype of x, float32, got float16",
    ),
    (
        sk.restore_rows,
        (X, ROWS, ROWS, OWNER),
        {},
        ValueError,
        "owner must hold rows in [0, 1), got 1",
    ),
]


@pytest.mark.parametrize(
    ("operator", "arguments", "options", "error", "message"),
    BAD,
    ids=[f"{case[0].__name__}: {case[4]}" for case in BAD],
)
def test_bad_arguments_raise_by_name(operator, arguments, options, error, message):
    values = ("index must hold row", "index must hold each", "owner must hold", "sizes must be pos")
    if message.startswith(values) and sk.backends.cpu.unavailable_reason():
        pytest.skip("lacks the C++ kernels, which look at the values of an argument")
    with pytest.raises(error) as caught:
        operator(*arguments, **options)
    assert str(caught.value) == message


def test_the_messages_are_the_same_with_gradients_wanted():
    with pytest.raises(ValueError, match=r"index must hold rows in \[0, 197\), got 197"):
        sk.gather_rows(X.clone().requires_grad_(), INDEX + 197)


# -------------------------------------------------------------------------------- imports


def run_python(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("blocked", ["timm", "triton", "torch_npu", "numpy", "matplotlib", "rich"])
def test_the_operators_import_and_run_without(blocked):
    run_python(f"""
        import sys
        sys.modules[{blocked!r}] = None
        import torch
        import skipvit_kernels as sk
        tokens, index = sk.gather_topk(torch.randn(2, 9, 4), torch.rand(2, 8), 3)
        assert index.shape == (2, 4)
    """)


def test_importing_does_not_import_what_only_some_need():
    loaded = run_python("""
        import sys, torch
        before = set(sys.modules)
        import skipvit_kernels
        print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
    """)
    for name in ("timm", "torch_npu", "matplotlib", "rich", "sklearn", "pytest"):
        assert f"'{name}'" not in loaded, loaded


def test_a_missing_library_falls_back_and_says_so():
    out = run_python("""
        import sys, warnings
        sys.modules["skipvit_kernels._C"] = None
        import torch
        import skipvit_kernels as sk
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                sk.gather_topk(torch.randn(2, 9, 4), torch.rand(2, 8), 3)
        print([str(w.message) for w in caught])
    """)
    assert out.count("skipvit::gather_topk runs as plain PyTorch on cpu") == 1
