"""Every operator, forward and backward, against plain PyTorch and against a plain copy.

    pytest benchmarks/test_operator_speed.py --benchmark-only              # on the CPU
    pytest benchmarks/test_operator_speed.py --benchmark-only --device cuda
    pytest benchmarks/test_operator_speed.py --full --summary-csv all.csv  # everything: an hour
    pytest benchmarks/test_operator_speed.py -k "gather_topk and B8 and float32"
    pytest benchmarks/test_operator_speed.py --benchmark-disable           # checks, times nothing

A group is one operator at one shape, dtype and number of CPU threads. Its providers: `copy`, a
plain copy of the operator's bytes; `naive`, what people write; `best_...`, the fastest chains we
know in plain torch; `compiled`, the naive chain under torch.compile for this very shape; `ours`.
They stand in `cases.py` and `chains.py`, how each device is timed in `devices.py`. Kernels are
called directly, without autograd; "forward+backward" are the public operators with it.

Everyone gets the same inputs, allocates its own output, and is compared with the reference before
it is timed. The times in the table at the end are the shortest: on shared cores the mean measures
the neighbours. `share_of_copy` is the time of the copy over the operator's, `speedup` the time of
the fastest rival over ours, each the median over the turns of what the turn gave; both stand in
`extra_info` too, of that turn.

By default 6 shapes of real ViTs; on the CPU float32 and bfloat16, with all threads that torch uses,
compiled in float32 alone (a `-` in the table); on a GPU bfloat16. `--full` adds shapes, compiles
both dtypes, and times one CPU thread and a GPU's float32 too. Two turns of a CPU's rivals leave
noise of ten percent on a shared machine, `--turns 6` less.

A shape that does not fit the memory is skipped with the reason. Ctrl-C keeps what was measured: the
table, the CSV (written as the groups come, so that even a kill leaves it) and what
`--benchmark-json`, `--benchmark-save` and `--benchmark-autosave` write; only the provider that was
being timed is missing. `--benchmark-compare` finds the same tests by name in a saved run.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import chains
import pytest
import torch
from cases import CASES, Case, Inputs, Shape, bytes_needed
from devices import DEVICES
from torch import Tensor

import skipvit_kernels as sk
from skipvit_kernels import reference
from skipvit_kernels.lab.machine import free_memory

# Or torch.compile would run the plain chain after 8 compilations of it, and not say so.
torch._dynamo.config.fail_on_recompile_limit_hit = True


def make_device(config: pytest.Config) -> Any:
    device: Any = DEVICES[config.getoption("--device")](config.getoption("--full"))
    device.turns = config.getoption("--turns") or device.turns
    return device


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is not test_operator:
        return
    device = make_device(metafunc.config)
    metafunc.parametrize(
        ("operator", "shape", "dtype", "threads", "provider", "turn"),
        [
            pytest.param(
                *(operator, shape, dtype, threads, provider, turn),
                id="-".join(
                    [operator, str(shape), dtype, *([f"t{threads}"] if threads else []), provider]
                    + ([str(turn)] if device.turns > 1 else [])
                ),
                marks=pytest.mark.benchmark(timer=device.timer),
            )
            for shape in device.shapes
            for dtype in device.dtypes
            for threads in device.threads
            for operator, case in CASES.items()
            for turn in range(device.turns)
            # The copy first and ours last: each knows whom it is compared with.
            for provider in ("copy", *case.rivals(), "compiled", "ours")
            if provider != "compiled" or dtype in device.compiled_dtypes
        ],
    )


@pytest.fixture
def set_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    yield
    torch.set_num_threads(before)


class Workplace:
    """The tensors of the shape at hand; the tests come ordered by shape, then by operator."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.shape: tuple[Shape, str] | None = None
        self.operator: str | None = None
        self.checked: set[tuple[str, str]] = set()

    def enter(self, shape: Shape, dtype: str, operator: str) -> tuple[list[Inputs], list[Any]]:
        """The inputs, and what the operator must return for the `ends` of them."""
        if self.shape != (shape, dtype):
            self.inputs, self.expected = [], []  # before the next ones are made
            self.shape, self.operator = (shape, dtype), None
            self.device.release()
            try:
                self.problem = self._make_inputs(shape, dtype)
            except RuntimeError as error:
                self.problem = out_of_memory(error, f"{shape} in {dtype}")
                self.inputs = []
        if self.problem is not None:
            pytest.skip(self.problem)
        if self.operator != operator:
            torch._dynamo.reset()  # guards of what else was compiled from the same chain cost time
            case, self.expected = CASES[operator], []
            call = provider_call(case, reference, "ours")
            for inputs in ends(self.inputs):
                results = call(*case.args(inputs))
                results = results if isinstance(results, tuple) else (results,)
                # Detached: autograd's nodes of the inputs are of the stream that they were made
                # on, which must not be another one than the capture's.
                self.expected.append(tuple(result.detach() for result in results))
            self.operator = operator
        return self.inputs, self.expected

    def _make_inputs(self, shape: Shape, dtype: str) -> str | None:
        """Why there are none, or None."""
        make = functools.partial(Inputs, shape, getattr(torch, dtype), self.device.name)
        needed, available = bytes_needed(shape, dtype), free_memory(self.device.name)
        if needed > available:
            return (
                f"{shape} in {dtype} needs about {needed / 2**30:.1f} GiB of memory, "
                f"{available / 2**30:.1f} GiB are available"
            )
        first = make(seed=0)
        count = self.device.num_inputs(min(case.bytes(first) for case in CASES.values()))
        self.inputs = [first, *(make(seed=seed) for seed in range(1, count))]
        return None


