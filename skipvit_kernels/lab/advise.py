"""Which settings pay on this device, and what limits the others."""

from __future__ import annotations

import copy
import dataclasses
import time

from torch import nn

from skipvit_kernels.lab import bench
from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.patch import is_patched, unpatch
from skipvit_kernels.skipping.presets import usual

LEAST_ROUNDS = 3
LEAST_GAIN = 0.02  # below two percent nobody should change a model
TOO_NOISY = 0.05  # less than the lossless last block gains


@dataclasses.dataclass(frozen=True)
class Finding:
    """One setting.

    Attributes:
        config: in the notation of `SkipConfig`.
        speedup: over the unpatched model, the median over the rounds.
        floor_speedup: of the sliced model at the same token counts, the median too; None where
            nothing drops.
        ideal_speedup: what the arithmetic allows.
        pays: whether `speedup` is beyond the noise, and beyond two percent.
        reason: what it gives, or what limits it.
    """

    config: str
    speedup: float
    floor_speedup: float | None
    ideal_speedup: float
    pays: bool
    reason: str

    @property
    def lossless(self) -> bool:
        """Whether the logits stay what they are."""
        return not SkipConfig.parse(self.config).drop_at

    @property
    def untrained(self) -> bool:
        """Whether a pretrained model loses little by it as it is: merged, and restored."""
        config = SkipConfig.parse(self.config)
        return self.lossless or (config.method == "merge" and config.rejoin_at is not None)


@dataclasses.dataclass(frozen=True, repr=False)
class Advice:
    """What `advise` found; printed, or at the end of a notebook's cell, it is a text.

    Attributes:
        workload: what was measured.
        findings: of each setting, the best first.
        noise: the share by which the unpatched model differed from itself.
        notes: what else is to be known: a setting that is not possible here, a smaller batch.
    """

    workload: str
    findings: tuple[Finding, ...]
    noise: float
    notes: tuple[str, ...]

    @property
    def recommended(self) -> str | None:
        """The fastest setting that pays, which changes outputs unless it is `lossless`, or None."""
        return next((finding.config for finding in self.findings if finding.pays), None)

    @property
    def untrained(self) -> str | None:
        """The fastest setting that pays and needs no training; None where none does."""
        return next((f.config for f in self.findings if f.pays and f.untrained), None)

    @property
    def lossless(self) -> str | None:
        """The fastest setting that pays and changes no logit; None where none does."""
        return next((f.config for f in self.findings if f.pays and f.lossless), None)

    def __repr__(self) -> str:
        width = max(len("setting"), *(len(finding.config) for finding in self.findings)) + 2
        lines = [
            f"{self.workload}; noise {self.noise:.1%}",
            "",
            f"{'setting':{width}}{'speed-up':>9}{'sliced':>8}{'ideal':>8}",
        ]
        for finding in self.findings:
            floor = "" if finding.floor_speedup is None else f"{finding.floor_speedup:.2f}"
            lines.append(
                f"{finding.config:{width}}{finding.speedup:9.2f}{floor:>8}"
                f"{finding.ideal_speedup:8.2f}  {finding.reason}"
            )
        lines += ["", *self.notes]
        if self.recommended is None and self.noise > TOO_NOISY:
            lines.append("Recommended: nothing can be told from the noise, measure again.")
        elif self.recommended is None:
            lines.append("Recommended: none, the model is best left as it is here.")
        elif self.recommended != self.untrained:
            lines.append(
                f'Recommended: sk.patch(model, "{self.recommended}"). It changes the outputs: '
                "train or fine-tune with it."
            )
        if self.untrained != self.lossless:
            lines.append(
                f'Recommended without training: sk.patch(model, "{self.untrained}"). A pretrained '
                "model loses little by it (docs/results/frontier_deit_tiny): check yours."
            )
        if self.lossless is not None:
            lines.append(f'Recommended without any loss: sk.patch(model, "{self.lossless}").')
        return "\n".join(lines)


