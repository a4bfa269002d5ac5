"""Whole models: unpatched, sliced (the floor) and patched, measured in turn.

    pytest benchmarks/test_model_speed.py --benchmark-only                   # on the CPU
    pytest benchmarks/test_model_speed.py --benchmark-only --device cuda
    pytest benchmarks/test_model_speed.py --models-report DIR                # one page with charts
    pytest benchmarks/test_model_speed.py -k "vit_large"

A job is a model, a batch, inference or training; its variants are timed A B C A B C ... in one
process, after `verify` has held every configuration against the unpatched model. Each variant is a
test, so that pytest-benchmark can save and compare it: it shows those very times, nothing is timed
again. For one model of your own: `skipvit bench`.

Ctrl-C keeps what was measured. A job that does not fit the memory is skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from skipvit_kernels.lab import bench, info
from skipvit_kernels.lab.bench import Job
from skipvit_kernels.skipping.presets import TABLE_1, scaled

SMALL, BASE, LARGE = (f"vit_{size}_patch16_224" for size in ("small", "base", "large"))
LOSSLESS, SKIP, BOTH = ":cls", "6(55%)+11", "6(55%)+11:cls"
DEPTHS = {SMALL: 12, BASE: 12, LARGE: 24}


def cpu_jobs() -> Iterator[Job]:
    """Under six minutes on two cores."""
    everything = (*TABLE_1, f"{SKIP}:mean", LOSSLESS, BOTH)
    yield Job(SMALL, everything, 8, training=True, rounds=4, warmup=1)
    yield Job(SMALL, everything, 8, training=False, rounds=6, warmup=1)
    for model, rounds in ((SMALL, 30), (BASE, 15), (LARGE, 6)):
        configs = (scaled(SKIP, DEPTHS[model]), LOSSLESS, scaled(BOTH, DEPTHS[model]))
        yield Job(model, configs, 1, training=False, rounds=rounds, warmup=1)
    for model, batch, rounds in ((BASE, 2, 4), (LARGE, 1, 3)):
        configs = (scaled(SKIP, DEPTHS[model]), scaled(BOTH, DEPTHS[model]))
        yield Job(model, configs, batch, training=True, rounds=rounds, warmup=1)
    yield Job(SMALL, (BOTH,), 8, training=False, compiled=True, rounds=6)


def cuda_jobs() -> Iterator[Job]:
    """The figures to reach are in docs/triton.md."""
    for model in (SMALL, BASE, LARGE):
        table_1 = TABLE_1 if model == SMALL else (SKIP,)
        configs = tuple(scaled(c, DEPTHS[model]) for c in (*table_1, f"{SKIP}:mean", BOTH))
        shared = dict(device="cuda", bfloat16=True)
        for training in (True, False):
            yield Job(model, (*configs, LOSSLESS), 256, training, rounds=20, warmup=5, **shared)
        for graph in (False, True):
            one = (scaled(SKIP, DEPTHS[model]), LOSSLESS, scaled(BOTH, DEPTHS[model]))
            yield Job(model, one, 1, False, cuda_graph=graph, rounds=100, warmup=5, **shared)
        yield Job(model, (scaled(BOTH, DEPTHS[model]),), 256, True, compiled=True, rounds=20,
                  warmup=5, **shared)  # fmt: skip


JOBS = {"cpu": cpu_jobs, "cuda": cuda_jobs}


class Clock:
    """Shows times that were measured before."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, times: Iterator[float]) -> None:
        self.seconds += next(times)


CLOCK = Clock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("--device")
    metafunc.parametrize(
        ("job", "variant"),
        [
            pytest.param(job, variant, id=f"{job}: {variant}".replace(", ", "-").replace(" ", "_"))
            for job in JOBS[device]()
            for variant in job.variants
        ],
    )


@pytest.fixture(scope="module")
def measured() -> dict[Job, dict[str, bench.Measurement] | str]:
    """Per job, its rows by variant, or why there are none."""
    return {}


@pytest.mark.benchmark(timer=CLOCK)
def test_model(
    benchmark: Any,
    model_rows: list[bench.Measurement],
    measured: dict[Job, dict[str, bench.Measurement] | str],
    job: Job,
    variant: str,
) -> None:
    # A number of the plain PyTorch behind the kernels would pass for one of the kernels.
    assert not info.missing_kernels(job.device), info.missing_kernels(job.device)
    if job not in measured:
        before = len(model_rows)
        try:
            bench.run(job, model_rows)
            measured[job] = {row.config: row for row in model_rows[before:]}
        except bench.TooLittleMemory as error:
            measured[job] = str(error)
    rows = measured[job]
    if isinstance(rows, str):
        pytest.skip(rows)
    row = rows[variant]
    benchmark.group = str(job)
    benchmark.extra_info.update(row.record(), torch=torch.__version__)
    times = iter(row.seconds)
    benchmark.pedantic(CLOCK.advance, args=(times,), rounds=len(row.seconds), iterations=1)
