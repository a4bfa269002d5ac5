"""The Triton kernels in Triton's interpreter, beyond what the shared suite asks of every backend.

TRITON_INTERPRET=1 python -m pytest tests/backends/test_triton_interpreter.py
"""

import os

import pytest
import torch

import skipvit_kernels as sk
from skipvit_kernels import ops, reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, in a process of its own", allow_module_level=True)

import triton
import triton.language as tl
import triton_interpreted
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from skipvit_kernels.backends import triton as kernels
from skipvit_kernels.backends.triton import topk

triton_interpreted.install()


# ------------------------------------------------------------------- the checks themselves


@triton.jit
def _copy_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < size if MASKED else offsets < BLOCK
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=offsets < size)


def test_an_access_outside_is_found():
    buffer = torch.randn(16)
    out = torch.empty(10)
    _copy_kernel[(1,)](buffer[:10], out, 10, BLOCK=16, MASKED=True)
    assert torch.equal(out, buffer[:10])
    with pytest.raises(triton_interpreted.OutOfBounds, match=r"load of 16 elements of 4 bytes"):
        _copy_kernel[(1,)](buffer[:10], out, 10, BLOCK=16, MASKED=False)
    with pytest.raises(triton_interpreted.OutOfBounds):  # the gaps of a view are outside too
        _copy_kernel[(1,)](buffer[::2], out, 8, BLOCK=8, MASKED=True)


def test_bfloat16_is_rounded_to_nearest_even():
    x = torch.randn(64)
    out = torch.empty(64, dtype=torch.bfloat16)
    _copy_kernel[(1,)](x, out, 64, BLOCK=64, MASKED=True)
    assert torch.equal(out, x.to(torch.bfloat16))


# ------------------------------------------------------- what is read and written, and how often


def counts(recorded, tensor):
    """(reads, writes) of each element of a contiguous tensor, over all launches."""
    total = torch.zeros(2, tensor.numel(), dtype=torch.int64)
    for launch in recorded:
        for seen, count in zip(launch.tensors, launch.counts, strict=True):
            if seen.data_ptr() == tensor.data_ptr():
                total += torch.from_numpy(count)
    return total.view(2, *tensor.shape)


def rows_kept(index, num_tokens):
    kept = torch.zeros(index.shape[0], num_tokens, dtype=torch.bool)
    return kept.scatter(1, index, True)[..., None]


@pytest.mark.parametrize("launches", [1, 2])
def test_gather_topk_reads_kept_rows_once_and_dropped_ones_never(monkeypatch, launches):
    monkeypatch.setattr(topk, "MAX_SELECTING", 1000 if launches == 1 else 0)
    x, scores = torch.randn(2, 40, 24), torch.rand(2, 3, 39)
    with triton_interpreted.accesses() as recorded:
        tokens, index = kernels.gather_topk(x, scores, 18, num_prefix_tokens=1)
    assert len(recorded) == launches
    reads, writes = counts(recorded, x)
    assert torch.equal(reads, rows_kept(index, 40).long().expand_as(x)) and not writes.any()
    assert bool((counts(recorded, tokens)[1] == 1).all())
    assert bool((counts(recorded, index)[1] == 1).all())


def test_every_other_operator_is_one_launch_and_moves_each_byte_once():
    x, scores = torch.randn(2, 40, 24), torch.rand(2, 3, 39)
    index = reference.gather_topk(x, scores, 18)[1]
    tokens, grad = torch.randn(2, 19, 24), torch.randn(2, 20, 24)
    update, kept = torch.randn(2, 24), rows_kept(index, 40).long().expand(2, 40, 24)

    def run(name, *args, **options):
        with triton_interpreted.accesses() as recorded:
            results = getattr(kernels, name)(*args, **options)
        assert len(recorded) == 1
        results = [r for r in (results if isinstance(results, tuple) else (results,)) if r.numel()]
        for result in results:
            reads, writes = counts(recorded, result)
            assert bool((writes == 1).all()) and not reads.any()
        return [counts(recorded, t)[0] for t in args if isinstance(t, torch.Tensor)]

    assert torch.equal(run("gather_rows", x, index)[0], kept)
    assert bool((run("gather_rows_backward", tokens, index, 40)[0] == 1).all())
    for update_or_none in (None, update):
        read_x, read_tokens, _ = run("scatter_back", x, tokens, index, update=update_or_none)
        assert torch.equal(read_x, 1 - kept) and bool((read_tokens == 1).all())
    for has_update in (False, True):
        assert bool((run("scatter_back_backward", x, index, has_update)[0] == 1).all())
    assert bool((run("gather_topk_fuse", x, scores, 18, num_prefix_tokens=1)[0] == 1).all())
    read_grad, read_x, _, _ = run("gather_topk_fuse_backward", grad, x, scores, index)
    assert torch.equal(read_x, 1 - kept) and bool((read_grad[:, :-1] == 1).all())
    q, k = torch.randn(2, 3, 8), torch.randn(2, 3, 40, 8)
    assert bool((run("cls_scores", q, k)[1] == 1).all())