def advise(
    model: nn.Module,
    batch_size: int = 8,
    *,
    image_size: int | None = None,
    training: bool = True,
    bfloat16: bool = False,
    seconds: float = 60,
) -> Advice:
    """Measure a handful of settings of this model on its device, and say which pay.

        print(sk.advise(model, batch_size=64))

    The settings are the paper's fastest skip, its two-stage skip, EViT's fused token and merging in
    one and in three layers, at the same fractions of the depth, each with the lossless last block
    where the head allows it, and that alone. They are timed in turn, with their sliced floors, and
    with the unpatched model twice: what the two differ by is noise.

    Args:
        model: a timm VisionTransformer on the device to measure; left as it is, a copy is used.
        batch_size: images; a smaller one is measured, and named, where `seconds` does not allow it.
        image_size: side in pixels; default the model's own.
        training: training steps rather than inference.
        bfloat16: under bfloat16 autocast.
        seconds: of measuring, at most; reached to within one call of the model.

    Raises:
        ValueError: where the model cannot be patched at all, or on values that make no sense.
        TooLittleMemory: where not even the unpatched model's step fits.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    deadline = time.monotonic() + seconds
    name = getattr(model, "default_cfg", {}).get("architecture") or type(model).__name__
    device = next(model.parameters()).device.type
    model = copy.deepcopy(model).train(training)
    if is_patched(model):
        unpatch(model)
    configs, notes = usual(model)
    job = bench.Job(
        name, configs, batch_size, training, image_size, device, bfloat16,
        memory=False, check=False, control=True,
    )  # fmt: skip
    if image_size is not None:
        model.set_input_size(img_size=image_size)  # type: ignore[operator]
    job, limit = _that_fits(job, model, deadline)
    if job.batch_size < batch_size:
        notes.append(f"Measured at batch {job.batch_size}, not {batch_size}: {limit}.")

    def in_time() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    rows: list[bench.Measurement] = []
    try:
        bench.run(job, rows, model=model, on_call=in_time)
    except TimeoutError:
        if not rows:
            raise ValueError(
                f"seconds must allow one round of {len(job.variants)} calls, got {seconds}"
            ) from None
    return _conclude(job, rows, notes)


def _that_fits(job: bench.Job, model: nn.Module, deadline: float) -> tuple[bench.Job, str]:
    """The job with a batch and rounds that end before the deadline, and what limits the batch.

    The batch doubles from 1 until a round would take too long: on a GPU twice the images can cost
    the same time, so that one step of one image tells little.
    """
    batch, calls, limit = 1, len(job.variants), ""
    while True:
        probe = dataclasses.replace(
            job, batch_size=batch, configs=(), control=False, rounds=1, warmup=1
        )
        rows: list[bench.Measurement] = []
        try:
            bench.run(probe, rows, model=model)
        except bench.TooLittleMemory as error:
            if batch == 1:
                raise
            batch, limit = batch // 2, str(error)
        else:
            seconds = rows[0].seconds[0]  # of the largest batch that was measured
        left = deadline - time.monotonic()
        larger = min(2 * batch, job.batch_size)
        if not limit and (LEAST_ROUNDS + 2) * calls * seconds * larger / batch > left:
            limit = f"{larger} would take too long"
        if limit or larger == batch:
            rounds = max(1, min(30, int(left / (calls * seconds)) - 1))
            return dataclasses.replace(job, batch_size=batch, warmup=1, rounds=rounds), limit
        batch = larger


def _conclude(job: bench.Job, rows: list[bench.Measurement], notes: list[str]) -> Advice:
    found = {row.config: row for row in rows}
    control = found[bench.CONTROL]
    noise = max(abs(control.speedup - 1), abs(control.paired_speedup - 1))
    findings = [_finding(found[config], max(LEAST_GAIN, 2 * noise)) for config in job.configs]
    findings.sort(key=lambda finding: -finding.speedup)
    if noise > TOO_NOISY:
        notes.append(
            f"The unpatched model differed from itself by {noise:.0%}: other processes disturb "
            "the measurement."
        )
    workload = f"{job}, {len(control.seconds)} rounds"
    return Advice(workload, tuple(findings), noise, tuple(notes))


def _finding(row: bench.Measurement, least: float) -> Finding:
    gain, allowed = row.paired_speedup - 1, row.ideal_speedup - 1
    pays = gain > least
    # Without a floor of its own the setting routes nothing, and is its floor.
    floor_gain = gain if row.paired_floor_speedup is None else row.paired_floor_speedup - 1
    if pays:
        reason = "pays" if SkipConfig.parse(row.config).drop_at else "pays, and changes no logit"
    elif allowed <= least:
        reason = "too few tokens or blocks: the arithmetic allows no more"
    elif floor_gain <= max(least, allowed / 4):
        reason = (
            "fewer tokens do not make the blocks faster here: calls wait for launches or for "
            "memory (a larger batch, or CUDA graphs)"
        )
    else:
        reason = f"the selection takes what the tokens save, {row.paired_overhead:+.1%}"
    return Finding(
        row.config, row.paired_speedup, row.paired_floor_speedup, row.ideal_speedup, pays, reason
    )
