"""What skipping buys for a model: unpatched, sliced and patched, measured in turn.

rows: list[Measurement] = []
run(Job("vit_small_patch16_224", ("6(55%)+11", ":cls"), batch_size=8, training=True), rows)
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from skipvit_kernels.lab import clock, machine
from skipvit_kernels.skipping import families
from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.cost import ViTShape, activations, ideal_speedup
from skipvit_kernels.skipping.floor import sliced, twin
from skipvit_kernels.skipping.patch import patch
from skipvit_kernels.skipping.verify import verify

CONTROL = "unpatched again"
# What a report says of a `Job`.
RAN = ("model", "mode", "batch_size", "image_size", "device", "dtype", "compiled", "cuda_graph")


class TooLittleMemory(Exception):
    """A job that does not fit; its text says what it needs and what there is."""


def at_least(least: int, **values: int | None) -> None:
    """Raise a ValueError that names the first of the values below `least`; None is of any size."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclasses.dataclass(frozen=True)
class Job:
    """Variants of one model, timed in turn, so that their ratios hold.

    Attributes:
        model: a timm model's name; any, where `run` is given the model itself.
        configs: what to patch it with, in the notation of `SkipConfig`.
        batch_size: images, at least 1.
        training: time training steps (forward, cross entropy, backward) rather than inference.
        image_size: side in pixels; default the model's own.
        device: "cpu" or "cuda".
        bfloat16: run under bfloat16 autocast.
        compiled: torch.compile every variant.
        cuda_graph: replay each inference as a CUDA graph: what a batch of 1 needs on a GPU.
        rounds: how often each variant is timed, at least 1.
        warmup: rounds before them.
        memory: also measure peak memory, but for the floors.
        check: `verify` each configuration on this model first: nothing unchecked is timed.
        control: also time the unpatched model a second time: what its ratio misses 1 by is noise.

    Raises:
        ValueError: on values outside these, naming the attribute; a device that is not there.
    """

    model: str
    configs: tuple[str, ...]
    batch_size: int
    training: bool
    image_size: int | None = None
    device: str = "cpu"
    bfloat16: bool = False
    compiled: bool = False
    cuda_graph: bool = False
    rounds: int = 10
    warmup: int = 2
    memory: bool = True
    check: bool = True
    control: bool = False

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size, rounds=self.rounds, image_size=self.image_size)
        at_least(0, warmup=self.warmup)
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f'device must be "cpu" or "cuda", got {self.device!r}')
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda is not there: torch sees no GPU")
        if self.cuda_graph and (self.device != "cuda" or self.training):
            raise ValueError("cuda_graph needs device cuda and training False")
        for config in self.configs:
            SkipConfig.parse(config)

    def __str__(self) -> str:
        parts = [
            self.model,
            self.mode,
            f"batch {self.batch_size}",
            *([f"{self.image_size} px"] if self.image_size else []),
            self.dtype,
            *(["torch.compile"] if self.compiled else []),
            *(["CUDA graph"] if self.cuda_graph else []),
            self.device,
        ]
        return ", ".join(parts)

    @property
    def mode(self) -> str:
        return "training step" if self.training else "forward"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.bfloat16 else "float32"

    @property
    def bytes_per_activation(self) -> int:
        """Of one number that the blocks keep of each image."""
        return self.batch_size * (2 if self.bfloat16 else 4)

    @property
    def floors(self) -> dict[str, str]:
        """The sliced models: name of each and the configuration that it is the floor of."""
        dropping = (config for config in self.configs if SkipConfig.parse(config).drop_at)
        return {f"sliced {config}": config for config in dropping}

    @property
    def variants(self) -> dict[str, str]:
        """What is timed, "unpatched", each configuration, each floor; and what each drops."""
        control = {CONTROL: ""} if self.control else {}
        return {"unpatched": "", **control, **{c: c for c in self.configs}, **self.floors}

    @property
    def num_calls(self) -> int:
        """Calls of `run`'s progress."""
        memory = (1 + (self.device == "cpu")) * (1 + len(self.configs)) if self.memory else 0
        return len(self.variants) * (self.rounds + self.warmup) + memory


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One variant of a job: the figures of its calls, which were timed in turn with the others'.

    Ratios are of the shortest calls and, as `paired_`, the median over the rounds.

    Attributes:
        job: what ran, its image size filled in.
        config: one of the job's variants.
        images_per_second: of the shortest call.
        speedup: over the unpatched model.
        ideal_speedup: what the arithmetic alone allows.
        floor_speedup: of the sliced model, which selects for free; None where nothing drops.
        overhead: routing overhead: time over the floor's, less 1.
        peak_memory: bytes that a call holds at most beyond what was held before, by torch's
            allocator.
        resident_memory: the same as the operating system counts it (Linux, on the CPU).
        memory_saved: unpatched peak less this peak.
        activations_saved: bytes of the skipped tokens' activations: what a training step's peak
            should fall by.
        threads, load: of the CPU; its load average when the job began.
        seconds: each timed call.
    """

    job: Job
    config: str
    images_per_second: float
    speedup: float
    paired_speedup: float
    ideal_speedup: float
    floor_speedup: float | None
    paired_floor_speedup: float | None
    overhead: float | None
    paired_overhead: float | None
    peak_memory: int | None
    resident_memory: int | None
    memory_saved: int | None
    activations_saved: int | None
    threads: int
    load: float
    seconds: list[float]

    def record(self) -> dict[str, Any]:
        """Every figure by its column of a report's results.csv, and the seconds of its calls."""
        ran = {name: getattr(self.job, name) for name in RAN}
        return ran | {name: value for name, value in vars(self).items() if name != "job"}


