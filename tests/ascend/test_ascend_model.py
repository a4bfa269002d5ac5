"""The Ascend910A kernels on the CPU model of its core: what the shared operator suite cannot ask.

The suite itself runs through the model as backend `npu-model`. Here: the model's own rules, every
number of cores, odd sizes one by one, the limits by name, and the buffers the kernels really take.
"""

import subprocess

import pytest
import torch
from ascend import counts, lint, model

from skipvit_kernels import reference

pytestmark = pytest.mark.skipif(
    model.unavailable_reason() is not None, reason=str(model.unavailable_reason())
)
ASCEND = model.ROOT / "tests" / "ascend"


def compile_and_run(source, tmp_path):
    program = tmp_path / source.removesuffix(".cpp")
    command = [model.compiler(), "-std=c++17", "-O1", str(ASCEND / source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return subprocess.run([str(program)], capture_output=True, text=True)


def same(got, expected):
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ---------------------------------------------------------------------------- the model


def test_the_model_objects_to_every_breach_of_its_rules(tmp_path):
    done = compile_and_run("test_model.cpp", tmp_path)
    assert done.returncode == 0, done.stdout


def test_tiling_covers_everything_once_and_fits_the_chip(tmp_path):
    done = compile_and_run("test_tiling.cpp", tmp_path)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > 2_000_000


UNDOCUMENTED = {
    "Add of int16": "Add(L<int16_t>(), L<int16_t>(), L<int16_t>(), 16)",
    "And of int32": "And(L<int32_t>(), L<int32_t>(), L<int32_t>(), 8, 1, {1, 1, 1, 8, 8, 8})",
    "Cast of int16 to half": "Cast(L<half>(), L<int16_t>(), RoundMode::CAST_NONE, 16)",
    "Cast with rounding down": "Cast(L<half>(), L<float>(), RoundMode::CAST_FLOOR, 16)",
    "Compare of int32": "Compare(L<uint8_t>(), L<int32_t>(), L<int32_t>(), CMPMODE::EQ, 64)",
    "Duplicate of int64": "Duplicate(L<int64_t>(), int64_t{0}, 4)",
    "Maxs": "Maxs(L<float>(), L<float>(), 0.0f, 8)",
    "Gather": "Gather(L<float>(), L<float>(), L<uint32_t>(), 0, 8)",
    "DataCopyPad": "DataCopyPad(L<float>(), GlobalTensor<float>(), DataCopyParams{}, {})",
    "ReduceSum of float": "ReduceSum(L<float>(), L<float>(), L<float>(), 8)",
    "barrier of the scalar pipe": "PipeBarrier<PIPE_S>()",
    "half arithmetic on the scalar unit": "L<half>().GetValue(0) + L<half>().GetValue(1)",
}


def test_what_the_910a_does_not_document_does_not_compile(tmp_path):
    def compiles(statement):
        source = tmp_path / "try.cpp"
        source.write_text(
            '#include "kernel_operator.h"\nusing namespace AscendC;\n'
            "template <class T> using L = LocalTensor<T>;\n"
            f"void kernel() {{ {statement}; }}\n"
        )
        command = [model.compiler(), "-std=c++17", "-fsyntax-only", f"-I{ASCEND}", str(source)]
        return subprocess.run(command, capture_output=True).returncode == 0

    assert compiles("Add(L<half>(), L<half>(), L<half>(), 16)")
    assert [name for name, statement in UNDOCUMENTED.items() if compiles(statement)] == []


def test_kernels_and_host_code_compile_without_a_warning():
    for source in model.SOURCES:
        flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{ASCEND}"]
        command = [model.compiler(), *flags, str(model.ROOT / source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------- lint


def test_the_kernels_use_only_what_the_910a_documents():
    assert lint.lint(lint.kernel_files()) == []


@pytest.mark.parametrize(
    "line",
    [
        "DataCopyPad(a, b, c);",
        "Gather(a, b, c, 0, 8);",
        "ReduceSum(a, b, c, 8);",
        "MagicSort(a, b);",
        "LocalTensor<bfloat16_t> t;",
        "double x = 1;",
        "Cast(a, b, RoundMode::CAST_RINT, 8);",
        "SetFlag<HardEvent::MTE1_M>(EVENT_ID0);",
        "SetFlag<HardEvent::V_S>(EVENT_ID4);",
        "PipeBarrier<PIPE_S>();",
        "PipeBarrier<PIPE_MTE1>();",
        "std::min(a, b);",
        "throw 1;",
        "static int count;",
        "auto f = [&](int i) { return i; };",
        "auto run = narrow ? RunSumRows<half> : RunSumRows<float>;",
        "TBuf<TPosition::A1> buffer;",
        "#include <vector>",
        "GM_ADDR x, y;",
    ],
)
def test_the_lint_finds(line, tmp_path):
    kernel = tmp_path / "kernel.cpp"
    clean = 'extern "C" __global__ __aicore__ void k(GM_ADDR x) {\n  PipeBarrier<PIPE_V>();\n}\n'
    kernel.write_text(clean)
    assert lint.lint([kernel]) == []
    faulty = f"{line}\n{clean}" if line[0] == "#" else clean.replace("}", f"  {line}\n}}")
    kernel.write_text(faulty)
    assert len(lint.lint([kernel])) >= 1


# -------------------------------------------------------------------------- operators


def inputs(batch=3, patches=37, prefix=2, channels=16, heads=3, dtype=torch.float32):
    x = torch.randn(batch, prefix + patches, channels).to(dtype)
    return x, torch.rand(batch, heads, patches)


@pytest.mark.parametrize("cores", range(1, 33))
def test_every_number_of_cores_gives_the_same_bits(cores):
    x, scores = inputs(batch=5)
    dense = {"x": x, "scores": scores}
    tokens, index = model.run("gather_topk_fuse", dense, (17, 2), cores)
    one_core = model.run("gather_topk_fuse", dense, (17, 2), 1)
    same((tokens, index), one_core)
    same((tokens[:, :-1], index), reference.gather_topk(x, scores, 17, num_prefix_tokens=2))

    update = torch.randn(5, 16)
    rows = {"x": x, "tokens": tokens[:, :-1].contiguous(), "index": index, "update": update}
    back = model.run("scatter_back", rows, (), cores)
    same(back, [reference.scatter_back(x, rows["tokens"], index, update=update)])

    grad = torch.randn(tokens.shape)
    args = {"grad": grad, "x": x, "scores": scores, "index": index}
    same(
        model.run("gather_topk_fuse_backward", args, (), cores),
        model.run("gather_topk_fuse_backward", args, (), 1),
    )
    args = {"grad": x, "index": index}
    same(
        model.run("scatter_back_backward", args, (1,), cores),
        model.run("scatter_back_backward", args, (1,), 1),
    )
    q, k = torch.randn(5, 3, 16), torch.randn(5, 3, 39, 16)
    args, numbers = {"q": q, "k": k}, (0.25, 2)
    same(model.run("cls_scores", args, numbers, cores), model.run("cls_scores", args, numbers, 1))


@pytest.mark.parametrize("prefix, keep", [(0, 0), (0, 9), (2, 0), (2, 9)])
@pytest.mark.parametrize("heads", [None, 2])
def test_one_core_reuses_its_buffers_for_every_image(prefix, keep, heads):
    """Five images in turn, with nothing but its own flags between one and the next."""
    x = torch.randn(5, prefix + 37, 16)
    scores = torch.rand((5, 37) if heads is None else (5, heads, 37))
    dense = {"x": x, "scores": scores}
    tokens, index = model.run("gather_topk_fuse", dense, (keep, prefix), 1)
    want = reference.gather_topk_fuse(x, scores, keep, num_prefix_tokens=prefix)
    assert torch.allclose(tokens, want[0], atol=1e-5) and torch.equal(index, want[1])

    grad = torch.randn(tokens.shape)
    args = {"grad": grad, "x": x, "scores": scores, "index": index}
    got = model.run("gather_topk_fuse_backward", args, (), 1)
    want = reference.gather_topk_fuse_backward(grad, x, scores, index)
    assert torch.equal(got[0], want[0]) and torch.allclose(got[1], want[1], atol=1e-4)

    got = model.run("scatter_back_backward", {"grad": x, "index": index}, (1,), 1)
    want = reference.scatter_back_backward(x, index, True)
    assert torch.equal(got[0], want[0]) and torch.allclose(got[2], want[2], atol=1e-4)
    moved, update = grad[:, :-1].contiguous(), torch.randn(5, 16)
    args = {"x": x, "tokens": moved, "index": index, "update": update}
    got = model.run("scatter_back", args, (), 1)[0]
    assert torch.equal(got, reference.scatter_back(x, moved, index, update=update))


@pytest.mark.parametrize("scores_dtype", [torch.float32, torch.float16])
def test_every_number_of_patches_and_kept_with_ties(scores_dtype):
    """n around every multiple of 8, 16, 32 and 64; scores of eight values, so that most tie."""
    for patches in [*range(1, 70), 127, 128, 129, 255, 256, 257]:
        x = torch.randn(2, 1 + patches, 8)
        scores = torch.randint(-3, 5, (2, patches)).to(scores_dtype) / 4
        for keep in {0, 1, patches // 2, patches - 1, patches}:
            same(
                model.gather_topk(x, scores, keep),
                reference.gather_topk(x, scores, keep),
            )


def test_scores_that_differ_in_the_last_bit_keep_their_order():
    """What a sort with half keys, the chip's own, could not tell apart."""
    bits = torch.tensor([0x3F800000, 0x3F80FFFF, 0x00000001, 0x7F7FFFFF], dtype=torch.int32)
    near = torch.stack([bits + i for i in range(-20, 20)], -1)[:, torch.randperm(40)]
    scores = torch.cat([near, near | -(2**31)], 1).view(torch.float32)
    x = torch.randn(4, 81, 8)
    for keep in range(81):
        same(model.gather_topk(x, scores, keep), reference.gather_topk(x, scores, keep))


def test_any_bits_as_scores_are_ordered_as_specified():
    bits = torch.randint(-(2**31), 2**31, (16, 300), dtype=torch.int64).to(torch.int32)
    scores = bits.view(torch.float32)
    x = torch.randn(16, 301, 8)
    for keep in (1, 3, 150, 299):
        same(model.gather_topk(x, scores, keep), reference.gather_topk(x, scores, keep))


def test_infinities_and_every_kind_of_nan_have_their_place():
    """inf below every NaN; NaNs of any payload and sign equal, so the lower position wins."""
    bits = [0x7F800001, 0x7F800000, 0x7FFFFFFF, -1, 0x7F7FFFFF, -(2**31) + 0x7F800000, 0x7FC00000]
    scores = torch.tensor([bits, bits[::-1]], dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.randn(2, 8, 8)
    for keep in range(8):
        same(model.gather_topk(x, scores, keep), reference.gather_topk(x, scores, keep))


def test_the_index_is_valid_even_where_the_chip_cannot_average():
    scores = torch.rand(4, 3, 50)
    scores[0, 1, 5:20] = float("nan")
    scores[1, :, 7:30] = float("inf")
    scores[2, 2, ::3] = -float("inf")
    scores[3] = float("nan")
    _, index = model.gather_topk(torch.randn(4, 51, 8), scores, 22)
    assert model.last_stats[1] > 0  # the model counts the operands that the chip has not
    assert bool((index[:, 1:] > index[:, :-1]).all()) and int(index.max()) <= 50
    assert bool((index[:, 0] == 0).all())


def test_an_index_out_of_range_stays_inside_the_tensors():
    """Undefined by contract, but no write may leave an output and no read an input."""
    x, tokens = torch.randn(2, 9, 8), torch.randn(2, 3, 8)
    index = torch.tensor([[-1, 3, 2**40], [9, 0, -(2**40)]])
    rows = model.gather_rows(x, index)
    assert torch.equal(rows[0, 1], x[0, 3]) and torch.equal(rows[1, 1], x[1, 0])
    out = model.scatter_back(x, tokens, index)
    expected = x.clone()
    expected[0, 3], expected[1, 0] = tokens[0, 1], tokens[1, 1]
    assert torch.equal(out, expected)
    model.scatter_back_backward(x, index, True)
    model.gather_topk_fuse_backward(torch.randn(2, 4, 8), x, torch.rand(2, 8), index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_unified_buffer_in_use_is_what_the_tiling_says(dtype):
    x, scores = inputs(batch=2, patches=577, channels=384, heads=4, dtype=dtype)
    index = reference.gather_topk(x, scores, 260, num_prefix_tokens=2)[1]
    grad, k = torch.randn(2, 263, 384).to(dtype), torch.randn(2, 4, 579, 64).to(dtype)
    calls = {
        "gather_topk": ({"x": x, "scores": scores}, (260, 2)),
        "gather_topk_fuse": ({"x": x, "scores": scores}, (260, 2)),
        "gather_topk_fuse_backward": (
            {"grad": grad, "x": x, "scores": scores, "index": index}, ()),
        "gather_rows": ({"x": x, "index": index}, ()),
        "gather_rows_backward": ({"grad": grad[:, 1:].contiguous(), "index": index}, (579,)),
        "scatter_back_backward": ({"grad": x, "index": index}, (1,)),
        "cls_scores": ({"q": k[:, :, 0].contiguous(), "k": k}, (0.125, 1)),
    }  # fmt: skip
    for operator, (tensors, numbers) in calls.items():
        model.run(operator, tensors, numbers, 5)
        peak, planned = model.last_stats[2:]
        assert peak == planned, operator


def test_cls_scores_of_logits_far_below_zero_do_not_vanish():
    q, k = torch.full((1, 2, 8), -30.0), torch.rand(1, 2, 9, 8) + 1
    got = model.run("cls_scores", {"q": q, "k": k}, (1.0, 1))[0]
    assert torch.allclose(got, reference.cls_scores(q, k, scale=1.0), atol=1e-5)


def test_keys_are_read_in_the_layout_of_the_qkv_projection():
    qkv = torch.randn(2, 50, 3, 4, 32).permute(2, 0, 3, 1, 4)
    q, k = qkv[0][:, :, 0].contiguous(), qkv[1]
    assert not k.is_contiguous()
    got = model.run("cls_scores", {"q": q, "k": k}, (0.2, 1))[0]
    assert torch.allclose(got, reference.cls_scores(q, k, scale=0.2), atol=1e-6)


def library(reduce_float):
    return model.load(model.build(reduce_float=reduce_float))


@pytest.mark.parametrize("reduce_float", [False, True])
@pytest.mark.parametrize("width", [8, 24, 64, 72, 128, 520])
def test_dot_products_of_every_width_with_and_without_the_sum_across_lanes(width, reduce_float):
    q, k = torch.randn(3, 2, width), torch.randn(3, 2, 41, width)
    args = {"q": q, "k": k}
    got = model.run("cls_scores", args, (width**-0.5, 2), 2, library(reduce_float))[0]
    assert torch.allclose(got, reference.cls_scores(q, k, num_prefix_tokens=2), atol=1e-6)


@pytest.mark.parametrize("reduce_float", [False, True])
@pytest.mark.parametrize("channels", [8, 72, 384, 2056])  # more than 255 blocks: another way to add
@pytest.mark.parametrize("patches", [3, 7, 8, 15, 31, 37, 64, 100])
@pytest.mark.parametrize("heads, scores_dtype", [(None, torch.float32), (3, torch.float16)])
def test_the_gradient_to_scores_of_every_length(
    patches, channels, heads, scores_dtype, reduce_float
):
    """Pieces of an image end anywhere; no block may reach into another core's."""
    x, fused = torch.randn(3, 2 + patches, channels), torch.randn(3, 3 + patches // 3, channels)
    shape = (3, patches) if heads is None else (3, heads, patches)
    scores = torch.rand(shape).to(scores_dtype)
    index = reference.gather_topk(x, scores, patches // 3, num_prefix_tokens=2)[1]
    args = {"grad": fused, "x": x, "scores": scores, "index": index}
    want = reference.gather_topk_fuse_backward(fused, x, scores, index)
    for cores in (1, 5, 32):
        got = model.run("gather_topk_fuse_backward", args, (), cores, library(reduce_float))
        assert torch.equal(got[0], want[0])
        assert torch.allclose(got[1].float(), want[1].float(), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("cores", [1, 2, 9])
def test_an_entry_that_takes_no_row_gets_a_gradient_of_zero(cores):
    """Out of range, or a row that a later entry takes: nothing stale may come out."""
    grad = torch.randn(3, 9, 8)
    index = torch.tensor([[4, -1, 4, 2**40], [8, 0, 8, 8], [1, 3, 3, 7]])
    grad_x, grad_tokens, _ = model.run(
        "scatter_back_backward", {"grad": grad, "index": index}, (0,), cores
    )
    taken = torch.zeros(3, 4, 8)
    for image, entry in ((0, 2), (1, 1), (1, 3), (2, 0), (2, 2), (2, 3)):
        taken[image, entry] = grad[image, index[image, entry]]
    assert torch.equal(grad_tokens, taken)
    left = grad.clone()
    left[0, 4] = left[1, [0, 8]] = left[2, [1, 3, 7]] = 0
    assert torch.equal(grad_x, left)


def test_prefix_rows_that_the_index_does_not_name_take_no_gradient():
    x, scores, grad = torch.randn(2, 43, 8), torch.rand(2, 40), torch.randn(2, 4, 8)
    index = torch.tensor([[1, 9, 30], [5, 40, 42]])  # of three prefix rows one, and none
    args = {"grad": grad, "x": x, "scores": scores, "index": index}
    got = model.run("gather_topk_fuse_backward", args, (), 2)
    want = reference.gather_topk_fuse_backward(grad, x, scores, index)
    assert torch.equal(got[0], want[0]) and torch.allclose(got[1], want[1], atol=1e-5)


@pytest.mark.parametrize("ascending", [False, True])
def test_the_rows_that_are_summed_are_those_that_an_index_in_any_order_leaves(ascending):
    """More than 64 rows: which are named is kept in words of 64 bits."""
    grad = torch.randn(3, 200, 16)
    index = torch.stack([torch.randperm(200)[:77] for _ in range(3)])
    index = index.sort().values if ascending else index
    got = model.run("scatter_back_backward", {"grad": grad, "index": index}, (1,), 3)
    want = reference.scatter_back_backward(grad, index, True)
    same(got[:2], want[:2])
    assert torch.allclose(got[2], want[2], atol=1e-4)


def test_the_search_finds_a_value_wherever_it_lies():
    """Two patches that tie, one kept: no threshold ends the search before it has their value."""
    bits = torch.cat(
        [torch.randint(-(2**31), 2**31, (3000,)), 2**16 * torch.randint(-(2**15), 2**15, (3000,))]
    )
    scores = bits.to(torch.int32).view(torch.float32)[:, None].expand(-1, 2).contiguous()
    x = torch.randn(len(bits), 2, 8)
    index = model.run("gather_topk", {"x": x, "scores": scores}, (1, 0), 1)[1]
    assert bool((index == 0).all())


LAUNCHES = {
    "cls_scores": 1, "gather_topk": 1, "gather_topk_fuse": 2, "gather_topk_fuse_backward": 1,
    "gather_rows": 1, "gather_rows_backward": 1, "scatter_back": 1, "scatter_back, update": 1,
    "scatter_back_backward": 1, "scatter_back_backward, update": 2,
}  # fmt: skip


@pytest.mark.parametrize("reduce_float", [False, True])
def test_every_launch_keeps_its_share_of_bandwidth_by_the_assumed_costs(reduce_float):
    """As docs/results/ascend_counts.md; in float16, where fewest bytes hide the rest."""
    rows = counts.rows(reduce_float, dtypes=(torch.float16,))
    for row in rows:
        assert row.launches == LAUNCHES[row.operator], row.operator
        if reduce_float or row.operator not in counts.SUMMING:
            floor = counts.FLOORS.get(row.operator, counts.FLOOR)
            assert row.share >= floor, (row.operator, row.count)


def test_the_page_of_counts_is_of_these_kernels():
    """Its float16 rows; the floats of a count depend on the scores that this torch draws."""
    page = counts.RESULT.read_text()
    for row in counts.rows(False, dtypes=(torch.float16,)):
        c = row.count
        cells = [row.operator, "float16", f"{row.launch + 1} of {row.launches}", c.kernel]
        assert f"| {' | '.join(cells)} | {c.instructions} | {c.scalars} |" in page


# ------------------------------------------------------------------------------ limits

ROWS = torch.randn(2, 9, 16)
INDEX = torch.tensor([[0, 3], [2, 5]])
SCORES = torch.rand(2, 8)
REFUSED = {
    "bfloat16": (
        lambda: model.gather_topk(ROWS.bfloat16(), SCORES, 3),
        TypeError,
        r"x must be float32 or float16 on Ascend910A, got bfloat16: .* use float16",
    ),
    "float64": (lambda: model.gather_rows(ROWS.double(), INDEX), TypeError, "got float64"),
    "bfloat16 scores": (
        lambda: model.gather_topk(ROWS, SCORES.bfloat16(), 3),
        TypeError,
        "scores must be float32 or float16",
    ),
    "width": (
        lambda: model.gather_rows(ROWS[..., :12].half(), INDEX),
        ValueError,
        r"x must have a last dimension that is a multiple of 16 on Ascend910A .*, got 12: pad it",
    ),
    "wide rows": (
        lambda: model.gather_rows(torch.zeros(1, 1, 8200), INDEX[:1, :1]),
        ValueError,
        "at most 8192 on Ascend910A, got 8200",
    ),
    "tokens": (
        lambda: model.gather_topk(torch.zeros(1, 4097, 8), torch.zeros(1, 4096), 3),
        ValueError,
        "x must have at most 4096 tokens on Ascend910A, got 4097",
    ),
    "tokens of the gradient": (
        lambda: model.gather_rows_backward(ROWS[:, :2], INDEX, 5000),
        ValueError,
        "at most 4096 tokens .* got 5000",
    ),
    "buffer": (
        lambda: model.gather_topk_fuse_backward(
            torch.zeros(1, 3, 8192), torch.zeros(1, 4096, 8192), torch.zeros(1, 4095), INDEX[:1]
        ),
        ValueError,
        "unified buffer of 248 KB",
    ),
    "repeated rows": (
        lambda: model.gather_rows(ROWS[:, :1], INDEX),
        ValueError,
        "index must name each of the 1 rows of x at most once, got 2 entries",
    ),
    "index dtype": (lambda: model.gather_rows(ROWS, INDEX.int()), TypeError, "index must be int64"),
    "num_keep": (
        lambda: model.gather_topk(ROWS, SCORES, 9),
        ValueError,
        r"num_keep must be in \[0, 8\], got 9",
    ),
    "head width": (
        lambda: model.cls_scores(torch.randn(1, 2, 12).half(), torch.randn(1, 2, 5, 12).half()),
        ValueError,
        "k must have a last dimension that is a multiple of 16",
    ),
    "mixed dtypes": (
        lambda: model.scatter_back(ROWS, ROWS[:, :2].half(), INDEX),
        TypeError,
        "tokens must have the dtype of x, float32, got float16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_chip_cannot_do_is_refused_by_name(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_only_the_chips_that_the_kernels_are_built_for_are_not_refused():
    for part in ("A", "ProA", "PremiumA", "ProB", "B"):
        assert model.refuse_chip(f"Ascend910{part}") == ""
    for name in ("Ascend910B1", "Ascend910_9391", "Ascend310P3", "Ascend910", ""):
        assert model.refuse_chip(name).endswith(f"without a digit), got {name}")
    assert model.refuse_chip(None).endswith("got a chip without a name")
