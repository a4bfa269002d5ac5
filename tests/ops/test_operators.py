"""One suite for every backend's launchers: each is held against the reference.

Row moves and indices must agree bit for bit. Sums are bounded by the rounding of a sum of m terms
in float32, (m + 2) * eps * sum(|terms|), plus half a unit of the output's last place.
"""

import math

import pytest
import torch
from backend_matrix import ALL_DTYPES, BACKENDS, COMPARING, INTERPRETING, MERGING, ulp

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


def check_fused(fused, x, scores, num_keep, prefix):
    """The last row, (B, C): the dropped rows' sum by their scores."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    _, dropped = reference.select(scores, num_keep)
    rows = reference.gather_rows(x, dropped + prefix).double()
    weights = reference.head_mean(scores).gather(1, dropped).double()[..., None]
    exact = (weights * rows).sum(1)
    terms = (weights * rows).abs().sum(1)
    bound = (dropped.shape[1] + 2) * ulp(accumulate) * terms + ulp(x.dtype) / 2 * exact.abs()
    # Underflow: a sum below the smallest normal number of the dtype is rounded absolutely.
    within(fused.contiguous(), exact, bound + torch.finfo(x.dtype).tiny)


def check_grad_scores(grad_scores, grad, x, scores, index):
    exact = reference.gather_topk_fuse_backward(grad.double(), x.double(), scores.double(), index)[
        1
    ]
    terms = (x.double() * grad[:, -1:].double()).abs().sum(-1)[:, x.shape[1] - scores.shape[-1] :]
    if scores.dim() == 3:
        terms = terms[:, None] / scores.shape[1]
    within(grad_scores, exact, (x.shape[2] + 3) * ulp(torch.float32) * terms)


@pytest.mark.parametrize("size", SIZES, ids=IDS)
@pytest.mark.parametrize("heads", [None, 3])
def test_gather_topk_fuse_and_backward(backend, dtype, size, heads):
    x, scores, num_keep, prefix = make(backend, size, dtype, heads)
    launch = backend.launcher("gather_topk_fuse")
    tokens, index = launch(x, scores, num_keep, num_prefix_tokens=prefix)
    kept, expected_index = reference.gather_topk(x, scores, num_keep, num_prefix_tokens=prefix)
    same_bits(index, expected_index)
    same_bits(tokens[:, :-1].contiguous(), kept)

    check_fused(tokens[:, -1], x, scores, num_keep, prefix)

    grad = torch.randn(tokens.shape).to(x)
    launch = backend.launcher("gather_topk_fuse_backward")
    grad_x, grad_scores = launch(grad, x, scores, index)
    want_x, _ = reference.gather_topk_fuse_backward(grad, x, scores, index)
    same_bits(grad_x, want_x)
    check_grad_scores(grad_scores, grad, x, scores, index)
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
    """What is moved has the same bits; in another layout sums may be added up in another order."""
    x, scores, num_keep, prefix = make(backend, (3, 37, 2, 24, 17), torch.float32, heads=3)
    laid = strided(x, layout), strided(scores, layout)
    launch = backend.launcher("gather_topk_fuse")
    tokens, index = launch(*laid, num_keep, num_prefix_tokens=prefix)
    kept, expected_index = reference.gather_topk(x, scores, num_keep, num_prefix_tokens=prefix)
    same_bits(index, expected_index)
    same_bits(tokens[:, :-1].contiguous(), kept)
    check_fused(tokens[:, -1], x, scores, num_keep, prefix)
    grad = torch.randn(3, 20, 24, device=backend.device)
    launch = backend.launcher("gather_topk_fuse_backward")
    grad_x, grad_scores = launch(strided(grad, layout), *laid, index)
    same_bits(grad_x, reference.gather_topk_fuse_backward(grad, x, scores, index)[0])
    check_grad_scores(grad_scores, grad, x, scores, index)


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


# ------------------------------------------------------------- match_higher and match_kept


def short_enough(backend, size):
    """Triton's interpreter takes 10 s and more for a real ViT: the CPU and a GPU have those."""
    if backend.name == "triton" and INTERPRETING and (size[1] > 256 or size[3] > 100):
        pytest.skip("too long for Triton's interpreter")
    return size