def measurement(
    job: Job,
    name: str,
    shape: ViTShape,
    times: clock.Times,
    peaks: dict[str, int],
    residents: dict[str, int | None],
    load: float,
) -> Measurement:
    """The figures of a variant of the job, from the times and memory of all."""
    floor = f"sliced {name}" if f"sliced {name}" in job.floors else None
    fewer = activations(shape) - activations(shape, job.variants[name])
    return Measurement(
        job=job,
        config=name,
        images_per_second=job.batch_size / times.best(name),
        speedup=times.ratio("unpatched", name),
        paired_speedup=times.paired_ratio("unpatched", name),
        ideal_speedup=ideal_speedup(shape, job.variants[name]),
        floor_speedup=times.ratio("unpatched", floor) if floor else None,
        paired_floor_speedup=times.paired_ratio("unpatched", floor) if floor else None,
        overhead=times.ratio(name, floor) - 1 if floor else None,
        paired_overhead=times.paired_ratio(name, floor) - 1 if floor else None,
        peak_memory=peaks.get(name),
        resident_memory=residents.get(name),
        memory_saved=peaks["unpatched"] - peaks[name] if name in peaks else None,
        activations_saved=fewer * job.bytes_per_activation if job.training else None,
        threads=torch.get_num_threads(),
        load=load,
        seconds=times.of(name),
    )


def build(job: Job, *, pretrained: bool = False, **options: Any) -> Any:
    """The job's model, with weights from torch's generator at seed 0; or timm's, downloaded.

    Raises:
        ValueError: where timm does not know it, or cannot build it at the image size, or with the
            further options of its create_model.
    """
    import timm

    import skipvit_kernels.models  # noqa: F401  (registers its models with timm)

    if not timm.is_model(job.model):
        close = difflib.get_close_matches(job.model, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"model must be a timm model's name, got {job.model!r}{hint}")
    torch.manual_seed(0)
    size: dict[str, Any] = {} if job.image_size is None else {"img_size": job.image_size}
    try:
        model = timm.create_model(job.model, pretrained=pretrained, **size | options)
    except Exception as error:  # models, and downloads, raise a dozen kinds
        how = f"with {options}" if options else f"at {job.image_size or 'its own'} px"
        raise ValueError(
            f"{job.model} cannot be built {how}: {' '.join(str(error).split()):.300}"
        ) from error
    return model.to(job.device).train(job.training)


