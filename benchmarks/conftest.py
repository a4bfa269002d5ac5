"""Options of the benchmarks, and the tables at the end: pytest-benchmark has no such columns."""

from __future__ import annotations

import csv
import ctypes
import os
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import devices
import pytest
from rich.console import Console

from skipvit_kernels.lab import bench, info, report

COLUMNS = (
    *("operator", "shape", "dtype", "threads", "ours_us", "naive_us", "best_us", "compiled_us"),
    *("copy_us", "best", "speedup", "GB_s", "share_of_copy"),
)


@pytest.fixture(scope="session", autouse=True)
def keep_freed_memory() -> None:
    """Let malloc reuse what was freed, at any size.

    glibc takes outputs above 32 MiB as fresh pages from the kernel: 38 MB then cost 20 ms on a
    virtual machine whoever writes them, or nothing where a freed block happened to fit.
    """
    if sys.platform == "linux":
        trim_threshold, mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("skipvit benchmarks")
    group.addoption(
        "--device",
        choices=list(devices.DEVICES),
        default="cpu",
        help="where the operators run; default cpu",
    )
    group.addoption(
        "--full",
        action="store_true",
        help="every shape, dtype and number of threads of the operators, not only the usual ones",
    )
    group.addoption(
        "--turns",
        type=int,
        metavar="N",
        help="how often each operator's rivals are timed in turn; default 2 on the CPU, 1 on CUDA",
    )
    group.addoption(
        "--summary-csv", type=Path, help="write the table of the operators to this file"
    )
    group.addoption(
        "--models-report",
        type=Path,
        metavar="DIR",
        help="write tables, charts and data of the models to this folder",
    )


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=False))


class Results:
    """The times of each provider of each group, turn by turn.

    A ratio is the median of those of single turns, whose providers ran within a second: what else
    the machine did, and which memory malloc gave, was the same for both, or another in each turn.
    """

    def __init__(self, csv_path: Path | None) -> None:
        self.csv_path = csv_path
        self.groups: dict[str, tuple[dict[str, Any], dict[str, list[float]]]] = {}

    def add(self, group: str, info: dict[str, Any], seconds: float) -> None:
        """Take a measurement in, and put what the group tells about it into `info`."""
        if group not in self.groups:
            self.write_csv()  # what there is: not even a kill takes more than one group
        _, times = self.groups.setdefault(group, (info, {}))
        times.setdefault(info["provider"], []).append(seconds)
        info["GB_s"] = info["bytes"] / seconds / 1e9
        if "copy" in times:
            info["share_of_copy"] = times["copy"][-1] / seconds
        if info["provider"] == "ours" and self.rivals(times):
            info["speedup"] = min(turns[-1] for turns in self.rivals(times).values()) / seconds

    @staticmethod
    def rivals(times: dict[str, list[float]]) -> dict[str, list[float]]:
        return {name: t for name, t in times.items() if name not in ("ours", "copy")}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each group, without the columns for which it has no times (yet)."""
        return [self.row(info, times) for info, times in self.groups.values()]

    def row(self, info: dict[str, Any], times: dict[str, list[float]]) -> dict[str, Any]:
        shortest = {name: min(turns) for name, turns in times.items()}
        names = [name for name in times if name.startswith("best_")]
        best = min(names, key=shortest.__getitem__, default=None)
        row = {key: info[key] for key in ("operator", "shape", "dtype", "threads")}
        for column in ("ours", "naive", "compiled", "copy"):
            if column in times:
                row[f"{column}_us"] = round(shortest[column] * 1e6, 1)
        if best is not None:
            row |= {"best_us": round(shortest[best] * 1e6, 1), "best": best.removeprefix("best_")}
        if "ours" in times:
            row["GB_s"] = round(info["bytes"] / shortest["ours"] / 1e9, 1)
            rivals = [min(turn) for turn in zip(*self.rivals(times).values(), strict=False)]
            if rivals:
                row["speedup"] = round(median_ratio(rivals, times["ours"]), 2)
            if "copy" in times:
                row["share_of_copy"] = round(median_ratio(times["copy"], times["ours"]), 2)
        return row

    def write_csv(self) -> None:
        if self.csv_path is None or not self.groups:
            return
        self.csv_path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.csv_path.with_suffix(".unfinished")
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows())
        unfinished.replace(self.csv_path)


RESULTS = pytest.StashKey[Results]()
MODEL_ROWS = pytest.StashKey[list[bench.Measurement]]()


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    reason = devices.absent_reason(device)
    if reason is not None:
        raise pytest.UsageError(reason)
    # Each benchmark would skip or fail by this, and a number of the plain PyTorch behind the
    # kernels would pass for one of theirs. --benchmark-disable checks the kernels: it needs them.
    if missing := info.missing_kernels(device):
        raise pytest.UsageError(f"no kernels to measure: {'; '.join(sorted(missing))}")
    if config.getoption("--turns") is not None and config.getoption("--turns") < 1:
        raise pytest.UsageError(f"--turns must be at least 1, got {config.getoption('--turns')}")
    config.stash[RESULTS] = Results(config.getoption("--summary-csv"))
    config.stash[MODEL_ROWS] = []


@pytest.fixture
def results(request: Any) -> Results:
    return request.config.stash[RESULTS]


@pytest.fixture(scope="session")
def model_rows(request: Any) -> list[bench.Measurement]:
    """What the jobs of test_model_speed.py measured, in their order."""
    return request.config.stash[MODEL_ROWS]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Runs after Ctrl-C too."""
    summarise_operators(terminalreporter, config)
    rows = config.stash[MODEL_ROWS]
    for title, members in report.groups(rows).items():
        terminalreporter.section(title)
        Console(file=terminalreporter._tw._file, width=100).print(report.table("", members))
    folder = config.getoption("--models-report")
    if folder is not None and rows:
        command = f"pytest {shlex.join(config.invocation_params.args)}"
        report.write_page(folder, rows, command=command)


def summarise_operators(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[RESULTS].rows()
    if not rows:
        return
    config.stash[RESULTS].write_csv()
    cells = [["-" if row.get(c) is None else str(row[c]) for c in COLUMNS] for row in rows]
    text = [COLUMNS, *cells]
    widths = [max(len(line[i]) for line in text) for i in range(len(COLUMNS))]
    device = devices.DEVICES[config.getoption("--device")].describe()
    terminalreporter.section(f"operators; {device}, load {os.getloadavg()[0]:.1f}")
    for line in text:
        terminalreporter.write_line(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )
