"""The CPU kernels against plain PyTorch and against a plain copy.

    pytest benchmarks/test_operators_cpu.py                 # the usual shapes, about two minutes
    pytest benchmarks/test_operators_cpu.py --full --summary-csv operators.csv

Every provider of a group gets the same inputs, allocates its own output, and is compared with the
reference before it is timed. The table takes the minimum of two turns: on shared cores the mean
measures the neighbours.

`share_of_copy` is the time of a copy over the operator's time. The copy is `Tensor.clone()` of as
many bytes as the operator must read or must write, whichever is more: the copy then moves at least
as much as the operator in either direction. Half of the sum would do no justice to a kernel that
only reads, as cls_scores: it has no second stream for the memory to serve at the same time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from skipvit_kernels import reference
from skipvit_kernels.backends import cpu

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)

P = 1
WIDTH = 64  # of a head, in every ViT that timm has in these sizes


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    channels: int

    def __str__(self) -> str:
        return f"B{self.batch}_N{self.tokens}_C{self.channels}"


USUAL = [
    *(Shape(1, 197, 384), Shape(8, 197, 384), Shape(64, 197, 192)),
    *(Shape(64, 197, 768), Shape(64, 577, 384)),
]
FULL = [Shape(*sizes) for sizes in itertools.product((1, 8, 64), (197, 577), (192, 384, 768))]


class Inputs:
    """Tensors of one shape as a ViT block hands them to the operators."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(dtype)

        batch, tokens, channels = shape.batch, shape.tokens, shape.channels
        heads = channels // WIDTH
        self.batch, self.num_tokens, self.channels = batch, tokens, channels
        self.num_keep = -(-(tokens - P) * 45 // 100)
        self.x = randn(batch, tokens, channels)
        self.scores = torch.rand(batch, tokens - P, generator=generator) / tokens
        # timm's layout: the keys are a permuted view of the qkv projection.
        qkv = randn(batch, tokens, 3, heads, WIDTH).permute(2, 0, 3, 1, 4)
        self.q, self.k = qkv[0][:, :, 0], qkv[1]
        _, self.index = reference.gather_topk(self.x, self.scores, self.num_keep)
        rows = self.index.shape[1]
        self.tokens = randn(batch, rows, channels)
        self.update = randn(batch, channels)
        self.grad_fused = randn(batch, rows + 1, channels)

    def flat(self, index: Tensor) -> Tensor:
        """Rows of (B, M) as rows of (B*N, C), for index_select and its like: part of their time."""
        return (index + self.num_tokens * torch.arange(self.batch)[:, None]).view(-1)

    def rows(self, per_image: int) -> int:
        """Bytes of that many rows in every image."""
        return self.batch * per_image * self.channels * self.x.element_size()


# --------------------------------------------------------------- the best plain PyTorch ways


def torch_select(i: Inputs) -> Tensor:
    kept = i.scores.topk(i.num_keep, sorted=False).indices.sort().values + P
    return torch.cat([torch.arange(P).expand(i.batch, -1), kept], 1)


def topk_index_select(i: Inputs) -> Any:
    index = torch_select(i)
    rows = i.x.view(-1, i.channels).index_select(0, i.flat(index))
    return rows.view(i.batch, -1, i.channels), index


def topk_indexing(i: Inputs) -> Any:
    index = torch_select(i)
    return i.x[torch.arange(i.batch)[:, None], index], index


def topk_index_select_bmm(i: Inputs) -> Any:
    tokens, index = topk_index_select(i)
    weights = i.scores.scatter(1, index[:, P:] - P, 0)
    fused = torch.bmm(weights[:, None].to(i.x.dtype), i.x[:, P:])
    return torch.cat([tokens, fused], 1), index


def scale_index_copy(i: Inputs) -> Any:
    last = i.grad_fused[:, -1:]
    grad_x = torch.empty_like(i.x)
    torch.mul(i.scores[..., None].to(i.x.dtype), last, out=grad_x[:, P:])
    kept = i.grad_fused[:, :-1].reshape(-1, i.channels)
    grad_x.view(-1, i.channels).index_copy_(0, i.flat(i.index), kept)
    grad_scores = torch.bmm(i.x[:, P:], last.transpose(1, 2)).squeeze(2).float()
    return grad_x, grad_scores.scatter_(1, i.index[:, P:] - P, 0)


def index_select(i: Inputs) -> Any:
    rows = i.x.view(-1, i.channels).index_select(0, i.flat(i.index))
    return rows.view(i.batch, -1, i.channels)


def zeros_index_copy(i: Inputs) -> Any:
    grad_x = i.x.new_zeros(i.x.shape)
    grad_x.view(-1, i.channels).index_copy_(0, i.flat(i.index), i.tokens.view(-1, i.channels))
    return grad_x


def clone_index_copy(i: Inputs) -> Any:
    out = i.x.clone()
    out.view(-1, i.channels).index_copy_(0, i.flat(i.index), i.tokens.view(-1, i.channels))
    return out


def add_index_copy(i: Inputs) -> Any:
    out = i.x + i.update[:, None]
    out.view(-1, i.channels).index_copy_(0, i.flat(i.index), i.tokens.view(-1, i.channels))
    return out


def clone_index_put(i: Inputs) -> Any:
    out = i.x.clone()
    out[torch.arange(i.batch)[:, None], i.index] = i.tokens
    return out


def clone_index_fill(i: Inputs) -> Any:
    grad_x, flat = i.x.clone(), i.flat(i.index)
    grad_x.view(-1, i.channels).index_fill_(0, flat, 0)
    grad_tokens = i.x.view(-1, i.channels).index_select(0, flat)
    return grad_x, grad_tokens.view(i.tokens.shape), i.x.new_empty(0)


def clone_index_fill_sum(i: Inputs) -> Any:
    grad_x, grad_tokens, _ = clone_index_fill(i)
    return grad_x, grad_tokens, grad_x.sum(1)


def mean_of_softmax(logits: Tensor) -> Tensor:
    return logits.float().softmax(-1).mean(1)[:, P:].contiguous()


def einsum(i: Inputs) -> Any:
    return mean_of_softmax(torch.einsum("bhd,bhnd->bhn", i.q, i.k) * WIDTH**-0.5)


def matmul(i: Inputs) -> Any:
    return mean_of_softmax((i.k @ i.q[..., None]).squeeze(-1) * WIDTH**-0.5)


def query_matmul(i: Inputs) -> Any:
    return mean_of_softmax((i.q[:, :, None] @ i.k.transpose(-1, -2)).squeeze(2) * WIDTH**-0.5)


@dataclass(frozen=True)
class Case:
    ours: Callable[[Inputs], Any]
    expected: Callable[[Inputs], Any]
    rivals: tuple[Callable[[Inputs], Any], ...]
    read: Callable[[Inputs], int]  # bytes that must be read
    written: Callable[[Inputs], int]  # and written
    exact: bool = True


CASES = {
    "cls_scores": Case(
        lambda i: cpu.cls_scores(i.q, i.k),
        lambda i: reference.cls_scores(i.q, i.k),
        (einsum, matmul, query_matmul),
        lambda i: i.rows(i.num_tokens + 1),
        lambda i: 4 * i.scores.numel(),
        exact=False,
    ),
    "gather_topk": Case(
        lambda i: cpu.gather_topk(i.x, i.scores, i.num_keep),
        lambda i: reference.gather_topk(i.x, i.scores, i.num_keep),
        (topk_index_select, topk_indexing),
        lambda i: i.rows(P + i.num_keep) + 4 * i.scores.numel(),
        lambda i: i.rows(P + i.num_keep) + 8 * i.index.numel(),
    ),
    "gather_topk_fuse": Case(
        lambda i: cpu.gather_topk_fuse(i.x, i.scores, i.num_keep),
        lambda i: reference.gather_topk_fuse(i.x, i.scores, i.num_keep),
        (topk_index_select_bmm,),
        lambda i: i.rows(i.num_tokens) + 4 * i.scores.numel(),
        lambda i: i.rows(P + i.num_keep + 1) + 8 * i.index.numel(),
        exact=False,
    ),
    "gather_topk_fuse_backward": Case(
        lambda i: cpu.gather_topk_fuse_backward(i.grad_fused, i.x, i.scores, i.index),
        lambda i: reference.gather_topk_fuse_backward(i.grad_fused, i.x, i.scores, i.index),
        (scale_index_copy,),
        lambda i: i.rows(i.num_tokens + 1) + 4 * i.scores.numel() + 8 * i.index.numel(),
        lambda i: i.rows(i.num_tokens) + 4 * i.scores.numel(),
        exact=False,
    ),
    "gather_rows": Case(
        lambda i: cpu.gather_rows(i.x, i.index),
        lambda i: reference.gather_rows(i.x, i.index),
        (index_select,),
        lambda i: i.rows(P + i.num_keep) + 8 * i.index.numel(),
        lambda i: i.rows(P + i.num_keep),
    ),
    "gather_rows_backward": Case(
        lambda i: cpu.gather_rows_backward(i.tokens, i.index, i.num_tokens),
        lambda i: reference.gather_rows_backward(i.tokens, i.index, i.num_tokens),
        (zeros_index_copy,),
        lambda i: i.rows(P + i.num_keep) + 8 * i.index.numel(),
        lambda i: i.rows(i.num_tokens),
    ),
    "scatter_back": Case(
        lambda i: cpu.scatter_back(i.x, i.tokens, i.index),
        lambda i: reference.scatter_back(i.x, i.tokens, i.index),
        (clone_index_copy, clone_index_put),
        lambda i: i.rows(i.num_tokens) + 8 * i.index.numel(),
        lambda i: i.rows(i.num_tokens),
    ),
    "scatter_back(update)": Case(
        lambda i: cpu.scatter_back(i.x, i.tokens, i.index, update=i.update),
        lambda i: reference.scatter_back(i.x, i.tokens, i.index, update=i.update),
        (add_index_copy,),
        lambda i: i.rows(i.num_tokens + 1) + 8 * i.index.numel(),
        lambda i: i.rows(i.num_tokens),
    ),
    "scatter_back_backward": Case(
        lambda i: cpu.scatter_back_backward(i.x, i.index, False),
        lambda i: reference.scatter_back_backward(i.x, i.index, False),
        (clone_index_fill,),
        lambda i: i.rows(i.num_tokens) + 8 * i.index.numel(),
        lambda i: i.rows(i.num_tokens + P + i.num_keep),
    ),
    "scatter_back_backward(update)": Case(
        lambda i: cpu.scatter_back_backward(i.x, i.index, True),
        lambda i: reference.scatter_back_backward(i.x, i.index, True),
        (clone_index_fill_sum,),
        lambda i: i.rows(i.num_tokens) + 8 * i.index.numel(),
        lambda i: i.rows(i.num_tokens + P + i.num_keep + 1),
        exact=False,
    ),
}


def providers(case: Case) -> list[str]:
    return ["ours", *(rival.__name__ for rival in case.rivals), "copy"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = FULL if metafunc.config.getoption("--full") else USUAL
    # Two rounds over the providers of a group, side by side in time: what else the machine does,
    # and whether it has huge pages left for an output, changes within seconds.
    metafunc.parametrize(
        ("shape", "dtype", "threads", "operator", "turn", "provider"),
        [
            pytest.param(
                *(shape, dtype, threads, operator, turn, provider),
                id=f"{operator}-{shape}-{str(dtype)[6:]}-t{threads}-{provider}-{turn}",
            )
            for shape in shapes
            for dtype in (torch.float32, torch.bfloat16)
            for threads in (2, 1)
            for operator, case in CASES.items()
            for turn in range(2)
            for provider in providers(case)
        ],
    )


_inputs: dict[tuple[Shape, torch.dtype], Inputs] = {}


def inputs_of(shape: Shape, dtype: torch.dtype) -> Inputs:
    """The last ones made: the tests come ordered by shape."""
    if (shape, dtype) not in _inputs:
        _inputs.clear()
        _inputs[shape, dtype] = Inputs(shape, dtype)
    return _inputs[shape, dtype]


@pytest.fixture
def set_threads(threads: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


def check(actual: Any, expected: Any, exact: bool, low_precision: bool) -> None:
    """Kernels that round once and those that round on the way differ by some bfloat16 steps."""
    actual = actual if isinstance(actual, tuple) else (actual,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for have, want in zip(actual, expected, strict=True):
        if exact:
            assert torch.equal(have, want)
        else:
            tolerance = 5e-2 if low_precision else 1e-4
            scale = max(1.0, want.abs().max().item())
            torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance * scale)


def test_operator(
    benchmark: Any,
    set_threads: None,
    shape: Shape,
    dtype: torch.dtype,
    threads: int,
    operator: str,
    turn: int,
    provider: str,
) -> None:
    case, inputs = CASES[operator], inputs_of(shape, dtype)
    read, written = case.read(inputs), case.written(inputs)
    run: Callable[[], Any]
    if provider == "copy":
        source = torch.zeros(max(read, written), dtype=torch.uint8)
        run = source.clone
    else:
        call = {"ours": case.ours, **{r.__name__: r for r in case.rivals}}[provider]

        def run() -> Any:
            return call(inputs)

        if turn == 0:
            check(run(), case.expected(inputs), case.exact, dtype == torch.bfloat16)
    benchmark.group = f"{operator} {shape} {str(dtype)[6:]} {threads} threads"
    benchmark.extra_info.update(
        operator=operator,
        provider=provider,
        shape=str(shape),
        dtype=str(dtype)[6:],
        threads=threads,
        bytes=read + written,
    )
    # About 20 ms for each: rounds long enough for the clock, and enough of them for a minimum.
    start = time.perf_counter()
    for _ in range(2):
        run()
    seconds = (time.perf_counter() - start) / 2
    iterations = max(1, int(50e-6 / seconds))
    rounds = max(5, min(200, int(20e-3 / (seconds * iterations))))
    benchmark.pedantic(run, rounds=rounds, iterations=iterations, warmup_rounds=1)
    benchmark.extra_info["GB_s"] = (read + written) / benchmark.stats.stats.min / 1e9
