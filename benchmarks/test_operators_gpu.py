"""The Triton kernels against plain PyTorch, compiled PyTorch and a device-to-device copy.

    pytest benchmarks/test_operators_gpu.py --benchmark-only

One measurement is a CUDA graph that calls a provider once on each of several inputs, which together
are four times what the L2 cache holds: no launch gaps, every input cold. The clock is the device's.
Every provider gets the same inputs and is compared with the reference before it is timed.
`share_of_copy` is the time of a copy of the operator's bytes over the operator's time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import skipvit_kernels as sk
from skipvit_kernels import reference

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA or ROCm GPU", allow_module_level=True)

from pytest_benchmark.fixture import BenchmarkFixture

from skipvit_kernels.backends import triton as kernels

P = 1
DTYPE = torch.bfloat16


class DeviceClock:
    """Seconds of device time spent in `timed` so far."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def timed(self, call: Callable[[], object], times: int) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        self.seconds += start.elapsed_time(end) / 1000 / times


CLOCK = DeviceClock()
BenchmarkFixture._precisions[CLOCK] = 1e-6  # calibrating needs a clock that runs by itself
pytestmark = pytest.mark.benchmark(timer=CLOCK)


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    channels: int

    def __str__(self) -> str:
        return f"B{self.batch}_N{self.tokens}_C{self.channels}"


SHAPES = (
    Shape(256, 197, 384),
    Shape(256, 197, 768),
    Shape(32, 1025, 1024),
    Shape(1, 197, 384),
)


