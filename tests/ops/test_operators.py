"""One suite for every backend's launchers: each is held against the reference.

Row moves and indices must agree bit for bit. Sums are bounded by the rounding of a sum of m terms
in float32, (m + 2) * eps * sum(|terms|), plus half a unit of the output's last place.
"""

import math

import pytest
import torch
from backend_matrix import ALL_DTYPES, BACKENDS, ulp

from skipvit_kernels import reference

pytestmark = pytest.mark.usefixtures("poisoned")

# (B, n, P, C, K): real ViTs, then odd and empty ones.
SIZES = [
    (2, 196, 1, 384, 89),
    (1, 576, 1, 192, 260),
    (3, 37, 5, 33, 17),
    (2, 256, 2, 7, 1),
    (5, 64, 0, 1, 64),
    (2, 50, 1, 16, 0),
    (2, 0, 3, 8, 0),
    (0, 12, 1, 8, 4),
    (1, 2100, 1, 3, 1111),
]
IDS = ["x".join(map(str, size)) for size in SIZES]


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=ALL_DTYPES, ids=str)
def dtype(request):
    return request.param


def make(backend, size, dtype, heads=None):
    batch, patches, prefix, channels, num_keep = size
    x = torch.randn(batch, prefix + patches, backend.channels(channels, dtype)).to(dtype)
    shape = (batch, patches) if heads is None else (batch, heads, patches)
    scores = torch.rand(shape)
    return x.to(backend.device), scores.to(backend.device), num_keep, prefix


