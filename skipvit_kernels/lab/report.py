"""What `bench` measured, as tables, files, charts and one page."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
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
    if report is not None:  # before minutes of measuring
        try:
            report.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"report must be a folder that can be written, got {report}: {error.strerror}"
            ) from error
    console = Console()
    for reason in sorted({r for job in jobs for r in info.missing_kernels(job.device)}):
        console.print(f"without compiled kernels, so slower: {reason}", style="yellow")
    rows: list[Measurement] = []
    skipped: list[str] = []
    blocks: dict[str, list[float]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
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
            about = machine.versions()
            page = write_page(
                report, rows, about=about, command=command, skipped=skipped, blocks=blocks
            )
            console.print(f"written to {page}")
    return rows


def groups(rows: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Rows that were timed in turn, by what they have in common."""
    found: dict[str, list[Measurement]] = {}
    for row in rows:
        job = row.job
        parts = [job.model, job.mode, f"batch {job.batch_size}", f"{job.image_size} px", job.dtype]
        parts += ["torch.compile"] if job.compiled else []
        parts += ["CUDA graph"] if job.cuda_graph else []
        parts += [f"{row.threads} CPU threads" if job.device == "cpu" else job.device]
        found.setdefault(", ".join(parts), []).append(row)
    return found


def without_floors(rows: Iterable[Measurement]) -> list[Measurement]:
    """The floors' figures stand in the rows of their configurations."""
    return [row for row in rows if not row.config.startswith("sliced ")]


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


def table(title: str, rows: Iterable[Measurement]) -> Table:
    """For a terminal of 80 columns."""
    found = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        left = column == "setting"
        found.add_column(
            column.replace(" ", "\n"), justify="left" if left else "right", no_wrap=left
        )
    for row in without_floors(rows):
        found.add_row(*cells(row, brackets=False))
    return found


def write_data(folder: Path, rows: Sequence[Measurement]) -> None:
    """results.csv without the single calls, results.json with them."""
    folder.mkdir(parents=True, exist_ok=True)
    calls = [row.record() | {"seconds": row.seconds} for row in rows]
    (folder / "results.json").write_text(json.dumps(calls, indent=1))
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, bench.RAN + bench.FIGURES)
        writer.writeheader()
        for row in rows:
            record = row.record().items()
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in record})