class Inputs:
    """Tensors of one shape as a ViT block hands them to the operators."""

    def __init__(self, shape: Shape) -> None:
        batch, tokens, channels = shape.batch, shape.tokens, shape.channels
        heads = channels // 64
        self.batch, self.num_tokens, self.channels = batch, tokens, channels
        self.num_keep = -(-(tokens - P) * 45 // 100)
        self.x = torch.randn(batch, tokens, channels, device="cuda", dtype=DTYPE)
        self.x_leaf = self.x.clone().requires_grad_()
        self.scores = torch.rand(batch, heads, tokens - P, device="cuda", dtype=DTYPE)
        qkv = torch.randn(batch, tokens, 3, heads, 64, device="cuda", dtype=DTYPE)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        self.q, self.k = qkv[0][:, :, 0], qkv[1]
        _, self.index = reference.gather_topk(self.x, self.scores, self.num_keep)
        self.tokens = torch.randn(batch, P + self.num_keep, channels, device="cuda", dtype=DTYPE)
        self.update = torch.randn(batch, channels, device="cuda", dtype=DTYPE)
        self.first_rows = torch.arange(batch, device="cuda")[:, None] * tokens

    def rows(self, per_image: int) -> int:
        """Bytes of that many rows in every image."""
        return self.batch * per_image * self.channels * self.x.element_size()


# ----------------------------------------------------------------------- the rivals


def kept_index(scores: Tensor, num_keep: int) -> Tensor:
    kept = scores.float().mean(1).topk(num_keep, sorted=False).indices.sort().values + P
    return torch.cat([torch.arange(P, device="cuda").expand(len(scores), -1), kept], 1)


def chain(x: Tensor, scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """What people write: mean, topk, sort, gather, cat."""
    kept = scores.float().mean(1).topk(num_keep).indices.sort().values + P
    rows = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
    index = torch.cat([torch.arange(P, device="cuda").expand(len(x), -1), kept], 1)
    return torch.cat([x[:, :P], rows], 1), index


def index_select_chain(x: Tensor, scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    index = kept_index(scores, num_keep)
    first_rows = torch.arange(len(x), device="cuda")[:, None] * x.shape[1]
    flat = (index + first_rows).view(-1)
    return x.reshape(-1, x.shape[2]).index_select(0, flat).view(*index.shape, -1), index


compiled_chain = torch.compile(chain, dynamic=False)


def with_backward(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Inputs], Any]:
    def run(i: Inputs) -> Any:
        tokens, index = function(i.x_leaf, i.scores, i.num_keep)
        return tokens, index, *torch.autograd.grad(tokens, i.x_leaf, i.tokens)

    return run


def forward(function: Callable[..., Any]) -> Callable[[Inputs], Any]:
    return lambda i: function(i.x, i.scores, i.num_keep)


def expand(i: Inputs) -> Tensor:
    return i.index[..., None].expand(-1, -1, i.channels)


def flat(i: Inputs) -> Tensor:
    return (i.index + i.first_rows).view(-1)


def clone_index_copy(i: Inputs) -> Tensor:
    out = i.x.clone()
    out.view(-1, i.channels).index_copy_(0, flat(i), i.tokens.view(-1, i.channels))
    return out


def zeros_index_copy(i: Inputs) -> Tensor:
    out = torch.zeros_like(i.x)
    out.view(-1, i.channels).index_copy_(0, flat(i), i.tokens.view(-1, i.channels))
    return out


def scatter_backward_chain(i: Inputs) -> Any:
    grad_x = i.x.scatter(1, expand(i), 0)
    return grad_x, i.x.gather(1, expand(i)), grad_x.sum(1)


def attention_row(q: Tensor, k: Tensor) -> Tensor:
    logits = (q[:, :, None] @ k.transpose(-1, -2)).squeeze(2) * q.shape[-1] ** -0.5
    return logits.float().softmax(-1).mean(1)[:, P:].contiguous()


compiled_attention_row = torch.compile(attention_row, dynamic=False)


def fused_chain(x: Tensor, scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    tokens, index = index_select_chain(x, scores, num_keep)
    weights = scores.float().mean(1).scatter(1, index[:, P:] - P, 0)
    fused = torch.bmm(weights[:, None].to(x.dtype), x[:, P:])
    return torch.cat([tokens, fused], 1), index


@dataclass(frozen=True)
class Case:
    ours: Callable[[Inputs], Any]
    rivals: dict[str, Callable[[Inputs], Any]]
    bytes: Callable[[Inputs], int]  # that must be read and written
    expected: Callable[[Inputs], Any] | None = None  # None: what ours must equal is the first rival
    exact: bool = True


CASES = {
    "gather_topk": Case(
        lambda i: kernels.gather_topk(i.x, i.scores, i.num_keep),
        {
            "chain": forward(chain),
            "index_select": forward(index_select_chain),
            "compiled": forward(compiled_chain),
        },
        lambda i: 2 * i.rows(P + i.num_keep) + 2 * i.scores.numel() + 8 * i.index.numel(),
        lambda i: reference.gather_topk(i.x, i.scores, i.num_keep),
    ),
    "gather_topk forward+backward": Case(
        with_backward(sk.gather_topk),
        {
            "chain": with_backward(chain),
            "index_select": with_backward(index_select_chain),
            "compiled": with_backward(compiled_chain),
        },
        lambda i: i.rows(3 * (P + i.num_keep) + i.num_tokens) + 16 * i.index.numel(),
        with_backward(reference.gather_topk),
    ),
    "gather_topk_fuse": Case(
        lambda i: kernels.gather_topk_fuse(i.x, i.scores, i.num_keep),
        {"index_select_bmm": forward(fused_chain)},
        lambda i: i.rows(i.num_tokens + P + i.num_keep + 1),
        lambda i: reference.gather_topk_fuse(i.x, i.scores, i.num_keep),
        exact=False,
    ),
    "gather_rows": Case(
        lambda i: kernels.gather_rows(i.x, i.index),
        {
            "gather": lambda i: i.x.gather(1, expand(i)),
            "index_select": lambda i: (
                i.x.view(-1, i.channels).index_select(0, flat(i)).view(i.tokens.shape)
            ),
        },
        lambda i: 2 * i.rows(P + i.num_keep) + 8 * i.index.numel(),
    ),
    "gather_rows_backward": Case(
        lambda i: kernels.gather_rows_backward(i.tokens, i.index, i.num_tokens),
        {
            "scatter": lambda i: torch.zeros_like(i.x).scatter_(1, expand(i), i.tokens),
            "zeros_index_copy": zeros_index_copy,
        },
        lambda i: i.rows(P + i.num_keep + i.num_tokens) + 8 * i.index.numel(),
    ),
    "scatter_back": Case(
        lambda i: kernels.scatter_back(i.x, i.tokens, i.index),
        {
            "scatter": lambda i: i.x.scatter(1, expand(i), i.tokens),
            "clone_index_copy": clone_index_copy,
        },
        lambda i: 2 * i.rows(i.num_tokens) + 8 * i.index.numel(),
    ),
    "scatter_back(update)": Case(
        lambda i: kernels.scatter_back(i.x, i.tokens, i.index, update=i.update),
        {"scatter": lambda i: (i.x + i.update[:, None]).scatter_(1, expand(i), i.tokens)},
        lambda i: 2 * i.rows(i.num_tokens) + 8 * i.index.numel(),
    ),
    "scatter_back_backward": Case(
        lambda i: kernels.scatter_back_backward(i.x, i.index, False)[:2],
        {"scatter_gather": lambda i: scatter_backward_chain(i)[:2]},
        lambda i: i.rows(2 * i.num_tokens + P + i.num_keep) + 8 * i.index.numel(),
    ),
    "scatter_back_backward(update)": Case(
        lambda i: kernels.scatter_back_backward(i.x, i.index, True),
        {"scatter_gather_sum": scatter_backward_chain},
        lambda i: i.rows(2 * i.num_tokens + P + i.num_keep) + 8 * i.index.numel(),
        exact=False,
    ),
    "cls_scores": Case(
        lambda i: kernels.cls_scores(i.q, i.k),
        {
            "matmul": lambda i: attention_row(i.q, i.k),
            "compiled": lambda i: compiled_attention_row(i.q, i.k),
        },
        lambda i: i.rows(i.num_tokens) + 4 * i.batch * (i.num_tokens - P),
        lambda i: reference.cls_scores(i.q, i.k),
        exact=False,
    ),
}
PROVIDERS = [
    (operator, provider)
    for operator, case in CASES.items()
    for provider in ("ours", *case.rivals, "copy")
]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def inputs(request: Any) -> list[Inputs]:
    """So many that one pass over them leaves nothing of the first in the L2 cache."""
    shape = request.param
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)
    torch.manual_seed(0)
    first = Inputs(shape)
    count = max(4, min(512, -(-4 * cache // (2 * first.rows(first.num_keep)))))
    return [first, *(Inputs(shape) for _ in range(count - 1))]


def check(actual: Any, expected: Any, exact: bool) -> None:
    actual = actual if isinstance(actual, tuple) else (actual,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for have, want in zip(actual, expected, strict=True):
        if exact:
            assert torch.equal(have, want)
        else:  # kernels that round once and chains that round on the way
            scale = max(1.0, want.abs().max().item())
            torch.testing.assert_close(have, want, rtol=5e-2, atol=5e-2 * scale)


def captured(call: Callable[[Inputs], Any], inputs: list[Inputs]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled and loaded before the capture
        for i in inputs[:3]:
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in inputs:
            call(i)
    return graph


@pytest.mark.parametrize(("operator", "provider"), PROVIDERS, ids="-".join)
def test_operator(benchmark: Any, inputs: list[Inputs], operator: str, provider: str) -> None:
    case, first = CASES[operator], inputs[0]
    num_bytes = case.bytes(first)
    call: Callable[[Any], Any]
    if provider == "copy":
        sources = [torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda") for _ in inputs]
        target = torch.empty_like(sources[0])
        graph = captured(lambda source: target.copy_(source), sources)  # type: ignore[arg-type]
    else:
        call = case.ours if provider == "ours" else case.rivals[provider]
        if provider == "ours":
            check(call(first), (case.expected or next(iter(case.rivals.values())))(first),
                  case.exact)  # fmt: skip
        graph = captured(call, inputs)
    shape = f"B{first.batch}_N{first.num_tokens}_C{first.channels}"
    benchmark.group = f"{operator} {shape}"
    benchmark.extra_info.update(
        operator=operator,
        provider=provider,
        shape=shape,
        dtype="bfloat16",
        threads="-",
        bytes=num_bytes,
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
    )
    benchmark.pedantic(
        lambda: CLOCK.timed(graph.replay, len(inputs)), rounds=20, iterations=1, warmup_rounds=3
    )
    benchmark.extra_info["GB_s"] = num_bytes / benchmark.stats.stats.min / 1e9


@pytest.mark.parametrize("operator", ["gather_topk", "cls_scores", "gather_rows", "scatter_back"])
def test_host_time_of_a_launch(operator: str, capsys: Any) -> None:
    """What a batch-1 forward without CUDA graphs waits for."""
    i, case = Inputs(Shape(1, 197, 384)), CASES[operator]

    def host_us(call: Callable[[Inputs], Any]) -> float:
        best = float("inf")
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                call(i)
            best = min(best, (time.perf_counter() - start) / 100)
        return best * 1e6

    times = {"ours": host_us(case.ours)} | {n: host_us(call) for n, call in case.rivals.items()}
    with capsys.disabled():
        print(f"\n{operator}, host us a call:", {n: round(t, 1) for n, t in times.items()})
