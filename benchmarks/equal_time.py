"""What the studies that train by `skipvit train` share: an epoch's time, and a training."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from results import read_csv
from tqdm import tqdm

from skipvit_kernels.lab import clock, train

SPEEDS = "speed.csv"
Task = TypeVar("Task")


def epoch_of(training: train.Training) -> Callable[[], None]:
    """An epoch of `skipvit train`, without validation and checkpoint, as a call."""
    progress = training._progress()

    def epoch() -> None:
        training._epoch(progress)
        training.epoch, training.batch = training.epoch + 1, 0

    return epoch


def speeds(trainings: Mapping[str, train.Settings], rounds: int) -> list[dict[str, Any]]:
    """Rows of speed.csv: how much faster each one's epochs are than the first one's.

    Whole epochs in turn, the loading of the pictures included; medians over the rounds.
    """
    calls = {name: epoch_of(train.Training(settings)) for name, settings in trainings.items()}
    times = clock.Times([])
    with tqdm(total=len(calls) * (rounds + 1), unit="epoch") as bar:
        clock.interleave(calls, times, rounds=rounds, warmup=1, on_call=bar.update)
    first = next(iter(calls))
    return [
        {
            "name": name,
            "epoch_seconds": times.best(name),
            "speedup": times.paired_ratio(first, name),
        }
        for name in calls
    ]


def epochs_as_long(folder: Path, name: str, epochs: int) -> int:
    """As many epochs as take the time of so many of the first, as measured.

    Raises:
        ValueError: where nothing was measured.
    """
    for row in read_csv(folder / SPEEDS):
        if row["name"] == name:
            return round(epochs * float(row["speedup"]))
    raise ValueError(f"{folder / SPEEDS} has no {name!r}: measure with --speed before")


def in_processes(call: Callable[[Task], Any], tasks: Sequence[Task], jobs: int) -> Iterator[Any]:
    """What the call returns for each, as they end; each in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        yield from tqdm(pool.imap_unordered(call, tasks), total=len(tasks), unit="training")


def trained(settings: train.Settings, threads: int) -> list[Any]:
    """Train on so many threads, from the start: epochs, CPU seconds and the last loss."""
    shutil.rmtree(settings.out, ignore_errors=True)  # of one that was ended
    torch.set_num_threads(threads)
    start = time.process_time()
    rows = train.run(settings)
    return [len(rows), f"{time.process_time() - start:.0f}", f"{rows[-1]['loss']:.4f}"]