def write_page(
    folder: Path,
    rows: Sequence[Measurement],
    *,
    about: dict[str, str],
    command: str,
    skipped: Iterable[str] = (),
    blocks: dict[str, list[float]] | None = None,
) -> Path:
    """One Markdown page with the tables, the pictures, the hardware and the versions.

    Args:
        folder: to write `report.md`, its pictures and the data into.
        rows: what was measured.
        about: hardware and versions, by name.
        command: that measured them.
        skipped: jobs that did not run, with the reason.
        blocks: `bench.block_seconds` of one model, for the picture of where the time goes.
    """
    write_data(folder, rows)
    lines = ["# What skipping buys here", "", f"    {command}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
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
        lines += ["", f"## {title}", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        for row in without_floors(members):
            lines.append(
                "| " + " | ".join([f"`{row.config}`", *cells(row, brackets=True)[1:]]) + " |"
            )
        lines += memory_lines(members)
    pictures = {"speedup": speedup_chart(rows), "memory": memory_chart(rows)}
    if blocks:
        pictures["blocks"] = blocks_chart(blocks)
    captions = {
        "speedup": "Speed-up over the unpatched model, beside the sliced floor and the ideal",
        "memory": "Peak memory of a training step, and what the skipped activations predict",
        "blocks": "Where an inference's time goes, block by block",
    }
    for name, figure in pictures.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.png")
            lines += ["", f"![{captions[name]}]({name}.png)"]
    if skipped := list(skipped):
        lines += ["", "## Not measured", "", *(f"- {reason}" for reason in skipped)]
    page = folder / "report.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def memory_lines(rows: Iterable[Measurement]) -> list[str]:
    """What a group of training steps saves in memory, as Markdown; empty for other groups."""
    found = [row for row in without_floors(rows) if row.memory_saved is not None]
    if not found or not found[0].job.training:
        return []

    def mib(count: int | None) -> str:
        return "" if count is None else f"{count / 2**20:.1f}"

    lines = ["", "| MiB | peak | resident peak | saved | activations of the skipped tokens |"]
    lines += ["|" + "---|" * 5]
    for row in found:
        values = (row.peak_memory, row.resident_memory, row.memory_saved, row.activations_saved)
        lines.append("| " + " | ".join([f"`{row.config}`", *map(mib, values)]) + " |")
    return lines


def speedup_chart(rows: Iterable[Measurement]) -> Figure | None:
    """One panel a group, medians: measured bars, the floor and the ideal as marks.

    None without rows.
    """
    found = {title: without_floors(members)[1:] for title, members in groups(rows).items()}
    found = {title: members for title, members in found.items() if members}
    if not found:
        return None
    heights = [0.5 + 0.3 * len(members) for members in found.values()]
    figure = Figure(figsize=(8, 0.8 + sum(heights)), dpi=150, layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights, sharex=True)
    for axes, (title, members) in zip(panels[:, 0], found.items(), strict=True):
        places = range(len(members))
        bars = axes.barh(places, [row.paired_speedup for row in members], 0.7, color=BLUE)
        axes.bar_label(bars, fmt="%.2f", label_type="center", color="white")
        axes.scatter(
            [row.ideal_speedup for row in members], places, marker="|", s=160, linewidths=3,
            color=ORANGE, zorder=3, label="ideal: what the arithmetic allows",
        )  # fmt: skip
        floors = [
            (row.paired_floor_speedup, at)
            for at, row in enumerate(members)
            if row.paired_floor_speedup is not None
        ]
        if floors:
            axes.scatter(
                *zip(*floors, strict=True), marker="D", s=28, color=GREEN, zorder=4,
                label="sliced: selection for free",
            )  # fmt: skip
        axes.axvline(1, color=GREY, linewidth=1)
        axes.set_yticks(places, [row.config for row in members])
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8,
        frameon=False,
    )  # fmt: skip
    panels[-1, 0].set_xlabel("speed-up over the unpatched model")
    panels[-1, 0].set_xlim(left=0)
    return figure


def memory_chart(rows: Iterable[Measurement]) -> Figure | None:
    """Peak of the first group of training steps with memory; None where there is none."""
    measured = [row for row in without_floors(rows) if row.memory_saved is not None]
    training = groups(row for row in measured if row.job.training)
    if not training:
        return None
    title, found = next(iter(training.items()))
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(found)), dpi=150, layout="constrained")
    axes = figure.subplots()
    places = range(len(found))
    mib = [(row.peak_memory or 0) / 2**20 for row in found]
    expected = [mib[0] - (row.activations_saved or 0) / 2**20 for row in found]
    bars = axes.barh(places, mib, 0.7, color=BLUE)
    axes.bar_label(bars, fmt="%.0f", label_type="center", color="white")
    axes.scatter(
        expected, places, marker="|", s=160, linewidths=3, color=ORANGE, zorder=3,
        label="unpatched less the skipped tokens' activations",
    )  # fmt: skip
    axes.set_yticks(places, [row.config for row in found])
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("peak memory, MiB")
    figure.legend(loc="outside upper right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def blocks_chart(seconds: dict[str, list[float]]) -> Figure:
    """Milliseconds of each block, one line a configuration."""
    figure = Figure(figsize=(8, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for colour, (name, blocks) in zip((GREY, BLUE, ORANGE, GREEN), seconds.items(), strict=False):
        axes.step(
            range(1, len(blocks) + 1), [1000 * t for t in blocks], where="mid",
            color=colour, label=f"{name}: {1000 * sum(blocks):.0f} ms",
        )  # fmt: skip
    axes.set_xticks(range(1, len(blocks) + 1))
    axes.set_xlabel("layer")
    axes.set_ylabel("ms in a forward")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