# ---------------------------------------------------------------------------- the selection


@pytest.mark.parametrize("selecting", [0, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_patches", [196, 512, 513])
def test_both_ways_to_select_agree_with_the_reference(monkeypatch, num_patches, dtype, selecting):
    monkeypatch.setattr(topk, "MAX_SELECTING", selecting)
    scores = (torch.rand(2, num_patches, dtype=dtype) * 40).floor() / 40  # many ties
    scores[1, ::7] = float("nan")
    x = torch.randn(2, num_patches + 2, 8)
    for num_keep in (1, num_patches // 2):
        tokens, index = kernels.gather_topk(x, scores, num_keep, num_prefix_tokens=2)
        expected = reference.gather_topk(x, scores, num_keep, num_prefix_tokens=2)
        assert torch.equal(index, expected[1]) and torch.equal(tokens, expected[0])


@pytest.mark.parametrize("num_patches", [16384, 16385])
def test_the_longest_sequence_and_one_beyond(num_patches):
    """16,385 patches and more are left to plain PyTorch."""
    scores = torch.rand(1, num_patches).to(torch.bfloat16)
    x = torch.randn(1, num_patches + 1, 1)
    with triton_interpreted.accesses() as recorded:
        index = kernels.gather_topk(x, scores, 5000, num_prefix_tokens=1)[1]
    assert len(recorded) == (2 if num_patches == 16384 else 0)
    assert torch.equal(index, reference.gather_topk(x, scores, 5000)[1])


def test_merging_reads_each_byte_once_and_no_atomics_are_needed():
    x, owner = torch.randn(2, 40, 24), torch.randint(7, (2, 40)).sort(1).values
    owner[:, :7] = torch.arange(7)
    for name, args, launches in [
        ("merge_rows", (x, owner, 7), 2),
        ("restore_rows_backward", (x, owner, 7), 2),
        ("merge_rows_backward", (x[:, :7].contiguous(), owner, None, torch.ones(2, 7)), 1),
    ]:
        with triton_interpreted.accesses() as recorded:
            results = getattr(kernels, name)(*args)
        assert len(recorded) == launches
        for result in results if isinstance(results, tuple) else (results,):
            reads, writes = counts(recorded, result)
            assert bool((writes == 1).all()) and not reads.any()
        if launches == 2:
            assert bool((counts(recorded, x)[0] == 1).all())
    before, after = torch.randn(2, 2, 7, 24).unbind()
    with triton_interpreted.accesses() as recorded:
        restored = kernels.restore_rows(x, before, after, owner)
    assert len(recorded) == 1 and bool((counts(recorded, restored)[1] == 1).all())
    alone = (reference._row_counts(owner, 7).gather(1, owner) == 1)[..., None].expand_as(x)
    assert torch.equal(counts(recorded, x)[0], 1 - alone.long())  # nor before's row of those


def test_owners_out_of_range_are_left_out():
    x, owner = torch.randn(1, 9, 5), torch.tensor([[0, 1, 7, 1, -1, 2, 2, 2**32 + 1, 0]])
    good = [0, 1, 3, 5, 6, 8]
    tokens, merged = kernels.merge_rows(x, owner, 3)
    want, want_merged = reference.merge_rows(x[:, good], owner[:, good], 3)
    assert torch.equal(tokens, want) and torch.equal(merged, want_merged)
    restored = kernels.restore_rows(x, want, want * 2, owner)
    bad = [2, 4, 7]
    assert torch.equal(restored[:, bad], x[:, bad])
    assert torch.equal(
        restored[:, good], reference.restore_rows(x[:, good], want, want * 2, owner[:, good])
    )
    assert not kernels.merge_rows_backward(want, owner, None, merged)[:, bad].any()
    assert torch.equal(kernels.restore_rows_backward(x, owner, 3)[0][:, bad], x[:, bad])


def test_offsets_beyond_2_31_elements():
    """Rows 2**30 elements apart, in memory that is reserved and never touched in between."""
    try:
        memory = torch.empty(2**31 + 2**20, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve 4 GiB of address space: {error}")
    far = memory.as_strided((1, 3, 64), (0, 2**30, 1))
    near = torch.randn(1, 3, 64, dtype=torch.float16)
    far.copy_(near)
    index = torch.tensor([[0, 2]])
    scores = torch.tensor([[0.0, 1.0]])
    assert torch.equal(kernels.gather_rows(far, index), near[:, [0, 2]])
    assert torch.equal(kernels.scatter_back(far, near[:, :2], index)[:, 1], near[:, 1])
    assert torch.equal(
        kernels.gather_rows_backward(far, torch.tensor([[2, 0, 1]]), 3)[:, 1], near[:, 2]
    )
    grad_x, grad_tokens, _ = kernels.scatter_back_backward(far, index, False)
    assert torch.equal(grad_tokens, near[:, [0, 2]]) and torch.equal(grad_x[:, 1], near[:, 1])
    tokens, _ = kernels.gather_topk_fuse(far, scores, 1, num_prefix_tokens=1)
    assert torch.equal(tokens[:, :2], near[:, [0, 2]])
    for key, plain in ((far, near), (far.transpose(1, 2), near.transpose(1, 2))):
        q = torch.randn(1, 1, key.shape[2], dtype=torch.float16)
        got = kernels.cls_scores(q, key[:, None], num_prefix_tokens=0)
        assert torch.allclose(got, reference.cls_scores(q, plain[:, None], num_prefix_tokens=0))


# --------------------------------------------------------------- an index that is not valid


def on_index(index, x, tokens, grad, update, scores):
    """What every operator that is given an index makes of it."""
    return {
        "gather_rows_backward": [kernels.gather_rows_backward(tokens, index, x.shape[1])],
        "scatter_back": [kernels.scatter_back(x, tokens, index)],
        "scatter_back, update": [kernels.scatter_back(x, tokens, index, update=update)],
        "scatter_back_backward": kernels.scatter_back_backward(x, index, False)[::2],
        "scatter_back_backward, update": kernels.scatter_back_backward(x, index, True)[::2],
        "gather_topk_fuse_backward": kernels.gather_topk_fuse_backward(grad, x, scores, index),
    }


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("entries", "count_as"),
    [
        # Names no row, though the lower 32 bits do.
        *[([0, 5, far + 3, 7], [0, 1, 3]) for far in (2**32, -(2**32), 2**62, -(2**63))],
        ([-1, 9, 4, 10, -9], [2]),
        ([9], []),
        ([2, 4, 2, 4, 2], [3, 4]),  # the last of repeated ones
        ([8] * 20, [19]),  # more rows than x has, and than one tile
    ],
    ids=str,
)
def test_an_index_that_is_not_valid(entries, count_as):
    """It writes what the entries `count_as` alone would; each entry in range reads its row."""
    index = torch.tensor([entries])
    x, tokens = torch.randn(1, 9, 5), torch.randn(1, len(entries), 5)
    grad, update, scores = torch.randn(1, len(entries) + 1, 5), torch.randn(1, 5), torch.rand(1, 8)
    got = on_index(index, x, tokens, grad, update, scores)
    rows = [*count_as, len(entries)]  # of grad also the fused one
    expected = on_index(index[:, count_as], x, tokens[:, count_as], grad[:, rows], update, scores)
    for name, results in expected.items():
        for result, want in zip(got[name], results, strict=True):
            assert torch.equal(result, want), name
    read = torch.stack([x[0, e] if 0 <= e < 9 else torch.zeros(5) for e in entries])[None]
    assert torch.equal(kernels.gather_rows(x, index), read)
    for has_update in (False, True):
        assert torch.equal(kernels.scatter_back_backward(x, index, has_update)[1], read)


# -------------------------------------------------- under torch's dispatcher, as on a GPU


@pytest.fixture(scope="module")
def dispatched():
    """The launchers at the CPU key, in this process alone."""
    library = torch.library.Library("skipvit", "IMPL")
    kernels.register("CPU", library)
    yield
    library._destroy()


@pytest.mark.usefixtures("dispatched")
class TestDispatched:
    def test_opcheck(self):
        x, scores = torch.randn(2, 9, 8), torch.rand(2, 8)
        index = reference.gather_topk(x, scores, 3)[1]
        tokens, update = torch.randn(2, 4, 8), torch.randn(2, 8)
        q, k = torch.randn(2, 3, 4), torch.randn(2, 3, 9, 4)
        owner, sizes = reference.match_kept(x, index), torch.rand(2, 9) + 0.5
        arguments = {
            "cls_scores": (q, k),
            "gather_topk": (x, scores, 3),
            "gather_topk_fuse": (x, scores, 3),
            "gather_topk_fuse_backward": (torch.randn(2, 5, 8), x, scores, index),
            "gather_rows": (x, index),
            "gather_rows_backward": (tokens, index, 9),
            "scatter_back": (x, tokens, index),
            "scatter_back_backward": (x, index, True),
            "match_higher": (x, scores),
            "match_kept": (x, index),
            "merge_rows": (x, owner, 4),
            "merge_rows_backward": (tokens, owner, sizes, torch.ones(2, 4)),
            "restore_rows": (x, tokens, tokens * 2, owner),
            "restore_rows_backward": (x, owner, 4),
        }
        options = {"cls_scores": dict(scale=0.5), "scatter_back": dict(update=update)}
        options["merge_rows"] = dict(sizes=sizes)
        assert set(arguments) == set(ops.OPERATORS)
        for name, args in arguments.items():
            with triton_interpreted.accesses() as recorded:
                opcheck(getattr(torch.ops.skipvit, name).default, args, options.get(name))
            assert recorded, f"{name} did not reach the Triton kernel"

    def test_gradcheck(self):
        def check(function, *inputs):
            assert torch.autograd.gradcheck(function, inputs)

        double = torch.float64
        x = torch.randn(1, 5, 2, dtype=double, requires_grad=True)
        scores = torch.rand(1, 2, 4, dtype=double, requires_grad=True)
        index = reference.gather_topk(x, scores, 2)[1]
        tokens = torch.randn(1, 3, 2, dtype=double, requires_grad=True)
        update = torch.randn(1, 2, dtype=double, requires_grad=True)
        check(lambda x: sk.gather_topk(x, scores, 2)[0], x)
        check(lambda x, s: sk.gather_topk_fuse(x, s, 2)[0], x, scores)
        check(lambda x: sk.gather_rows(x, index), x)
        check(lambda x, t, u: sk.scatter_back(x, t, index, update=u), x, tokens, update)
        owner, sizes = torch.tensor([[0, 1, 1, 2, 1]]), torch.rand(1, 5) + 0.5
        check(lambda x: sk.merge_rows(x, owner, 3, sizes=sizes)[0], x)
        check(lambda x, t: sk.restore_rows(x, t, t * 2, owner), x, tokens)

    def test_one_graph_serves_every_batch_size(self):
        counter = CompileCounterWithBackend("aot_eager")

        def step(x, q, k):
            scores = sk.cls_scores(q, k)
            tokens, index = sk.gather_topk(x, scores, 3)
            return sk.scatter_back(x, tokens * 2, index, update=tokens.mean(1))

        compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
        for batch in (6, 3, 7):  # torch compiles sizes that coincide apart
            x = torch.randn(batch, 9, 8, requires_grad=True)
            q, k = torch.randn(batch, 2, 4), torch.randn(batch, 2, 9, 4)
            (grad,) = torch.autograd.grad(compiled(x, q, k).square().sum(), x)
            (expected,) = torch.autograd.grad(step(x, q, k).square().sum(), x)
            assert torch.allclose(grad, expected, rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 1
