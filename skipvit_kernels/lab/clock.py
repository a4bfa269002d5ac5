"""Clocks: calls timed in turn, and the most memory that one holds.

times = interleave({"patched": step(patched), "sliced": step(floor)})
times.ratio("patched", "sliced") - 1                   # the routing overhead
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import itertools
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity


def forward_step(
    model: nn.Module, images: Tensor, *, autocast: torch.dtype | None = None
) -> Callable[[], None]:
    """An inference of `images`, as a call to time. Sets nothing on the model."""

    @torch.inference_mode()
    def step() -> None:
        with _autocast(images, autocast):
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
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    autocast: torch.dtype | None = None,
) -> Callable[[], None]:
    """Forward, cross entropy, backward and, where given, the optimizer's step, as a call to time.

    The gradients are freed at its end, so that every call starts from the same memory.
    """

    def step() -> None:
        with _autocast(images, autocast):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    return step


def _autocast(images: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None)


@dataclasses.dataclass(frozen=True)
class Times:
    """What `interleave` measured: entry r of every list is round r.

    Attributes:
        seconds: per name, wall time of each call; on CUDA the device's, between two events.
        cpu_seconds: per name, processor time of all threads of this process.
    """

    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]]

    @classmethod
    def of(cls, names: Iterable[str]) -> Times:
        """With nothing measured so far."""
        names = list(names)
        return cls({name: [] for name in names}, {name: [] for name in names})

    def whole_rounds(self) -> Times:
        """Without the calls of a round that was interrupted."""
        rounds = min(map(len, self.cpu_seconds.values()))
        seconds, cpu = (
            {name: values[:rounds] for name, values in lists.items()}
            for lists in (self.seconds, self.cpu_seconds)
        )
        return Times(seconds, cpu)

    def best(self, name: str) -> float:
        """The shortest call, in seconds: what noise cannot improve on."""
        return min(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Time of `name` over time of `base`, of the shortest calls."""
        return self.best(name) / self.best(base)

    def paired_ratio(self, name: str, base: str) -> float:
        """The same as the median over the rounds: no drift of the machine reaches it."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(a / b for a, b in pairs)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 10,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    times: Times | None = None,
    on_call: Callable[[], object] | None = None,
) -> Times:
    """Time the calls in turn, A B C A B C ..., in this process and without garbage collection.

    Args:
        calls: by name; at least one.
        rounds: timed rounds, at least 1.
        warmup: rounds before them that are not timed.
        device: where the calls' work runs.
        times: what to add to and return; a caller that is interrupted still has it.
        on_call: called after each, for a progress bar.

    Raises:
        ValueError: without calls or rounds.
    """
    if not calls or rounds < 1 or warmup < 0:
        raise ValueError(
            "interleave needs calls, rounds >= 1 and warmup >= 0, "
            f"got {len(calls)} calls, rounds={rounds}, warmup={warmup}"
        )
    timed = _cuda_seconds if torch.device(device).type == "cuda" else _cpu_seconds
    times = Times.of(calls) if times is None else times
    with _no_garbage_collection():
        for turn in range(-warmup, rounds):
            for name, call in calls.items():
                cpu = time.process_time()
                seconds = timed(call)
                if turn >= 0:
                    times.seconds[name].append(seconds)
                    times.cpu_seconds[name].append(time.process_time() - cpu)
                if on_call is not None:
                    on_call()
    return times


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


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


def peak_memory(call: Callable[[], object], *, device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors that one call holds at once, beyond those held when it starts.

    On CUDA by the caching allocator's own count. On the CPU from the profiler's record of every
    allocation; the call must not free what was held before it, which the profiler does not count.
    What libraries take past torch's allocator (a BLAS's buffers) is not seen. Make the call once
    before where its first time allocates more (an optimizer's state).
    """
    if torch.device(device).type == "cuda":
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
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        peak = max(peak, held)
    return peak


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
    before = _status_kib("VmRSS")
    call()
    return 1024 * (_status_kib("VmHWM") - before)


def _status_kib(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{key}:\s*(\d+) kB", status)[0])


def layer_seconds(model: nn.Module, blocks: Iterable[nn.Module], images: Tensor) -> list[float]:
    """Where an inference's time goes: seconds of each of the model's blocks, of one call.

    From the first call of a block's part to that of the next block's, so that a drop counts for its
    own layer and a rejoin for the layer before it; of the last block to the end of the model. Wall
    time on the CPU, the device's on CUDA. The model must not be compiled: hooks mark the times.
    """
    cuda = images.device.type == "cuda"
    marks: list[Any] = []
    layer_of = {part: at for at, block in enumerate(blocks) for part in block.modules()}

    def mark() -> None:
        if cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    def begin(part: nn.Module, args: Any) -> None:
        if layer_of[part] == len(marks):
            mark()

    handles = [part.register_forward_pre_hook(begin) for part in layer_of]
    try:
        with torch.inference_mode():
            model(images)
            mark()
    finally:
        for handle in handles:
            handle.remove()
    if cuda:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]
    return [b - a for a, b in itertools.pairwise(marks)]
