"""Whole models: unpatched, sliced (the floor) and patched, measured in turn.

    pytest benchmarks/test_model_speed.py --benchmark-only                   # on the CPU
    pytest benchmarks/test_model_speed.py --benchmark-only --device cuda
    pytest benchmarks/test_model_speed.py --models-report DIR                # one page with charts
    pytest benchmarks/test_model_speed.py -k "vit_large"

A job is a model, a batch, inference or training, and a test. Its variants are timed A B C A B C ...
in one process, after `verify` has held every configuration against the unpatched model. What
pytest-benchmark shows is the time of the whole job; each variant's figures stand in the tables at
the end, and in the `extra_info` that pytest-benchmark saves. For one model of your own:
`skipvit bench`.

Ctrl-C keeps what was measured, and even a kill the data of the jobs that ended. A job that does not
fit the memory is skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from skipvit_kernels.lab import bench, report
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    jobs = list(JOBS[metafunc.config.getoption("--device")]())
    ids = [str(job).replace(", ", "-").replace(" ", "_") for job in jobs]
    metafunc.parametrize("job", jobs, ids=ids)


def test_model(
    benchmark: Any, model_rows: list[bench.Measurement], job: Job, pytestconfig: pytest.Config
) -> None:
    before = len(model_rows)
    try:
        benchmark.pedantic(bench.run, args=(job, model_rows), rounds=1, iterations=1)
    except bench.TooLittleMemory as error:
        pytest.skip(str(error))
    except KeyboardInterrupt:  # pytest-benchmark cannot save what has no rounds
        benchmark.has_error = True
        raise
    folder = pytestconfig.getoption("--models-report")
    if folder is not None:
        report.write_data(folder, model_rows)
    measured = {row.config: row.record() for row in model_rows[before:]}
    benchmark.extra_info.update(measured, torch=torch.__version__)
