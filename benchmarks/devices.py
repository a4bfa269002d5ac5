"""How a call is timed on a CPU and on a GPU, and what else differs between the two."""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import cases
import torch

from skipvit_kernels.backends import cpu, triton
from skipvit_kernels.lab.machine import cpu_name

Args = tuple[Any, ...]


def hold_free_blocks(run: Callable[[], Any]) -> list[torch.Tensor]:
    """Blocks to keep while `run` is timed, so that its results come from the heap's end.

    Where malloc has two free blocks of the size it hands them out in turn, and the cache must hold
    both: `gather_rows` at (64, 197, 768) in bfloat16 took 250 us so and 180 us with one block, a
    copy 205 and 150 us. Who would get which is chance. What is held is not written to, so that it
    takes no more memory than there was.
    """
    results = run()
    results = results if isinstance(results, tuple) else (results,)
    sizes = sorted({result.nbytes for result in results}, reverse=True)
    del results
    held: list[torch.Tensor] = []
    for size in sizes:
        in_a_row, before = 0, 0
        for _ in range(64):  # another malloc than glibc's may never give neighbours
            held.append(torch.empty(size, dtype=torch.uint8))
            address = held[-1].data_ptr()
            in_a_row = in_a_row + 1 if size <= address - before < size + 4096 else 0
            if in_a_row == 3:
                break
            before = address
    return held


class Cpu:
    """Wall time of calls on one set of tensors.

    A copy is `Tensor.clone()` of as many rows as the operator must read or must write, whichever is
    more: the copy then moves at least as much as the operator in either direction, but for scores
    and indices. Half of the sum would do no justice to a kernel that only reads, as cls_scores: it
    has no second stream for the memory to serve at the same time.
    """

    name = "cpu"
    backend = cpu
    timer = staticmethod(time.perf_counter)
    # Every provider of a group twice, side by side in time: what else the machine does, and
    # whether it has huge pages left for an output, changes within seconds.
    turns = 2

    def __init__(self, full: bool) -> None:
        cores = torch.get_num_threads()
        self.shapes = cases.CPU_FULL if full else cases.CPU_SHAPES
        self.dtypes = ["float32", "bfloat16"]
        self.threads: list[int | None] = sorted({cores, 1}, reverse=True) if full else [cores]
        # Compiling takes 0.6 to 1.8 s a chain and shape. One compilation for all shapes (dynamic)
        # is no way out: compiled like that, cls_scores takes 1.5 to 7 times as long.
        self.compiled_dtypes = self.dtypes if full else self.dtypes[:1]

    @staticmethod
    @functools.cache
    def describe() -> str:
        return cpu_name()

    @staticmethod
    def num_inputs(num_bytes: int) -> int:
        return 1

    @staticmethod
    def copies(
        case: cases.Case, inputs: list[cases.Inputs]
    ) -> tuple[Callable[..., Any], list[Args]]:
        """The call, and what to call it with; the last of each is the source."""
        (first,) = inputs
        source = torch.ones(first.rows(case.rows(first)), dtype=torch.uint8)
        return torch.Tensor.clone, [(source,)]

    @staticmethod
    def prepare(
        call: Callable[..., Any], inputs: list[Args]
    ) -> tuple[Callable[[], object], list[Any]]:
        """What to time, and the results of the same calls to check."""
        (args,) = inputs
        return lambda: call(*args), [call(*args)]

    @staticmethod
    def measure(benchmark: Any, run: Callable[[], object]) -> None:
        """About 20 ms: rounds long enough for the clock, and enough of them for a minimum."""
        held = hold_free_blocks(run)
        start = time.perf_counter()
        for _ in range(2):
            run()
        seconds = (time.perf_counter() - start) / 2
        iterations = max(1, int(50e-6 / seconds))
        rounds = max(5, min(200, int(20e-3 / (seconds * iterations))))
        benchmark.pedantic(run, rounds=rounds, iterations=iterations, warmup_rounds=1)
        held.clear()

    @staticmethod
    def release() -> None:
        """Give back what malloc keeps: mostly holes, which another shape may not fit into."""
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)


class DeviceClock:
    """Seconds of device time that one call has taken in the runs of `timed` so far."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def timed(self, graph: torch.cuda.CUDAGraph, calls: int) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device is busy with this while the host hands it the rest, so that the time between
        # the events holds nothing of the host's.
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        self.seconds += start.elapsed_time(end) / 1000 / calls


class Cuda:
    """Device time of CUDA graphs that make the call once on each of several sets of tensors.

    Together the sets move four times what the L2 cache holds, and every call has its own outputs:
    hardly a gap between launches, everything cold. What is checked are the outputs of a replay. A
    copy is one from device to device that reads half of the operator's bytes and writes as many.
    """

    name = "cuda"
    backend = triton
    timer = DeviceClock()
    turns = 1

    def __init__(self, full: bool) -> None:
        self.shapes = cases.CUDA_FULL if full else cases.CUDA_SHAPES
        self.dtypes = ["bfloat16", "float32"] if full else ["bfloat16"]
        self.threads: list[int | None] = [None]
        self.compiled_dtypes = self.dtypes

    @staticmethod
    def describe() -> str:
        return torch.cuda.get_device_name()

    @staticmethod
    def num_inputs(num_bytes: int) -> int:
        """Of a call that moves so many bytes. 2,048 are enough for 280 MB at the smallest shape."""
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * 2**20
        return max(4, min(2048, -(-4 * cache // num_bytes)))

    def copies(
        self, case: cases.Case, inputs: list[cases.Inputs]
    ) -> tuple[Callable[..., Any], list[Args]]:
        size, byte = case.bytes(inputs[0]) // 2, {"dtype": torch.uint8, "device": self.name}
        return torch.Tensor.copy_, [
            (torch.empty(size, **byte), torch.ones(size, **byte)) for _ in inputs
        ]

    def prepare(
        self, call: Callable[..., Any], inputs: list[Args]
    ) -> tuple[Callable[[], object], list[Any]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiled and loaded before the capture
            for args in inputs[:3]:
                call(*args)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call(*args) for args in inputs]
        graph.replay()
        return lambda: self.timer.timed(graph, len(inputs)), results

    @staticmethod
    def measure(benchmark: Any, run: Callable[[], object]) -> None:
        benchmark.pedantic(run, rounds=20, iterations=1, warmup_rounds=3)

    @staticmethod
    def release() -> None:
        torch.cuda.empty_cache()


DEVICES = {device.name: device for device in (Cpu, Cuda)}


def absent_reason(name: str) -> str | None:
    """Why there is no such device here, or None where there is."""
    if name != "cuda" or torch.cuda.is_available():
        return None
    built = "with" if torch.version.cuda or torch.version.hip else "without"
    return (
        f"--device cuda: torch {torch.__version__}, built {built} GPU support, finds no CUDA or "
        f"ROCm GPU; what is here: --device cpu ({Cpu.describe()})"
    )