def same_bits(got, expected):
    """Equal, NaN payloads included, and laid out as the fakes promise."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert got.is_contiguous()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    assert torch.equal(got.cpu().view(bits), expected.cpu().contiguous().view(bits))


def within(got, exact, bound):
    """|got - exact| <= bound, elementwise, in float64; NaN nowhere."""
    assert got.is_contiguous()
    error = (got.double() - exact.double()).abs()
    assert bool((error <= bound).all()), f"worst excess {(error - bound).max().item():.3g}"


def strided(tensor, how):
    """The same values in another layout."""
    if how == "contiguous":
        return tensor
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "offset":  # rows inside a larger, padded buffer, whose rest is NaN
        sizes = [size + 3 for size in tensor.shape]
        padded = tensor.new_full(sizes, math.nan if tensor.is_floating_point() else -1)
        view = padded[tuple(slice(1, 1 + size) for size in tensor.shape)]
        view.copy_(tensor)
        return view
    if how == "every other channel":
        view = torch.stack([tensor, torch.full_like(tensor, 7)], dim=-1)[..., 0]
        assert torch.equal(view, tensor)
        return view
    raise AssertionError(how)


LAYOUTS = ["contiguous", "transposed", "offset", "every other channel"]


# ------------------------------------------------------------------------- gather_topk


@pytest.mark.parametrize("size", SIZES, ids=IDS)
@pytest.mark.parametrize("heads", [None, 1, 6])
def test_gather_topk(backend, dtype, size, heads):
    x, scores, num_keep, prefix = make(backend, size, dtype, heads)
    launch = backend.launcher("gather_topk")
    tokens, index = launch(x, scores, num_keep, num_prefix_tokens=prefix)
    expected = reference.gather_topk(x, scores, num_keep, num_prefix_tokens=prefix)
    same_bits(tokens, expected[0])
    same_bits(index, expected[1])


@pytest.mark.parametrize("scores_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [None, 3, 12])
def test_gather_topk_of_low_precision_scores_ties(backend, scores_dtype, heads):
    """196 scores in bfloat16 tie often: the lower position must win, on the float32 mean."""
    launch = backend.launcher("gather_topk")
    shape = (4, 196) if heads is None else (4, heads, 196)
    scores = torch.softmax(torch.randn(shape), -1).to(scores_dtype).to(backend.device)
    x = torch.randn(4, 197, 8, device=backend.device)
    for num_keep in (1, 89, 195):
        _, index = launch(x, scores, num_keep, num_prefix_tokens=1)
        same_bits(index, reference.gather_topk(x, scores, num_keep)[1])


ADVERSE = {
    "all equal": lambda s: torch.zeros_like(s),
    "two values": lambda s: (s > 0.5).to(s.dtype),
    "signed zeros": lambda s: torch.where(s > 0.5, 0.0, -0.0),
    "all NaN": lambda s: torch.full_like(s, math.nan),
    "some NaN": lambda s: torch.where(s > 0.7, math.nan, s),
    "negative NaN": lambda s: torch.where(s > 0.7, -torch.full_like(s, math.nan), s),
    "infinities": lambda s: torch.where(s > 0.7, math.inf, torch.where(s < 0.3, -math.inf, s)),
    "everything": lambda s: torch.where(
        s > 0.8, math.nan, torch.where(s > 0.6, math.inf, torch.where(s < 0.2, -math.inf, -s))
    ),
    "denormal": lambda s: s * 1e-43,
    "huge": lambda s: (s - 0.5) * 3e38,
    "neighbours": lambda s: 1 + (s * 5).floor() * 2**-23,
    "ascending": lambda s: torch.arange(s.numel(), dtype=s.dtype, device=s.device).view_as(s),
    "descending": lambda s: -torch.arange(s.numel(), dtype=s.dtype, device=s.device).view_as(s),
}


@pytest.mark.parametrize("scores_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("adverse", ADVERSE)
@pytest.mark.parametrize("heads", [None, 2])
def test_gather_topk_selects_by_contract_whatever_the_scores(backend, adverse, heads, scores_dtype):
    launch = backend.launcher("gather_topk")
    shape = (3, 50) if heads is None else (3, heads, 50)
    scores = ADVERSE[adverse](torch.rand(shape)).to(scores_dtype).to(backend.device)
    if backend.saturates and heads and not scores.isfinite().all():
        pytest.skip(f"{backend.name} has no infinities and NaNs to average")
    x = torch.randn(3, 51, backend.channels(4, torch.float32), device=backend.device)
    for num_keep in (0, 1, 22, 49, 50):
        tokens, index = launch(x, scores, num_keep, num_prefix_tokens=1)
        expected = reference.gather_topk(x, scores, num_keep)
        same_bits(index, expected[1])
        same_bits(tokens, expected[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scores_layout", LAYOUTS)
def test_gather_topk_reads_any_layout(backend, dtype, layout, scores_layout):
    x, scores, num_keep, prefix = make(backend, (3, 37, 2, 24, 17), dtype, heads=3)
    launch = backend.launcher("gather_topk")
    got = launch(
        strided(x, layout), strided(scores, scores_layout), num_keep, num_prefix_tokens=prefix
    )
    expected = reference.gather_topk(x, scores, num_keep, num_prefix_tokens=prefix)
    same_bits(got[0], expected[0])
    same_bits(got[1], expected[1])


def test_gather_topk_reads_expanded_tensors(backend):
    launch = backend.launcher("gather_topk")
    channels = backend.channels(5, torch.float32)
    x = torch.randn(1, 21, channels, device=backend.device).expand(4, -1, -1)
    scores = torch.rand(1, 20, device=backend.device).expand(4, -1)
    tokens, index = launch(x, scores, 7, num_prefix_tokens=1)
    expected = reference.gather_topk(x, scores, 7)
    same_bits(tokens, expected[0])
    same_bits(index, expected[1])


def test_moved_rows_keep_every_bit(backend):
    """NaN payloads, infinities and signed zeros are data like any other."""
    launch = backend.launcher("gather_topk")
    bits = torch.randint(-(2**31), 2**31 - 1, (2, 21, 16), dtype=torch.int32)
    x = bits.to(backend.device).view(torch.float32)
    scores = torch.rand(2, 20, device=backend.device)
    tokens, index = launch(x, scores, 9, num_prefix_tokens=1)
    rows = torch.arange(2, device=backend.device)[:, None]
    assert torch.equal(tokens.view(torch.int32), x.view(torch.int32)[rows, index])


# ------------------------------------------------------------- gather_rows and backward


@pytest.mark.parametrize("size", SIZES, ids=IDS)
def test_gather_rows_and_backward(backend, dtype, size):
    x, scores, num_keep, prefix = make(backend, size, dtype)
    index = reference.gather_topk(x, scores, num_keep, num_prefix_tokens=prefix)[1]
    same_bits(backend.launcher("gather_rows")(x, index), reference.gather_rows(x, index))
    grad = torch.randn(*index.shape, x.shape[2]).to(x)
    same_bits(
        backend.launcher("gather_rows_backward")(grad, index, x.shape[1]),
        reference.gather_rows_backward(grad, index, x.shape[1]),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_moves_read_any_layout_and_order(backend, layout):
    x = torch.randn(3, 20, 8, device=backend.device)
    index = torch.stack([torch.randperm(20)[:9] for _ in range(3)]).to(backend.device)
    for view in (index, strided(index, "offset"), strided(index, "transposed")):
        same_bits(
            backend.launcher("gather_rows")(strided(x, layout), view),
            x[torch.arange(3, device=backend.device)[:, None], index],
        )
        grad = torch.randn(3, 9, 8, device=backend.device)
        same_bits(
            backend.launcher("gather_rows_backward")(strided(grad, layout), view, 20),
            reference.gather_rows_backward(grad, index, 20),
        )
    ones = torch.ones((), device=backend.device).expand(3, 9, 8)  # the gradient of a sum
    same_bits(
        backend.launcher("gather_rows_backward")(ones, index, 20),
        reference.gather_rows_backward(ones, index, 20),
    )


# ------------------------------------------------------------ scatter_back and backward


@pytest.mark.parametrize("with_update", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=IDS)
def test_scatter_back_and_backward(backend, dtype, size, with_update):
    x, scores, num_keep, prefix = make(backend, size, dtype)
    tokens, index = reference.gather_topk(x, scores, num_keep, num_prefix_tokens=prefix)
    tokens = torch.randn(tokens.shape).to(x)
    update = torch.randn(x.shape[0], x.shape[2]).to(x) if with_update else None
    got = backend.launcher("scatter_back")(x, tokens, index, update=update)
    same_bits(got, reference.scatter_back(x, tokens, index, update=update))

    grad = torch.randn(x.shape).to(x)
    got = backend.launcher("scatter_back_backward")(grad, index, with_update)
    expected = reference.scatter_back_backward(grad, index, with_update)
    same_bits(got[0], expected[0])
    same_bits(got[1], expected[1])
    if with_update:
        exact = reference.scatter_back_backward(grad.double(), index, True)[2]
        terms = expected[0].double().abs().sum(1)
        accumulate = torch.promote_types(dtype, torch.float32)
        bound = (x.shape[1] + 2) * ulp(accumulate) * terms + ulp(dtype) / 2 * exact.abs()
        within(got[2], exact, bound)
    else:
        assert got[2].shape == (0,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scatter_back_reads_any_layout_and_order(backend, dtype, layout):
    device, channels = backend.device, backend.channels(8, dtype)
    x = torch.randn(3, 20, channels).to(device, dtype)
    tokens = torch.randn(3, 9, channels).to(device, dtype)
    index = torch.stack([torch.randperm(20)[:9] for _ in range(3)]).to(device)
    update = torch.randn(3, channels).to(device, dtype)
    expected = reference.scatter_back(x, tokens, index, update=update)
    launch = backend.launcher("scatter_back")
    for view in (index, strided(index, "offset")):
        same_bits(
            launch(
                strided(x, layout), strided(tokens, layout), view, update=strided(update, layout)
            ),
            expected,
        )
    grad = torch.randn(3, 20, channels).to(device, dtype)
    got = backend.launcher("scatter_back_backward")(strided(grad, layout), index, False)
    want = reference.scatter_back_backward(grad, index, False)
    same_bits(got[0], want[0])
    same_bits(got[1], want[1])


def test_scatter_back_leaves_its_inputs_alone(backend):
    channels = backend.channels(4, torch.float32)
    x = torch.randn(2, 9, channels, device=backend.device)
    tokens = torch.randn(2, 3, channels, device=backend.device)
    index = torch.tensor([[0, 4, 8], [0, 1, 2]], device=backend.device)
    before = x.clone(), tokens.clone(), index.clone()
    backend.launcher("scatter_back")(x, tokens, index)
    assert all(torch.equal(a, b) for a, b in zip((x, tokens, index), before, strict=True))


# -------------------------------------------------------------------- gather_topk_fuse


@pytest.mark.parametrize("size", SIZES, ids=IDS)
@pytest.mark.parametrize("heads", [None, 3])
def test_gather_topk_fuse_and_backward(backend, dtype, size, heads):
    x, scores, num_keep, prefix = make(backend, size, dtype, heads)
    launch = backend.launcher("gather_topk_fuse")
    tokens, index = launch(x, scores, num_keep, num_prefix_tokens=prefix)
    kept, expected_index = reference.gather_topk(x, scores, num_keep, num_prefix_tokens=prefix)
    same_bits(index, expected_index)
    same_bits(tokens[:, :-1].contiguous(), kept)

    accumulate = torch.promote_types(dtype, torch.float32)
    _, dropped = reference.select(scores, num_keep)
    rows = reference.gather_rows(x, dropped + prefix).double()
    weights = reference.head_mean(scores).gather(1, dropped).double()[..., None]
    exact = (weights * rows).sum(1)
    terms = (weights * rows).abs().sum(1)
    bound = (dropped.shape[1] + 2) * ulp(accumulate) * terms + ulp(dtype) / 2 * exact.abs()
    # Underflow: a sum below the smallest normal number of the dtype is rounded absolutely.
    within(tokens[:, -1].contiguous(), exact, bound + torch.finfo(dtype).tiny)

    grad = torch.randn(tokens.shape).to(x)
    launch = backend.launcher("gather_topk_fuse_backward")
    grad_x, grad_scores = launch(grad, x, scores, index)
    want_x, _ = reference.gather_topk_fuse_backward(grad, x, scores, index)
    same_bits(grad_x, want_x)
    exact = reference.gather_topk_fuse_backward(grad.double(), x.double(), scores.double(), index)[
        1
    ]
    terms = (x.double() * grad[:, -1:].double()).abs().sum(-1)[:, prefix:]
    if heads:
        terms = terms[:, None] / heads
    within(grad_scores, exact, (x.shape[2] + 3) * ulp(torch.float32) * terms)
    kept_patches = index[:, prefix:] - prefix
    if heads:
        kept_patches = kept_patches[:, None].expand(-1, heads, -1)
    assert bool((grad_scores.gather(-1, kept_patches) == 0).all())


def test_a_prefix_token_that_was_not_kept_gets_no_gradient(backend):
    """Its row is +0, not the fused token's negative gradient times a weight of 0."""
    x, scores, num_keep, _ = make(backend, (2, 20, 2, 24, 9), torch.float32)
    index = reference.gather_topk(x, scores, num_keep, num_prefix_tokens=2)[1][:, 1:].contiguous()
    grad = torch.randn(2, index.shape[1] + 1, x.shape[2]).to(x)
    grad[:, -1] = -1e30 if backend.saturates else -math.inf
    got, _ = backend.launcher("gather_topk_fuse_backward")(grad, x, scores, index)
    want, _ = reference.gather_topk_fuse_backward(grad, x, scores, index)
    assert bool((want[:, 0] == 0).all())
    same_bits(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_topk_fuse_reads_any_layout(backend, layout):
    x, scores, num_keep, prefix = make(backend, (3, 37, 2, 24, 17), torch.float32, heads=3)
    launch = backend.launcher("gather_topk_fuse")
    expected = launch(x, scores, num_keep, num_prefix_tokens=prefix)
    got = launch(strided(x, layout), strided(scores, layout), num_keep, num_prefix_tokens=prefix)
    same_bits(got[0], expected[0])
    same_bits(got[1], expected[1])
    launch = backend.launcher("gather_topk_fuse_backward")
    grad = torch.randn(3, 20, 24, device=backend.device)
    expected = launch(grad, x, scores, got[1])
    got = launch(strided(grad, layout), strided(x, layout), strided(scores, layout), got[1])
    same_bits(got[0], expected[0])
    same_bits(got[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_nan_of_all_ones_stays_nan_in_16_bits(backend, dtype):
    """Rounded like a number, its bits run over into the sign and it becomes -0."""
    if backend.name != "cpu":
        pytest.skip(f"{backend.name} rounds by an instruction of its own")
    x, scores, num_keep, prefix = make(backend, (2, 20, 1, 70, 9), dtype)
    scores.view(torch.int32).fill_(0x7FFFFFFF)
    tokens, index = backend.launcher("gather_topk_fuse")(
        x, scores, num_keep, num_prefix_tokens=prefix
    )
    grad_x, _ = backend.launcher("gather_topk_fuse_backward")(
        torch.ones_like(tokens), x, scores, index
    )
    assert bool(tokens[:, -1].isnan().all())
    assert bool(grad_x[:, prefix + num_keep :].isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_rounded_as_torch_rounds(backend, dtype):
    """Subnormals, infinities and NaN too: a processor's own conversion may flush the first to 0."""
    if backend.name != "cpu":
        pytest.skip(f"{backend.name} rounds by an instruction of its own")

    def same_numbers(got, want):
        assert torch.equal(got.isnan(), want.isnan())
        same_bits(got.where(~got.isnan(), 1), want.where(~want.isnan(), 1))

    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    tiny, largest = torch.ones(1, dtype=torch.int16).view(dtype).item(), torch.finfo(dtype).max
    others = torch.tensor([0.0, -0.0, tiny, -3 * tiny, 1e-3, -1.0, largest, math.inf, math.nan])
    count = len(others)
    x = torch.stack([every, every.flip(0)])[None].expand(count, -1, -1)  # row 0 is replaced
    update = others.to(dtype)[:, None].expand(-1, len(every))
    index = torch.zeros(count, 1, dtype=torch.int64)
    args = (x, torch.ones(count, 1, len(every), dtype=dtype), index)
    got = backend.launcher("scatter_back")(*args, update=update)
    same_numbers(got, reference.scatter_back(*args, update=update))

    grad = torch.stack([torch.ones_like(every), every])[None]  # of the prefix token and the fused
    x, scores = torch.ones(1, 1 + count, len(every), dtype=dtype), others[None].abs()
    args = (grad, x, scores, torch.zeros(1, 1, dtype=torch.int64))
    got = backend.launcher("gather_topk_fuse_backward")(*args)[0]
    same_numbers(got, reference.gather_topk_fuse_backward(*args)[0])


def test_a_kept_row_never_reaches_the_fused_one(backend):
    x = torch.randn(2, 10, backend.channels(4, torch.float32), device=backend.device)
    scores = torch.arange(9.0, device=backend.device).expand(2, -1)
    x[:, 5:] = math.nan  # the 5 best patches
    tokens, _ = backend.launcher("gather_topk_fuse")(x, scores, 5, num_prefix_tokens=1)
    assert bool(tokens[:, -1].isfinite().all())


# -------------------------------------------------------------------------- cls_scores


def cls_inputs(backend, dtype, batch, heads, num_tokens, width, layout):
    """q and k as they come out of timm's qkv projection, or with k contiguous per head."""
    width = backend.channels(width, dtype)
    qkv = torch.randn(batch, num_tokens, 3, heads, width).to(backend.device, dtype)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, 0], k.contiguous() if layout == "per head" else k


def check_cls_scores(got, q, k, scale, prefix):
    exact_q, exact_k = q.double(), k.double()
    logits = torch.einsum("bhd,bhnd->bhn", exact_q, exact_k) * scale
    exact = logits.softmax(-1).mean(1)[:, prefix:]
    if exact.numel() == 0:
        assert got.shape == exact.shape
        return
    # An error of e in the logits changes a softmax by a factor of at most exp(2 e).
    terms = torch.einsum("bhd,bhnd->bhn", exact_q.abs(), exact_k.abs()) * abs(scale)
    eps = ulp(torch.float32)
    logit_error = (q.shape[-1] + 3) * eps * terms.max()
    # exp, the sum over N keys, the division and the mean over H heads round as well.
    relative = 2 * logit_error + (k.shape[2] + q.shape[1] + 8) * eps
    within(got, exact, relative * exact + torch.finfo(torch.float32).tiny)


@pytest.mark.parametrize("layout", ["qkv", "per head"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 6, 197, 64, 1),
        (1, 12, 577, 64, 1),
        (3, 3, 42, 72, 5),
        (2, 1, 9, 1, 0),
        (2, 4, 3, 33, 3),
        (0, 3, 9, 8, 1),
        (1, 2, 1500, 80, 2),
    ],
    ids=str,
)
def test_cls_scores(backend, dtype, shape, layout):
    batch, heads, num_tokens, width, prefix = shape
    q, k = cls_inputs(backend, dtype, batch, heads, num_tokens, width, layout)
    scale = width**-0.5
    launch = backend.launcher("cls_scores")
    got = launch(q, k, scale=scale, num_prefix_tokens=prefix)
    assert got.dtype == torch.float32
    check_cls_scores(got, q, k, scale, prefix)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cls_scores_reads_any_layout(backend, dtype, layout):
    q, k = cls_inputs(backend, dtype, 2, 3, 20, 8, "per head")
    got = backend.launcher("cls_scores")(
        strided(q, layout), strided(k, layout), scale=0.3, num_prefix_tokens=1
    )
    check_cls_scores(got, q, k, 0.3, 1)


def test_cls_scores_of_large_logits_do_not_overflow(backend):
    width = backend.channels(4, torch.float32)
    q = torch.full((1, 2, width), 100.0, device=backend.device)
    k = torch.randn(1, 2, 9, width, device=backend.device) * 100
    got = backend.launcher("cls_scores")(q, k, scale=1.0, num_prefix_tokens=1)
    assert bool(got.isfinite().all())
    winner = (q[:, :, None] * k).sum(-1).double().softmax(-1).mean(1)[:, 1:]
    assert torch.allclose(got.double(), winner, atol=1e-6)


def test_cls_scores_of_nan_are_nan_for_that_image_only(backend):
    if backend.saturates:
        pytest.skip(f"{backend.name} has no NaN")
    q, k = cls_inputs(backend, torch.float32, 2, 3, 20, 8, "qkv")
    k = k.clone()
    k[1, 2, 7, 3] = math.nan
    got = backend.launcher("cls_scores")(q, k, scale=1.0, num_prefix_tokens=1)
    assert bool(got[0].isfinite().all()) and bool(got[1].isnan().all())


# ------------------------------------------------------------------- what all promise


def test_the_same_bits_every_run(backend):
    x, scores, num_keep, prefix = make(backend, (8, 196, 1, 64, 89), torch.float32, heads=3)
    grad = torch.randn(x.shape, device=backend.device)

    def everything():
        tokens, index = backend.launcher("gather_topk_fuse")(
            x, scores, num_keep, num_prefix_tokens=prefix
        )
        back = backend.launcher("gather_topk_fuse_backward")(tokens, x, scores, index)
        scattered = backend.launcher("scatter_back_backward")(grad, index, True)
        return [tokens, index, *back, *scattered]

    first = everything()
    for _ in range(10):
        for a, b in zip(first, everything(), strict=True):
            same_bits(a, b)


@pytest.mark.parametrize("batch", [1, 4])
def test_threads_do_not_change_a_bit(backend, batch):
    """More threads than images, fewer, and sizes that do not divide: over the grain of 64 KiB."""
    if backend.name != "cpu":
        pytest.skip(f"{backend.name} does not run on torch's CPU threads")
    x, scores, num_keep, prefix = make(backend, (batch, 196, 1, 384, 89), torch.float32, heads=3)
    q, k = cls_inputs(backend, torch.float32, batch, 6, 197, 64, "qkv")
    grad, update = torch.randn(x.shape), torch.randn(batch, 384)

    def everything():
        tokens, index = backend.launcher("gather_topk")(
            x, scores, num_keep, num_prefix_tokens=prefix
        )
        fused, _ = backend.launcher("gather_topk_fuse")(
            x, scores, num_keep, num_prefix_tokens=prefix
        )
        return [
            backend.launcher("cls_scores")(q, k, scale=0.125, num_prefix_tokens=1),
            tokens,
            index,
            fused,
            *backend.launcher("gather_topk_fuse_backward")(fused, x, scores, index),
            backend.launcher("gather_rows")(x, index),
            backend.launcher("gather_rows_backward")(tokens, index, 197),
            backend.launcher("scatter_back")(x, tokens, index, update=update),
            *backend.launcher("scatter_back_backward")(grad, index, True),
        ]

    expected = everything()
    try:
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for got, want in zip(everything(), expected, strict=True):
                same_bits(got, want)
    finally:
        torch.set_num_threads(1)


def test_an_image_gets_the_same_bits_alone_and_in_a_batch(backend):
    x, scores, num_keep, prefix = make(backend, (5, 100, 1, 32, 45), torch.float32, heads=3)
    q, k = cls_inputs(backend, torch.float32, 5, 3, 101, 16, "qkv")
    fuse, score = backend.launcher("gather_topk_fuse"), backend.launcher("cls_scores")
    tokens, index = fuse(x, scores, num_keep, num_prefix_tokens=prefix)
    batched = score(q, k, scale=0.25, num_prefix_tokens=1)
    for b in range(5):
        alone = fuse(x[b : b + 1], scores[b : b + 1], num_keep, num_prefix_tokens=prefix)
        same_bits(alone[0], tokens[b : b + 1])
        same_bits(alone[1], index[b : b + 1])
        same_bits(
            score(q[b : b + 1], k[b : b + 1], scale=0.25, num_prefix_tokens=1), batched[b : b + 1]
        )


@pytest.mark.parametrize(
    "operator", ["gather_rows", "gather_rows_backward", "scatter_back", "scatter_back_backward"]
)
@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_rows_out_of_range_are_refused_on_the_cpu(backend, operator, bad):
    if not backend.checks_index:
        pytest.skip(f"{backend.name} cannot look at an index without a synchronisation")
    launch = backend.launcher(operator)
    index = torch.tensor([[0, 3], [2, bad]])
    rows = torch.randn(2, 2, 4)
    arguments = {
        "gather_rows": (torch.randn(2, 9, 4), index),
        "gather_rows_backward": (rows, index, 9),
        "scatter_back": (torch.randn(2, 9, 4), rows, index),
        "scatter_back_backward": (torch.randn(2, 9, 4), index, False),
    }
    with pytest.raises((ValueError, RuntimeError), match=rf"index .*\[0, 9\).* got {bad}"):
        launch(*arguments[operator])


@pytest.mark.parametrize(
    "operator", ["gather_rows_backward", "scatter_back", "scatter_back_backward"]
)
def test_rows_given_twice_are_refused_on_the_cpu(backend, operator):
    if not backend.checks_index:
        pytest.skip(f"{backend.name} cannot look at an index without a synchronisation")
    launch = backend.launcher(operator)
    index = torch.tensor([[0, 3], [5, 5]])
    rows = torch.randn(2, 2, 4)
    arguments = {
        "gather_rows_backward": (rows, index, 9),
        "scatter_back": (torch.randn(2, 9, 4), rows, index),
        "scatter_back_backward": (torch.randn(2, 9, 4), index, False),
    }
    with pytest.raises((ValueError, RuntimeError), match=r"index .*5 twice in image 1"):
        launch(*arguments[operator])
