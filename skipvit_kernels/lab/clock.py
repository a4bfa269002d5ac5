"""Clocks: calls timed in turn, and the most memory that one holds.

times = Times([])
interleave({"patched": step(patched), "sliced": step(floor)}, times)
times.ratio("patched", "sliced") - 1                   # the routing overhead
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from skipvit_kernels.lab import machine


def forward_step(model: nn.Module, images: Tensor, *, bfloat16: bool = False) -> Callable[[], None]:
    """An inference of `images`, as a call to time. Sets nothing on the model."""

    @torch.inference_mode()
    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            model(images)

    return step


def cuda_graph(call: Callable[[], None]) -> Callable[[], None]:
    """The call captured in a CUDA graph, to replay without the host's launches in between."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and allocate before the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, *, bfloat16: bool = False
) -> Callable[[], None]:
    """Forward, cross entropy and backward, as a call to time.

    The gradients are freed at its end, so that every call starts from the same memory.
    """

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        model.zero_grad()

    return step


@dataclasses.dataclass(frozen=True)
class Times:
    """What `interleave` measured: the seconds of each call of a round, by name.

    Wall time on the CPU; on CUDA the device's, between two events.
    """

    rounds: list[dict[str, float]]

    def of(self, name: str) -> list[float]:
        """Of one call, round by round."""
        return [seconds[name] for seconds in self.rounds]

    def best(self, name: str) -> float:
        """The shortest call: what noise cannot improve on."""
        return min(self.of(name))

    def ratio(self, name: str, base: str) -> float:
        """Time of `name` over time of `base`, of the shortest calls."""
        return self.best(name) / self.best(base)

    def paired_ratio(self, name: str, base: str) -> float:
        """The same as the median over the rounds: no drift of the machine reaches it."""
        return statistics.median(seconds[name] / seconds[base] for seconds in self.rounds)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    times: Times,
    *,
    rounds: int,
    warmup: int,
    device: str = "cpu",
    on_call: Callable[[], object] = lambda: None,
) -> None:
    """Time the calls in turn, A B C A B C ..., in this process and without garbage collection.

    Args:
        calls: by name.
        times: what to add to; whoever is interrupted has the finished rounds in it.
        rounds: timed rounds.
        warmup: rounds before them that are not timed.
        device: where the calls' work runs.
        on_call: called after each, for a progress bar.
    """
    with _no_garbage_collection():
        for turn in range(-warmup, rounds):
            seconds: dict[str, float] = {}
            for name, call in calls.items():
                if device == "cuda":
                    torch.cuda.synchronize()
                start = _mark(device)
                call()
                (seconds[name],) = _between([start, _mark(device)])
                on_call()
            if turn >= 0:
                times.rounds.append(seconds)


def _mark(device: str) -> Any:
    """Now: on the wall, or in what the device has been handed."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(marks: list[Any]) -> list[float]:
    """Seconds from each mark to the next."""
    if isinstance(marks[0], float):
        return [b - a for a, b in itertools.pairwise(marks)]
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak_memory(call: Callable[[], object], *, device: str = "cpu") -> int:
    """Most bytes of tensors that one call holds at once, beyond those held when it starts.

    On CUDA by the caching allocator's own count. On the CPU from the profiler's record of every
    allocation; the call must not free what was held before it, which the profiler does not count.
    What libraries take past torch's allocator (a BLAS's buffers) is not seen. Make the call once
    before where its first time allocates more (an optimizer's state).
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    # The profiler's library would write its start and stop to stderr; it reads this when it loads.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with (
        _no_garbage_collection(),
        torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        call()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate((change.nbytes() for change in changes), initial=0))


def resident_peak(call: Callable[[], object]) -> int | None:
    """Most bytes by which one call makes this process grow in physical memory; Linux only.

    What the operating system counts, BLAS buffers and fragmentation included: it varies by some
    percent from call to call. None where the system does not tell.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "malloc_trim"):
        return None
    gc.collect()
    libc.malloc_trim(0)  # what earlier calls freed would be used again, uncounted
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    except OSError:
        return None
    before = machine.proc_bytes("self/status", "VmRSS")
    call()
    return machine.proc_bytes("self/status", "VmHWM") - before


def layer_seconds(model: nn.Module, blocks: Iterable[nn.Module], images: Tensor) -> list[float]:
    """Where an inference's time goes: seconds of each of the model's blocks, of one call.

    From the first call of a block's part to that of the next block's, so that a drop counts for its
    own layer and a rejoin for the layer before it; of the last block to the end of the model. Wall
    time on the CPU, the device's on CUDA. The model must not be compiled: hooks mark the times.
    """
    marks: list[Any] = []

    def begin(at: int, *_: Any) -> None:
        if at == len(marks):
            marks.append(_mark(images.device.type))

    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for at, block in enumerate(blocks):
            for part in block.modules():
                hook = functools.partial(begin, at)
                hooks.enter_context(part.register_forward_pre_hook(hook))
        model(images)
        marks.append(_mark(images.device.type))
    return _between(marks)
