"""What skipping buys for a model: unpatched, sliced and patched, measured in turn.

rows: list[Row] = []
run(Job("vit_small_patch16_224", ("6(55%)+11", ":cls"), batch_size=8, training=True), rows)
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipvit_kernels.lab import clock, info
from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.cost import ViTShape, activations, ideal_speedup
from skipvit_kernels.skipping.patch import patch, verify

# SkipViT's Table 1, for 12 blocks.
TABLE_1 = (
    *("6(45%)+fused", "4,7(30%,30%)+10", "4,7(30%,30%)+11", "5,8(35%,35%)+10"),
    *("5,8(35%,35%)+11", "6(45%)+11", "6(50%)+11", "6(55%)+11"),
)


CONTROL = "unpatched again"


class TooLittleMemory(Exception):
    """A job that does not fit; its text says what it needs and what there is."""


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
        for name, least in (("batch_size", 1), ("rounds", 1), ("warmup", 0), ("image_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
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
            "training step" if self.training else "forward",
            f"batch {self.batch_size}",
            *([f"{self.image_size} px"] if self.image_size else []),
            *(["bfloat16"] if self.bfloat16 else []),
            *(["torch.compile"] if self.compiled else []),
            *(["CUDA graph"] if self.cuda_graph else []),
            self.device,
        ]
        return ", ".join(parts)

    @property
    def floors(self) -> dict[str, str]:
        """The sliced models: name of each and the configuration that it is the floor of."""
        return {
            f"sliced {config}": config
            for config in self.configs
            if SkipConfig.parse(config).drop_at
        }

    @property
    def variants(self) -> list[str]:
        """Names of what is timed: "unpatched", each configuration, each floor."""
        control = [CONTROL] if self.control else []
        return ["unpatched", *control, *self.configs, *self.floors]

    @property
    def num_calls(self) -> int:
        """Calls of `run`'s progress."""
        memory = (1 + (self.device == "cpu")) * (1 + len(self.configs)) if self.memory else 0
        return len(self.variants) * (self.rounds + self.warmup) + memory


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant's results; every ratio is of calls that were timed in turn in one process.

    Attributes:
        model, mode, batch_size, image_size, device, dtype, compiled, cuda_graph:
            what ran.
        config: in its notation; "unpatched" for the model as it is, "sliced ..." for a floor.
        images_per_second: of the shortest call.
        speedup, paired_speedup: over the unpatched model; of the shortest calls, and as the median
            over the rounds.
        ideal_speedup: what the arithmetic alone allows.
        floor_speedup, paired_floor_speedup: of the sliced model, which selects for free; None
            where nothing drops.
        overhead, paired_overhead: routing overhead, time over the sliced model's, less 1.
        peak_memory: bytes that a call holds at most beyond what was held before, by torch's
            allocator; None where it was not measured.
        resident_memory: the same as the operating system counts it (Linux, on the CPU).
        memory_saved: unpatched peak less this peak, bytes.
        activations_saved: bytes of activations that the skipped tokens would have held for the
            backward: what `memory_saved` should reach in a training step.
        threads, load: of the CPU; its load average when the job began.
        seconds: each timed call.
    """

    model: str
    mode: str
    batch_size: int
    image_size: int
    device: str
    dtype: str
    compiled: bool
    cuda_graph: bool
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
    seconds: tuple[float, ...]


def scaled(config: str, depth: int) -> str:
    """A configuration for 12 blocks at the same twelfths of another depth: ViT-L's 24, say."""
    parsed = SkipConfig.parse(config)

    def layer(at: int) -> int:
        return (at - 1) * depth // 12 + 1

    rejoin = parsed.rejoin_at
    return str(
        dataclasses.replace(
            parsed,
            drop_at=tuple(map(layer, parsed.drop_at)),
            rejoin_at=None if rejoin is None else layer(rejoin),
        )
    )