@pytest.fixture(scope="session")
def workplace(request: Any) -> Workplace:
    return Workplace(make_device(request.config))


def provider_call(case: Case, module: Any, provider: str) -> Callable[..., Any]:
    """A provider; ours is the operator of `module`."""
    if provider == "ours":
        call = case.operator(module)
    elif provider == "compiled":
        call = torch.compile(case.naive, fullgraph=True, dynamic=False)
    else:
        call = case.rivals()[provider]
    return chains.with_backward(call) if case.backward else call


def ends(of: list[Any]) -> list[Any]:
    """The first and the last, or the only one."""
    return of[:: max(1, len(of) - 1)]


def check(
    results: list[Any], expected: list[tuple[Tensor, ...]], exact: bool, low_precision: bool
) -> None:
    """Bit for bit, or within some roundings of the largest value of each row.

    Kernels round once and chains on the way. A bound by the largest value of the whole tensor would
    let a fused row or the gradient of the scores be anything.
    """
    tolerance = 3e-2 if low_precision else 1e-5
    for result, wanted in zip(results, expected, strict=True):
        result = result if isinstance(result, tuple) else (result,)
        for have, want in zip(result, wanted, strict=True):
            assert have.shape == want.shape
            assert have.dtype == want.dtype
            if exact or not want.is_floating_point():
                assert torch.equal(have, want)
            else:
                bound = tolerance * want.where(want.isfinite(), 0).abs().amax(-1, keepdim=True)
                assert ((have == want) | ((have - want).abs() <= bound)).all()


def out_of_memory(error: RuntimeError, what: str) -> str:
    """The reason to skip; any other error is raised again."""
    # On the CPU torch has no exception of its own for this.
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return f"too little memory for {what}: {str(error).splitlines()[0]}"
    raise error


@contextlib.contextmanager
def skip_what_cannot_be(device: Any, what: str) -> Iterator[None]:
    """A compiler that is not there, a chain that takes too much memory: the others go on."""
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"torch.compile does not work here: {str(error).splitlines()[0]}")
    except RuntimeError as error:
        reason = out_of_memory(error, what)
        device.release()
        pytest.skip(reason)


def test_operator(
    benchmark: Any,
    results: Any,
    workplace: Workplace,
    set_threads: None,
    operator: str,
    shape: Shape,
    dtype: str,
    threads: int | None,
    provider: str,
    turn: int,
) -> None:
    device, case = workplace.device, CASES[operator]
    group = f"{operator} {shape} {dtype}" + (f" {threads} threads" if threads else "")
    with skip_what_cannot_be(device, group):
        inputs, expected = workplace.enter(shape, dtype, operator)
        if provider == "copy":
            call, args = device.copies(case, inputs)
            expected = [(source,) for *_, source in ends(args)]
        else:
            call = provider_call(case, sk if case.backward else device.backend, provider)
            args = [case.args(i) for i in inputs]
        run, outputs = device.prepare(call, args)
        if (group, provider) not in workplace.checked:
            exact = case.exact or provider == "copy"
            check(ends(outputs), expected, exact, dtype == "bfloat16")
            workplace.checked.add((group, provider))
        del outputs  # malloc may give the timed calls their memory
        benchmark.group = group
        benchmark.extra_info.update(
            operator=operator,
            provider=provider,
            shape=str(shape),
            dtype=dtype,
            threads=threads,
            bytes=case.bytes(inputs[0]),
            device=device.describe(),
            torch=torch.__version__,
            load=os.getloadavg()[0],
        )
        try:
            device.measure(benchmark, run)
        except BaseException:  # Ctrl-C too: pytest-benchmark cannot save what has no rounds
            benchmark.has_error = True
            raise
    if benchmark.enabled:
        results.add(group, benchmark.extra_info, benchmark.stats.stats.min)


@pytest.mark.parametrize("operator", ["gather_topk", "cls_scores", "gather_rows", "scatter_back"])
def test_host_time_of_a_launch(operator: str, workplace: Workplace, capsys: Any) -> None:
    """What a batch-1 forward on a GPU waits for without CUDA graphs."""
    if workplace.device.name != "cuda":
        pytest.skip("a launch is a GPU's: --device cuda")
    inputs, expected = workplace.enter(Shape(1, 197, 384), "bfloat16", operator)
    case, args = CASES[operator], CASES[operator].args(inputs[0])

    def host_us(provider: str) -> float:
        call = provider_call(case, workplace.device.backend, provider)
        check([call(*args)], expected[:1], case.exact, low_precision=True)
        best = float("inf")
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                call(*args)
            best = min(best, (time.perf_counter() - start) / 100)
        return best * 1e6

    with skip_what_cannot_be(workplace.device, operator):
        times = {provider: host_us(provider) for provider in ("ours", *case.rivals(), "compiled")}
    with capsys.disabled():
        print(f"\n{operator}, host us a call:", {n: round(t, 1) for n, t in times.items()})