def run(
    job: Job,
    rows: list[Measurement],
    *,
    model: Any = None,
    on_call: Callable[[], object] = lambda: None,
) -> None:
    """Measure a job and append a row for each variant, "unpatched" first.

    Args:
        rows: where the results go: after Ctrl-C, those of the rounds that were finished.
        model: to use instead of building the job's, on its device and in its mode; not patched, but
            its gradients are freed.
        on_call: called after each call, `job.num_calls` times at most, for a progress bar.

    Raises:
        ValueError: where the model cannot be patched. RuntimeError: as `verify`. TooLittleMemory:
            where the job would not fit into the memory that is free, or torch finds that it does
            not.
    """
    model = build(job) if model is None else model
    variants: dict[str, nn.Module] = {}
    for name, drops in job.variants.items():
        variants[name] = sliced(model, drops) if name in job.floors else twin(model)
        if name in job.configs:
            patch(variants[name], SkipConfig.parse(name).at())
    check_memory(job, model)
    image_shape = families.of(model).image_shape(model)
    for config in job.configs if job.check else ():
        verify(model, config, images=torch.randn(1, *image_shape, device=job.device))
    load = os.getloadavg()[0]
    calls = {name: _call(job, variant, image_shape) for name, variant in variants.items()}
    times = clock.Times([])
    peaks: dict[str, int] = {}
    residents: dict[str, int | None] = {}
    try:
        clock.interleave(
            calls, times, rounds=job.rounds, warmup=job.warmup, device=job.device, on_call=on_call
        )
        for name in ("unpatched", *job.configs) if job.memory else ():
            peaks[name] = clock.peak_memory(calls[name], device=job.device)
            on_call()
            if job.device == "cpu":
                residents[name] = clock.resident_peak(calls[name])
                on_call()
    except (MemoryError, RuntimeError) as error:  # torch's CPU allocator raises RuntimeError
        # Not just "memory": an illegal memory access is a fault of a kernel.
        ended = "out of memory" in str(error) or "can't allocate memory" in str(error)
        if not ended and not isinstance(error, MemoryError):
            raise
        reason, *_ = str(error).splitlines() or ["out of memory"]
        raise TooLittleMemory(f"{job} does not fit: {reason}") from error
    finally:
        if times.rounds:
            ran = dataclasses.replace(job, image_size=image_shape[1])
            about = (ViTShape.of(model), times, peaks, residents, load)
            rows += [measurement(ran, name, *about) for name in job.variants]


def _call(job: Job, variant: nn.Module, image_shape: tuple[int, ...]) -> Callable[[], None]:
    """One inference or training step of a variant on random images, as a call to time."""
    if job.compiled:
        variant = torch.compile(variant)  # type: ignore[assignment]
    images = torch.randn(job.batch_size, *image_shape, device=job.device)
    if not job.training:
        step = clock.forward_step(variant, images, bfloat16=job.bfloat16)
        return clock.cuda_graph(step) if job.cuda_graph else step
    labels = torch.zeros(job.batch_size, dtype=torch.int64, device=job.device)
    return clock.training_step(variant, images, labels, bfloat16=job.bfloat16)


def check_memory(job: Job, model: Any) -> None:
    """Raise TooLittleMemory where the unpatched model's step would not fit.

    Counted are gradients, the activations of a training step, and of an inference the largest
    block's. Linux would otherwise promise the memory and kill the process when it is used.
    """
    free = machine.free_memory(job.device)
    shape = ViTShape.of(model)
    images = activations(shape) * job.bytes_per_activation
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    needed = images + weights if job.training else images // shape.depth
    if needed > free:
        raise TooLittleMemory(
            f"{job} needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        )


def block_seconds(job: Job, *, rounds: int = 10, warmup: int = 2) -> dict[str, list[float]]:
    """Where an inference's time goes: the shortest seconds of each block, in calls by turns.

    Of the unpatched model and the first three configurations.
    """
    model = build(job).eval()
    images = torch.randn(job.batch_size, *families.of(model).image_shape(model), device=job.device)
    variants = {"unpatched": twin(model)}
    for config in job.configs[:3]:
        variants[config] = patch(twin(model), SkipConfig.parse(config).at())
    best: dict[str, list[float]] = {}
    for turn in range(-warmup, rounds):
        for name, variant in variants.items():
            seconds = clock.layer_seconds(variant, families.of(variant).blocks(variant), images)
            if turn >= 0:
                best[name] = list(map(min, seconds, best.get(name, seconds)))
    return best
