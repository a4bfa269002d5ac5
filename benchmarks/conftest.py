"""Options of the benchmarks, and the table at the end: pytest-benchmark has no such columns."""

from __future__ import annotations

import csv
import ctypes
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

COLUMNS = (
    *("operator", "shape", "dtype", "threads", "ours_us", "best_torch_us", "best_torch"),
    *("speedup", "GB_s", "share_of_copy"),
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
        "--summary-csv", type=Path, help="write the table of the operators to this file"
    )
    group.addoption("--full", action="store_true", help="every shape, not only the usual ones")


def summarise(benchmarks: list[Any]) -> list[dict[str, Any]]:
    """One row for each group that has our kernel, at least one rival, and the copy."""
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    infos: dict[str, dict[str, Any]] = {}
    for bench in benchmarks:
        if not bench.has_error and "provider" in bench.extra_info:
            providers, name = groups[bench.group], bench.extra_info["provider"]
            providers[name] = min(bench.stats.min, providers.get(name, bench.stats.min))
            infos[bench.group] = bench.extra_info
    rows = []
    for group, providers in groups.items():
        rivals = {name: t for name, t in providers.items() if name not in ("ours", "copy")}
        if "ours" not in providers or "copy" not in providers or not rivals:
            continue
        ours, best, info = providers["ours"], min(rivals, key=rivals.__getitem__), infos[group]
        rows.append(
            {
                **{key: info[key] for key in ("operator", "shape", "dtype", "threads")},
                "ours_us": round(ours * 1e6, 1),
                "best_torch_us": round(rivals[best] * 1e6, 1),
                "best_torch": best,
                "speedup": round(rivals[best] / ours, 2),
                "GB_s": round(info["bytes"] / ours / 1e9, 1),
                "share_of_copy": round(providers["copy"] / ours, 2),
            }
        )
    return rows


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = summarise(session.benchmarks) if session is not None else []
    if not rows:
        return
    text = [COLUMNS, *(tuple(str(row[c]) for c in COLUMNS) for row in rows)]
    widths = [max(len(line[i]) for line in text) for i in range(len(COLUMNS))]
    terminalreporter.section(f"operators, minima; load {os.getloadavg()[0]:.1f}")
    for line in text:
        terminalreporter.write_line(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )
    path = config.getoption("--summary-csv")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