def usual(model: Any) -> tuple[tuple[str, ...], list[str]]:
    """What is worth a first look on this model, and why the rest is not possible on it.

    The lossless last block; and with it the paper's fastest skip, its two stages, and EViT's fused
    token, at the same twelfths of the depth.

    Raises:
        ValueError: where the model cannot be patched at all.
    """
    patch(clock.twin(model), "")
    configs, notes, cls = [], [], ":cls"
    try:
        patch(clock.twin(model), cls)
        configs.append(cls)
    except ValueError as error:
        cls = ""
        notes.append(f"The lossless last block is not possible: {error}.")
    for config in ("6(55%)+11", "4,7(30%,30%)+10", "6(45%)+fused"):
        try:
            text = scaled(config, len(model.blocks)) + cls
            patch(clock.twin(model), text)
            configs.append(text)
        except ValueError as error:
            notes.append(f"{config} is not possible here: {error}.")
    return tuple(configs), notes


def build(job: Job) -> Any:
    """The job's model, with weights from torch's generator at seed 0 (nothing is downloaded).

    Raises:
        ValueError: where timm does not know it, or cannot build it at the image size.
    """
    import timm

    if not timm.is_model(job.model):
        close = difflib.get_close_matches(job.model, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"model must be a timm model's name, got {job.model!r}{hint}")
    torch.manual_seed(0)
    try:
        if job.image_size is None:
            model = timm.create_model(job.model)
        else:
            model = timm.create_model(job.model, img_size=job.image_size)
    except TypeError as error:
        raise ValueError(f"{job.model} cannot be built at {job.image_size} px: {error}") from error
    return model.to(job.device).train(job.training)