def check_higher(got, features, ranks, prefix):
    """The largest cosine with a patch of higher rank.

    Computed in float32, a cosine of D channels over H heads is wrong by (D + H + 8) * eps at most.
    """
    assert got.dtype == torch.float32 and got.is_contiguous() and got.shape == ranks.shape
    heads = 1
    exact = features[..., prefix:, :].double()
    if features.dim() == 4:
        heads, exact = features.shape[1], exact.mean(1)
    norms = exact.norm(dim=-1, keepdim=True)
    unit = exact / norms.where(norms > 0, 1)
    mine, other = ranks[:, :, None], ranks[:, None]
    higher = (other > mine) | (other.isnan() & ~mine.isnan())
    cosines = (unit @ unit.transpose(1, 2)).where(higher, -math.inf)
    want = cosines.amax(-1) if ranks.shape[1] else ranks.double()
    # Of one patch in float64, the result is rounded to float32.
    atol = (features.shape[-1] + heads + 8) * ulp(torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("heads", [None, 1, 3])
def test_match_higher(backend, dtype, size, heads):
    launch = backend.launcher("match_higher")
    x, scores, _, prefix = make(backend, short_enough(backend, size), dtype)
    ranks = reference.head_mean(scores).float()
    features = x if heads is None else torch.stack([x.roll(h, 1) for h in range(heads)], 1)
    check_higher(launch(features, ranks, num_prefix_tokens=prefix), features, ranks, prefix)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_match_higher_reads_any_layout(backend, dtype, layout):
    launch = backend.launcher("match_higher")
    features = torch.randn(3, 2, 41, 24).to(backend.device, dtype)
    ranks = torch.rand(3, 39).mul(9).round().to(backend.device)  # many are equal
    want = launch(features, ranks, num_prefix_tokens=2)
    check_higher(want, features, ranks, 2)
    for view in (ranks, strided(ranks, "offset"), strided(ranks, "transposed")):
        same_bits(launch(strided(features, layout), view, num_prefix_tokens=2), want)
    same_bits(
        launch(strided(features[:, 1], layout), ranks, num_prefix_tokens=2),
        launch(features[:, 1].contiguous(), ranks, num_prefix_tokens=2),
    )


@pytest.mark.parametrize("channels", [3, 64, 1000])
def test_match_higher_of_long_sequences_and_two_kinds_of_rank(backend, channels):
    """Every second ranks above all others: those are like none, the others like one of them.

    Of 1000 channels the CPU takes them in two parts, by what its cache holds.
    """
    short_enough(backend, (2, 200, 1, channels // 2, 0))
    launch = backend.launcher("match_higher")
    features = torch.randn(2, 201, channels, device=backend.device)
    ranks = (torch.arange(200, device=backend.device) % 2).float().expand(2, -1)
    got = launch(features, ranks, num_prefix_tokens=1)
    check_higher(got, features, ranks, 1)
    assert bool((got[:, 1::2] == -math.inf).all()) and bool(got[:, ::2].isfinite().all())


def test_ranks_and_features_of_every_kind(backend):
    launch = backend.launcher("match_higher")
    features = torch.randn(1, 9, 6, device=backend.device)
    ranks = torch.tensor([[0.0, -0.0, math.inf, math.nan, -math.inf, 1.0, math.nan, 1.0]])
    ranks = ranks.to(backend.device)
    usual = launch(features, ranks, num_prefix_tokens=1)
    check_higher(usual, features, ranks, 1)
    assert (usual[0] == -math.inf).tolist() == [False] * 3 + [True] + [False] * 2 + [True, False]
    without = features.clone()
    without[:, 1 + 3] = without[:, 1 + 6] = 0.0  # those that rank highest are like nobody
    check_higher(launch(without, ranks, num_prefix_tokens=1), without, ranks, 1)
    without[:, 1 + 5] = math.nan  # like everybody below it, itself like those above it
    got = launch(without, ranks, num_prefix_tokens=1)[0]
    assert got.isnan().tolist() == [True, True, False, False, True, True, False, False]
    equal = torch.zeros_like(ranks)
    assert bool((launch(features, equal, num_prefix_tokens=1) == -math.inf).all())


def check_match(got, features, index, prefix):
    """Kept rows own themselves; of the others, nobody is more like them than their owner.

    Computed in float32, two cosines of D channels over H heads that differ by less than twice their
    error, (D + H + 8) * eps, may have changed places.
    """
    assert got.dtype == torch.int64 and got.is_contiguous()
    rows = torch.arange(index.shape[1], device=index.device).expand_as(index)
    assert torch.equal(got.gather(1, index), rows)
    if index.shape[1] == prefix:
        return
    heads = 1
    exact = features.double()
    if features.dim() == 4:
        heads, exact = features.shape[1], exact.mean(1)
    norms = exact.norm(dim=-1, keepdim=True)
    unit = exact / norms.where(norms > 0, 1)
    cosines = unit @ reference.gather_rows(unit, index[:, prefix:]).transpose(1, 2)
    dropped = torch.ones_like(got, dtype=torch.bool).scatter(1, index, False)
    place = (got - prefix)[dropped]
    assert bool(((place >= 0) & (place < cosines.shape[2])).all())
    found = cosines[dropped].gather(1, place[:, None])[:, 0]
    eps = ulp(torch.promote_types(features.dtype, torch.float32))
    largest = cosines[dropped].amax(-1) if len(place) else found
    assert bool((found >= largest - 2 * (features.shape[-1] + heads + 8) * eps).all())


@pytest.mark.parametrize("size", [s for s in SIZES if s[4] or not s[1]], ids=str)
@pytest.mark.parametrize("heads", [None, 1, 3])
def test_match_kept(backend, dtype, size, heads):
    launch = backend.launcher("match_kept")
    x, scores, num_keep, prefix = make(backend, short_enough(backend, size), dtype)
    index = reference.gather_topk(x, scores, num_keep, num_prefix_tokens=prefix)[1]
    features = x if heads is None else torch.stack([x.roll(h, 1) for h in range(heads)], 1)
    got = launch(features, index, num_prefix_tokens=prefix)
    assert got.shape == x.shape[:2]
    check_match(got, features, index, prefix)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_match_kept_reads_any_layout_and_order(backend, dtype, layout):
    launch = backend.launcher("match_kept")
    features = torch.randn(3, 2, 20, 24).to(backend.device, dtype)
    index = torch.stack([torch.randperm(20)[:9] for _ in range(3)]).to(backend.device)
    want = launch(features, index, num_prefix_tokens=2)
    check_match(want, features, index, 2)
    for view in (index, strided(index, "offset"), strided(index, "transposed")):
        same_bits(launch(strided(features, layout), view, num_prefix_tokens=2), want)
    same_bits(
        launch(strided(features[:, 1], layout), index, num_prefix_tokens=2),
        launch(features[:, 1].contiguous(), index, num_prefix_tokens=2),
    )


@pytest.mark.parametrize("channels", [3, 64, 130, 1000])
def test_equal_cosines_go_to_the_lowest_place(backend, dtype, channels):
    """Every row is one of three: the first kept patch of its kind owns it, wherever both lie.

    Of 1000 channels the CPU takes the kept patches in two parts, by what its cache holds.
    """
    short_enough(backend, (2, 149, 1, channels // 2, 80))
    launch = backend.launcher("match_kept")
    kinds = torch.randn(3, channels).to(backend.device, dtype)
    kind = torch.randint(3, (2, 150)).to(backend.device)
    index = torch.stack([torch.randperm(149)[:80].sort().values + 1 for _ in range(2)])
    index = torch.cat([torch.zeros(2, 1, dtype=torch.int64), index], 1).to(backend.device)
    got = launch(kinds[kind], index, num_prefix_tokens=1)
    same_kind = kind[:, :, None] == kind.gather(1, index)[:, None, 1:]
    assert bool(same_kind.any(-1).all())
    first = same_kind.int().argmax(-1) + 1
    places = torch.arange(81, device=backend.device).expand(2, -1)
    same_bits(got, first.scatter(1, index, places))


def test_features_without_a_direction_and_nan_have_an_owner(backend):
    launch = backend.launcher("match_kept")
    index = torch.tensor([[0, 3, 5, 8]], device=backend.device)
    features = torch.randn(1, 10, 6, device=backend.device)

    def owners(**rows):
        changed = features.clone()
        for row, value in rows.items():
            changed[:, int(row[1:])] = value
        return launch(changed, index, num_prefix_tokens=1)[0].tolist()

    usual = owners()
    for value in (0.0, math.nan):  # a row that is like nobody, or like everybody
        got = owners(r7=value)
        assert got[7] == 1 and got[:7] + got[8:] == usual[:7] + usual[8:]
    got = owners(r5=math.nan, r8=math.nan)
    assert got == [0, 2, 2, 1, 2, 2, 2, 2, 3, 2]
    assert owners(r3=0.0, r5=0.0, r8=0.0) == [0, 1, 1, 1, 1, 2, 1, 1, 3, 1]
    zeros = launch(torch.zeros_like(features), index, num_prefix_tokens=1)
    assert zeros.tolist() == [[0, 1, 1, 1, 1, 2, 1, 1, 3, 1]]


# --------------------------------------------------------- merge_rows and restore_rows


def merging(backend, size, dtype):
    """x, owners with every value taken, their number, and sizes."""
    x, _, num_keep, prefix = make(backend, size, dtype)
    batch, num_tokens, _ = x.shape
    num_rows = min(num_tokens, max(1, prefix + num_keep))
    owner = torch.arange(num_tokens).expand(batch, -1).clone()
    owner[:, num_rows:] = torch.randint(max(1, num_rows), (batch, num_tokens - num_rows))
    owner = owner.gather(1, torch.rand(owner.shape).argsort(1)).to(backend.device)
    sizes = torch.randint(1, 40, owner.shape).to(backend.device, torch.float32) / 8
    return x, owner, num_rows, sizes


def by_owner(values, owner, num_rows):
    """Sums (B, M, C) in float64."""
    total = values.new_zeros((values.shape[0], num_rows, values.shape[2]), dtype=torch.float64)
    index = owner[..., None].expand(values.shape)
    return total.cpu().scatter_add(1, index.cpu(), values.double().cpu()).to(values.device)


def sum_bound(terms, owner, num_rows):
    counts = by_owner(torch.ones_like(owner)[..., None], owner, num_rows)
    accumulate = torch.promote_types(terms.dtype, torch.float32)
    return (counts + 3) * ulp(accumulate) * by_owner(terms.abs(), owner, num_rows)


@pytest.mark.parametrize("size", SIZES, ids=IDS)
@pytest.mark.parametrize("sized", [False, True])
def test_merge_rows_and_backward(backend, dtype, size, sized):
    launch = backend.launcher("merge_rows")
    x, owner, num_rows, sizes = merging(backend, short_enough(backend, size), dtype)
    sizes = sizes if sized else None
    tokens, merged = launch(x, owner, num_rows, sizes=sizes)
    want, want_merged = reference.merge_rows(x, owner, num_rows, sizes=sizes)
    same_bits(merged, want_merged)
    alone = by_owner(torch.ones_like(owner)[..., None], owner, num_rows) == 1
    same_bits(tokens.where(alone, 0), want.where(alone, 0))
    weights = 1 if sizes is None else sizes.double()[..., None]
    exact = by_owner(weights * x.double(), owner, num_rows) / merged.double()[..., None]
    # The sizes are summed in float32, of float64 rows too.
    bound = sum_bound((weights * x.double()).to(x.dtype), owner, num_rows)
    bound = bound / merged.double()[..., None] + ulp(dtype) / 2 * exact.abs()
    bound += x.shape[1] * ulp(torch.float32) * exact.abs() * sized
    within(tokens, exact, bound + torch.finfo(dtype).tiny)

    grad = torch.randn(tokens.shape).to(x)
    got = backend.launcher("merge_rows_backward")(grad, owner, sizes, merged)
    want_grad = reference.merge_rows_backward(grad, owner, sizes, merged)
    same_bits(got, want_grad)
    if backend.name == "cpu":  # which sums as the reference does
        same_bits(tokens, want)


@pytest.mark.parametrize("size", SIZES, ids=IDS)
def test_restore_rows_and_backward(backend, dtype, size):
    launch = backend.launcher("restore_rows")
    x, owner, num_rows, _ = merging(backend, short_enough(backend, size), dtype)
    before, after = torch.randn(2, x.shape[0], num_rows, x.shape[2]).to(x).unbind()
    restored = launch(x, before, after, owner)
    same_bits(restored, reference.restore_rows(x, before, after, owner))

    got = backend.launcher("restore_rows_backward")(x, owner, num_rows)
    want = reference.restore_rows_backward(x, owner, num_rows)
    same_bits(got[0], want[0])
    if backend.name == "cpu":
        same_bits(got[1], want[1])
        same_bits(got[2], want[2])
    alone = by_owner(torch.ones_like(owner)[..., None], owner, num_rows) == 1
    exact = by_owner(x, owner, num_rows)
    bound = sum_bound(x, owner, num_rows) + ulp(dtype) / 2 * exact.abs()
    within(got[1], (-exact).masked_fill(alone, 0), bound)
    within(got[2], exact, bound)
    same_bits(got[2].where(alone, 0), want[2].where(alone, 0))


def test_rows_alone_keep_every_bit(backend):
    """NaN payloads, infinities and signed zeros: merged, restored and their gradients."""
    launch = backend.launcher("merge_rows")
    bits = torch.randint(-(2**31), 2**31 - 1, (2, 21, 16), dtype=torch.int32)
    x = bits.to(backend.device).view(torch.float32)
    owner = torch.stack([torch.randperm(21), torch.randperm(21)]).to(backend.device)
    sizes = torch.rand(2, 21, device=backend.device) + 0.1
    tokens, merged = launch(x, owner, 21, sizes=sizes)
    batch = torch.arange(2, device=backend.device)[:, None]
    assert torch.equal(tokens.view(torch.int32)[batch, owner], x.view(torch.int32))
    same_bits(merged[batch, owner], sizes)
    restored = backend.launcher("restore_rows")(torch.zeros_like(x), tokens, tokens, owner)
    same_bits(restored, x)
    grad_x, grad_before, grad_after = backend.launcher("restore_rows_backward")(x, owner, 21)
    same_bits(grad_after, tokens)
    assert not grad_x.view(torch.int32).any() and not grad_before.view(torch.int32).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merging_reads_any_layout(backend, dtype, layout):
    launch = {name: backend.launcher(name) for name in sorted(MERGING - COMPARING)}
    x, owner, num_rows, sizes = merging(backend, (3, 37, 2, 24, 17), dtype)
    before, after = torch.randn(2, 3, num_rows, 24).to(x).unbind()

    def everything(as_laid):
        laid = {name: as_laid(t) for name, t in locals_of.items()}
        x, before, after = laid["x"], laid["before"], laid["after"]
        owner, sizes, merged = laid["owner"], laid["sizes"], laid["merged"]
        return [
            *launch["merge_rows"](x, owner, num_rows, sizes=sizes),
            launch["merge_rows_backward"](after, owner, sizes, merged),
            launch["restore_rows"](x, before, after, owner),
            *launch["restore_rows_backward"](x, owner, num_rows),
        ]

    merged = reference.merge_rows(x, owner, num_rows, sizes=sizes)[1]
    locals_of = dict(x=x, before=before, after=after, owner=owner, sizes=sizes, merged=merged)
    want = everything(lambda t: t)
    for a, b in zip(everything(lambda t: strided(t, layout)), want, strict=True):
        same_bits(a, b)
    ones = torch.ones((), device=backend.device, dtype=dtype).expand(3, 39, 24)  # of a sum
    got = launch["restore_rows_backward"](ones, owner, num_rows)
    for a, b in zip(got, reference.restore_rows_backward(ones, owner, num_rows), strict=True):
        same_bits(a, b)


def test_merging_sums_in_float32_and_never_touches_another_owner(backend):
    launch = backend.launcher("merge_rows")
    x = torch.tensor([[256.0, 1, -256, math.nan]], dtype=torch.bfloat16, device=backend.device)
    owner = torch.tensor([[0, 0, 0, 1]], device=backend.device)
    tokens, _ = launch(x[..., None], owner, 2, sizes=None)
    assert tokens[0, 0].item() == torch.tensor(1 / 3).bfloat16().item()


def test_merging_gives_the_same_bits_every_run_and_in_every_batch(backend):
    x, owner, num_rows, sizes = merging(backend, (5, 100, 1, 32, 45), torch.float32)
    after = torch.randn(5, num_rows, 32).to(x)
    index = torch.arange(num_rows, device=backend.device).expand(5, -1)

    def everything(images):
        own = x[images], owner[images]
        tokens, merged = backend.launcher("merge_rows")(*own, num_rows, sizes=sizes[images])
        return [
            tokens,
            merged,
            backend.launcher("match_kept")(x[images], index[images], num_prefix_tokens=1),
            backend.launcher("merge_rows_backward")(after[images], own[1], sizes[images], merged),
            backend.launcher("restore_rows")(own[0], tokens, after[images], own[1]),
            *backend.launcher("restore_rows_backward")(*own, num_rows),
        ]

    want = everything(slice(0, 5))
    for images in (slice(0, 5), slice(0, 1), slice(3, 5)):
        for a, b in zip(everything(images), want, strict=True):
            same_bits(a, b[images])


@pytest.mark.parametrize("batch", [1, 4])
def test_threads_do_not_change_a_merged_bit(backend, batch):
    if backend.name != "cpu":
        pytest.skip(f"{backend.name} does not run on torch's CPU threads")
    x, owner, num_rows, sizes = merging(backend, (batch, 196, 1, 384, 89), torch.float32)
    after = torch.randn(batch, num_rows, 384)
    index = torch.arange(num_rows).expand(batch, -1)

    def everything():
        tokens, merged = backend.launcher("merge_rows")(x, owner, num_rows, sizes=sizes)
        return [
            tokens,
            backend.launcher("match_kept")(x, index, num_prefix_tokens=1),
            backend.launcher("merge_rows_backward")(after, owner, sizes, merged),
            backend.launcher("restore_rows")(x, tokens, after, owner),
            *backend.launcher("restore_rows_backward")(x, owner, num_rows),
        ]

    expected = everything()
    try:
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for got, want in zip(everything(), expected, strict=True):
                same_bits(got, want)
    finally:
        torch.set_num_threads(1)


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


@pytest.mark.parametrize(
    "operator", ["merge_rows", "merge_rows_backward", "restore_rows", "restore_rows_backward"]
)
@pytest.mark.parametrize("bad", [-1, 2, 2**40])
def test_owners_out_of_range_are_refused_on_the_cpu(backend, operator, bad):
    if not backend.checks_index:
        pytest.skip(f"{backend.name} cannot look at an owner without a synchronisation")
    launch = backend.launcher(operator)
    owner = torch.tensor([[0, 1, 1], [1, 0, bad]])
    x, tokens = torch.randn(2, 3, 4), torch.randn(2, 2, 4)
    arguments = {
        "merge_rows": (x, owner, 2),
        "merge_rows_backward": (tokens, owner, None, torch.ones(2, 2)),
        "restore_rows": (x, tokens, tokens, owner),
        "restore_rows_backward": (x, owner, 2),
    }
    with pytest.raises((ValueError, RuntimeError), match=rf"owner .*\[0, 2\).* got {bad}"):
        launch(*arguments[operator])


@pytest.mark.parametrize("size", [0.0, -1.0, math.nan])
def test_sizes_that_are_not_positive_are_refused_on_the_cpu(backend, size):
    if not backend.checks_index:
        pytest.skip(f"{backend.name} cannot look at a size without a synchronisation")
    launch = backend.launcher("merge_rows")
    sizes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, size]])
    owner = torch.tensor([[0, 1, 1], [1, 0, 1]])
    with pytest.raises((ValueError, RuntimeError), match="sizes must be positive"):
        launch(torch.randn(2, 3, 4), owner, 2, sizes=sizes)
    with pytest.raises((ValueError, RuntimeError), match=r"owner .*got no 2 in image 0"):
        launch(torch.randn(2, 3, 4), owner, 3, sizes=None)
