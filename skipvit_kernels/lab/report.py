"""What `bench` measured, as tables, files, charts and one page."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn
from rich.table import Table

from skipvit_kernels.lab import bench, info, machine
from skipvit_kernels.lab.bench import Job, Measurement

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"
COLUMNS = ("setting", "images/s", "speed-up", "sliced", "ideal", "routing overhead", "peak memory")


def run_jobs(jobs: Sequence[Job], *, report: Path | None, command: str) -> list[Measurement]:
    """Run the jobs with a progress bar; print a table of each, and write `report` where given.

    A job that does not fit into memory is left out and named. After Ctrl-C everything that was
    measured is printed and written before KeyboardInterrupt goes on.

    Raises:
        ValueError: where a model is unknown or cannot be patched, or `report` is no folder.
    """
    if report is not None:
        check_folder("report", report)
    console = Console()
    for reason in sorted({r for job in jobs for r in info.missing_kernels(job.device)}):
        console.print(f"without compiled kernels, so slower: {reason}", style="yellow")
    rows: list[Measurement] = []
    skipped: list[str] = []
    blocks: dict[str, list[float]] = {}
    columns = ("{task.description}", BarColumn(), TimeElapsedColumn())
    try:
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            for job in jobs:
                task = progress.add_task(str(job), total=job.num_calls)
                try:
                    bench.run(job, rows, on_call=functools.partial(progress.advance, task))
                except bench.TooLittleMemory as error:
                    skipped.append(str(error))
                else:
                    if report is not None and not blocks:
                        blocks = bench.block_seconds(job)
    finally:
        for title, members in groups(rows).items():
            console.print(table(title, members))
        for reason in skipped:
            console.print(f"not measured: {reason}", style="yellow")
        if report is not None and rows:
            page = write_page(report, rows, command=command, skipped=skipped, blocks=blocks)
            console.print(f"written to {page}")
    return rows


def check_folder(name: str, folder: Path) -> None:
    """Raise a ValueError where files cannot be written there: before minutes of measuring."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{name} must be a folder that can be written, got {folder}")


def groups(rows: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Rows that were timed in turn, by what they have in common."""
    found: dict[str, list[Measurement]] = {}
    for row in rows:
        threads = f", {row.threads} threads" if row.job.device == "cpu" else ""
        found.setdefault(f"{row.job}{threads}", []).append(row)
    return found


def without_floors(rows: Iterable[Measurement]) -> list[Measurement]:
    """The floors' figures stand in the rows of their configurations."""
    return [row for row in rows if row.config not in row.job.floors]


def cells(row: Measurement, *, brackets: bool) -> list[str]:
    """A row under COLUMNS: ratios as medians over the rounds, of the shortest calls in brackets."""

    def ratio(median: float | None, shortest: float | None, form: str) -> str:
        if median is None:
            return ""
        return format(median, form) + (f" ({shortest:{form}})" if brackets else "")

    unpatched = row.config == "unpatched"
    return [
        row.config,
        f"{row.images_per_second:.1f}",
        "1" if unpatched else ratio(row.paired_speedup, row.speedup, ".3f"),
        ratio(row.paired_floor_speedup, row.floor_speedup, ".3f"),
        "1" if unpatched else f"{row.ideal_speedup:.3f}",
        ratio(row.paired_overhead, row.overhead, "+.1%"),
        "" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f} MiB",
    ]


def table(
    title: str, rows: Iterable[Measurement], more: Mapping[str, Sequence[str]] | None = None
) -> Table:
    """For a terminal of 80 columns; `more` has further columns, a cell for each row printed."""
    more = more or {}
    found = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found.add_column(COLUMNS[0], no_wrap=True)
    for column in (*COLUMNS[1:], *more):
        found.add_column(column.replace(" ", "\n"), justify="right")
    for at, row in enumerate(without_floors(rows)):
        found.add_row(*cells(row, brackets=False), *(column[at] for column in more.values()))
    return found


def write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Of `Measurement.record`, without the single calls."""
    columns = [name for name in records[0] if name != "seconds"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for record in records:
            values = map(record.__getitem__, columns)
            writer.writerow(f"{v:.5g}" if isinstance(v, float) else v for v in values)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; its first column is code."""
    body = ((f"`{first}`", *others) for first, *others in rows)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *body)]
    return ["", lines[0], "|" + "---|" * len(header), *lines[1:]]