def run(
    job: Job,
    rows: list[Row],
    *,
    model: Any = None,
    on_call: Callable[[], object] = lambda: None,
) -> None:
    """Measure a job and append its rows, "unpatched" first.

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
    for name in job.variants:
        if name in job.floors:
            variants[name] = clock.sliced(model, job.floors[name])
        else:
            variants[name] = clock.twin(model)
        if name in job.configs:
            patch(variants[name], name, warmup_epochs=0)
    check_memory(job, model)
    if job.check:
        image = torch.randn(1, *_image_shape(model), device=job.device)
        for config in job.configs:
            verify(model, config, images=image)
    load = os.getloadavg()[0]
    calls = {name: _call(job, model, variant) for name, variant in variants.items()}
    times = clock.Times.of(calls)
    peaks: dict[str, int] = {}
    resident: dict[str, int | None] = {}
    try:
        clock.interleave(
            calls, rounds=job.rounds, warmup=job.warmup, device=job.device, times=times,
            on_call=on_call,
        )  # fmt: skip
        for name in ("unpatched", *job.configs) if job.memory else ():
            peaks[name] = clock.peak_memory(calls[name], device=job.device)
            on_call()
            if job.device == "cpu":
                resident[name] = clock.resident_peak(calls[name])
                on_call()
    except (MemoryError, RuntimeError) as error:  # torch's CPU allocator raises RuntimeError
        # Not just "memory": an illegal memory access is a fault of a kernel.
        ended = "out of memory" in str(error) or "can't allocate memory" in str(error)
        if not ended and not isinstance(error, MemoryError):
            raise
        reason, *_ = str(error).splitlines() or ["out of memory"]
        raise TooLittleMemory(f"{job} does not fit: {reason}") from error
    finally:
        times = times.whole_rounds()
        if times.seconds["unpatched"]:
            rows += _rows(job, model, times, peaks, resident, load)


def _rows(
    job: Job,
    model: Any,
    times: clock.Times,
    peaks: dict[str, int],
    resident: dict[str, int | None],
    load: float,
) -> Iterator[Row]:
    shape = ViTShape.of(model)
    floors = {config: name for name, config in job.floors.items()}
    for name in job.variants:
        config = job.floors.get(name, name if name in job.configs else "")
        floor = floors.get(name)
        saved = activations(shape) - activations(shape, config)
        has_peak = name in peaks and "unpatched" in peaks
        yield Row(
            model=job.model,
            mode="training step" if job.training else "forward",
            batch_size=job.batch_size,
            image_size=model.patch_embed.img_size[0],
            device=job.device,
            dtype="bfloat16" if job.bfloat16 else "float32",
            compiled=job.compiled,
            cuda_graph=job.cuda_graph,
            config=name,
            images_per_second=job.batch_size / times.best(name),
            speedup=times.ratio("unpatched", name),
            paired_speedup=times.paired_ratio("unpatched", name),
            ideal_speedup=ideal_speedup(shape, config),
            floor_speedup=times.ratio("unpatched", floor) if floor else None,
            paired_floor_speedup=times.paired_ratio("unpatched", floor) if floor else None,
            overhead=times.ratio(name, floor) - 1 if floor else None,
            paired_overhead=times.paired_ratio(name, floor) - 1 if floor else None,
            peak_memory=peaks.get(name),
            resident_memory=resident.get(name),
            memory_saved=peaks["unpatched"] - peaks[name] if has_peak else None,
            activations_saved=_itemsize(job) * job.batch_size * saved if job.training else None,
            threads=torch.get_num_threads(),
            load=load,
            seconds=tuple(times.seconds[name]),
        )


def _call(job: Job, model: Any, variant: nn.Module) -> Callable[[], None]:
    """One inference or training step of a variant on random images, as a call to time."""
    if job.compiled:
        variant = torch.compile(variant)  # type: ignore[assignment]
    images = torch.randn(job.batch_size, *_image_shape(model), device=job.device)
    autocast = torch.bfloat16 if job.bfloat16 else None
    if not job.training:
        step = clock.forward_step(variant, images, autocast=autocast)
        return clock.cuda_graph(step) if job.cuda_graph else step
    labels = torch.zeros(job.batch_size, dtype=torch.int64, device=job.device)
    return clock.training_step(variant, images, labels, autocast=autocast)


def _image_shape(model: Any) -> tuple[int, ...]:
    return (model.patch_embed.proj.weight.shape[1], *model.patch_embed.img_size)


def _itemsize(job: Job) -> int:
    return 2 if job.bfloat16 else 4


def check_memory(job: Job, model: Any) -> None:
    """Raise TooLittleMemory where the unpatched model's step would not fit.

    Counted are gradients, the activations of a training step, and of an inference the largest
    block's. Linux would otherwise promise the memory and kill the process when it is used.
    """
    free = free_memory(job.device)
    shape = ViTShape.of(model)
    images = activations(shape) * job.batch_size * _itemsize(job)
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    needed = images + weights if job.training else images // shape.depth
    if needed > free:
        raise TooLittleMemory(
            f"{job} needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        )


def free_memory(device: str) -> int:
    """Bytes that are left for tensors on a device; of the CPU all it has where it does not tell."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 1024 * int(re.findall(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())[0])


def missing_kernels(device: str) -> set[str]:
    """Why plain PyTorch would run in place of the device's kernels: empty where they run."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    return {kernel.reason for kernel in info.kernels() if kernel.key == key and kernel.reason}


def block_seconds(job: Job, *, rounds: int = 10, warmup: int = 2) -> dict[str, list[float]]:
    """Where an inference's time goes: the shortest seconds of each block, in calls by turns.

    Of the unpatched model and the first three configurations.
    """
    model = build(job).eval()
    images = torch.randn(job.batch_size, *_image_shape(model), device=job.device)
    variants = {"unpatched": clock.twin(model)}
    for config in job.configs[:3]:
        variants[config] = patch(clock.twin(model), config, warmup_epochs=0)
    best: dict[str, list[float]] = {}
    for turn in range(-warmup, rounds):
        for name, variant in variants.items():
            seconds = clock.layer_seconds(variant, images)
            if turn >= 0:
                best[name] = list(map(min, seconds, best.get(name, seconds)))
    return best