def write_data(folder: Path, rows: Sequence[Measurement]) -> None:
    """What was measured so far, for whatever may end the run: the data of `write_page`."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [row.record() for row in rows]
    unfinished = folder / "results.unfinished"
    unfinished.write_text(json.dumps(records, indent=1))
    unfinished.replace(folder / "results.json")
    write_csv(folder / "results.csv", records)


def write_page(
    folder: Path,
    rows: Sequence[Measurement],
    *,
    command: str,
    skipped: Sequence[str] = (),
    blocks: dict[str, list[float]] | None = None,
) -> Path:
    """One Markdown page with the tables, the pictures, the hardware and the versions.

    Args:
        folder: to write `report.md`, its pictures and the data into: results.csv without the
            single calls, results.json with them.
        rows: what was measured.
        command: that measured them.
        skipped: jobs that did not run, with the reason.
        blocks: `bench.block_seconds` of one model, for the picture of where the time goes.
    """
    write_data(folder, rows)
    lines = ["# What skipping buys here", "", f"    {command}", ""]
    lines += [f"- {name}: {value}" for name, value in machine.versions().items()]
    lines += [
        "",
        "*Speed-up* is over the unpatched model, as the median over rounds of calls in turn and,",
        "in brackets, of the shortest calls. *Sliced* is the floor: the same network at the same",
        "token counts with the selection for free. *Routing overhead* is the time over the",
        "floor's, less 1. *Ideal* is what the arithmetic allows. *Peak memory* is by torch's",
        "allocator, over what was held before the call; *resident* is what the operating system",
        "counts. A training step of a small batch saves less or nothing: there the gradients of",
        "the weights are the peak, not the activations. Every number is in",
        "[results.csv](results.csv), every single call in [results.json](results.json).",
    ]
    for title, members in groups(rows).items():
        found = without_floors(members)
        lines += ["", f"## {title}", *markdown(COLUMNS, (cells(r, brackets=True) for r in found))]
        lines += memory_lines(found)
    for name, caption, figure in (
        ("speedup", "Speed-up over the unpatched model, beside the sliced floor and the ideal",
         speedup_chart(rows)),
        ("memory", "Peak memory of a training step, and what the skipped activations predict",
         memory_chart(rows)),
        ("blocks", "Where an inference's time goes, block by block",
         blocks_chart(blocks) if blocks else None),
    ):  # fmt: skip
        if figure is not None:
            figure.savefig(folder / f"{name}.png")
            lines += ["", f"![{caption}]({name}.png)"]
    if skipped:
        lines += ["", "## Not measured", "", *(f"- {reason}" for reason in skipped)]
    page = folder / "report.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def memory_lines(rows: Iterable[Measurement]) -> list[str]:
    """What training steps save in memory, as Markdown; empty for other groups."""

    def mib(row: Measurement) -> Iterator[str]:
        for name in ("peak_memory", "resident_memory", "memory_saved", "activations_saved"):
            value = getattr(row, name)
            yield "" if value is None else f"{value / 2**20:.1f}"

    found = [row for row in rows if row.job.training and row.memory_saved is not None]
    header = ("MiB", "peak", "resident peak", "saved", "activations of the skipped tokens")
    return markdown(header, ((row.config, *mib(row)) for row in found)) if found else []


def speedup_chart(rows: Iterable[Measurement]) -> Figure | None:
    """One panel a group; None without rows."""
    found = groups(row for row in without_floors(rows) if row.config != "unpatched")
    if not found:
        return None
    heights = [0.5 + 0.3 * len(members) for members in found.values()]
    figure = Figure(figsize=(8, 0.8 + sum(heights)), dpi=150, layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights, sharex=True)
    for axes, (title, members) in zip(panels[:, 0], found.items(), strict=True):
        draw_speedups(axes, title, members)
    add_legend(figure, panels[0, 0])
    panels[-1, 0].set_xlabel("speed-up over the unpatched model")
    panels[-1, 0].set_xlim(left=0)
    return figure


def draw_speedups(axes: Axes, title: str, rows: Sequence[Measurement]) -> None:
    """Medians: measured bars, the floor and the ideal as marks."""
    draw_bars(axes, title, [row.config for row in rows], [row.paired_speedup for row in rows])
    ideal = [row.ideal_speedup for row in rows]
    draw_expected(axes, ideal, "ideal: what the arithmetic allows")
    floors = [row.paired_floor_speedup or math.nan for row in rows]
    label = "sliced: selection for free"
    axes.scatter(floors, range(len(rows)), marker="D", s=28, color=GREEN, zorder=4, label=label)
    axes.axvline(1, color=GREY, linewidth=1)


def memory_chart(rows: Iterable[Measurement]) -> Figure | None:
    """Peak of the first group of training steps with memory; None where there is none."""
    training = groups(row for row in rows if row.job.training and row.memory_saved is not None)
    if not training:
        return None
    title, found = next(iter(training.items()))
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(found)), dpi=150, layout="constrained")
    axes = figure.subplots()
    mib = [(row.peak_memory or 0) / 2**20 for row in found]
    draw_bars(axes, title, [row.config for row in found], mib, "%.0f")
    expected = [mib[0] - (row.activations_saved or 0) / 2**20 for row in found]
    draw_expected(axes, expected, "unpatched less the skipped tokens' activations")
    axes.set_xlabel("peak memory, MiB")
    add_legend(figure, axes)
    return figure


def draw_bars(
    axes: Axes, title: str, names: Sequence[str], values: Sequence[float], form: str = "%.2f"
) -> None:
    """The first at the top."""
    bars = axes.barh(range(len(values)), values, 0.7, color=BLUE, tick_label=names)
    axes.bar_label(bars, fmt=form, label_type="center", color="white")
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def draw_expected(axes: Axes, values: Sequence[float], label: str) -> None:
    """A mark on each bar of `draw_bars`."""
    places = range(len(values))
    axes.scatter(
        values, places, marker="|", s=160, linewidths=3, color=ORANGE, zorder=3, label=label
    )


def add_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4, fontsize=8, frameon=False)


def blocks_chart(seconds: dict[str, list[float]]) -> Figure:
    """Milliseconds of each block, one line a configuration."""
    figure = Figure(figsize=(8, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for colour, (name, blocks) in zip((GREY, BLUE, ORANGE, GREEN), seconds.items(), strict=False):
        layers, label = range(1, len(blocks) + 1), f"{name}: {1000 * sum(blocks):.0f} ms"
        axes.step(layers, [1000 * t for t in blocks], where="mid", color=colour, label=label)
    axes.set_xticks(layers)
    axes.set_xlabel("layer")
    axes.set_ylabel("ms in a forward")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    add_legend(figure, axes)
    return figure
