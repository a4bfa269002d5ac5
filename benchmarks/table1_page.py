"""The page of the study, from what is finished: report.md and a chart."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from results import read_csv
from table1_cells import PARTS, SEEDS, STVIT, TELLING, Cell, Scale, Training, cells

from skipvit_kernels.lab import machine
from skipvit_kernels.lab.report import BLUE, GREEN, GREY, ORANGE, markdown
from skipvit_kernels.skipping.config import SkipConfig

PINK = "#CC79A7"
HEADER = (
    *("setting", "seeds", "top-1", "change", "without skipping", "training step", "ideal"),
    *("whole training", "peak memory"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting over the seeds that are finished; percent, points, and factors of the unpatched.

    Attributes:
        top1: of each seed.
        change: of the seeds that the unpatched model has too, beside it.
        dense: of the same weights, tested without skipping.
        speedup, ideal, peak_memory: of a training step that skips; None where not measured.
    """

    training: Training
    top1: list[float]
    change: list[float]
    dense: list[float]
    speedup: float | None
    ideal: float | None
    peak_memory: float | None

    @property
    def whole(self) -> float | None:
        """The speed-up of the training, whose warm-up does not skip."""
        if self.speedup is None:
            return None
        share = self.training.warmup / PARTS if self.training.patched else 0.0
        return 1 / (share + (1 - share) / self.speedup)

    def cells(self) -> list[str]:
        def factor(value: float | None, text: str = "x{:.2f}") -> str:
            return "-" if value is None else text.format(value)

        change = spread(self.change, "{:+.2f}") if self.training.skip else ""
        return [
            *(str(self.training), str(len(self.top1)), spread(self.top1), change),
            *(spread(self.dense) if self.training.patched else "", factor(self.speedup)),
            *(factor(self.ideal), factor(self.whole), factor(self.peak_memory, "{:.0%}")),
        ]


def spread(values: Sequence[float], text: str = "{:.2f}") -> str:
    """Mean and standard deviation."""
    mean = text.format(statistics.mean(values)) if values else "-"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def finished(path: Path, scales: Sequence[Scale]) -> dict[Cell, dict[str, str]]:
    """What cells.csv has of these scales."""
    rows = {
        tuple(row[name] for name in ("scale", "setting", "warmup", "as_long", "seed")): row
        for row in read_csv(path)
    }
    every = cells(tuple(scales))
    keys = [(cell.scale.name, *cell.training.key, str(cell.seed)) for cell in every]
    return {cell: rows[key] for cell, key in zip(every, keys, strict=True) if key in rows}


def rows_of(
    scale: Scale, done: dict[Cell, dict[str, str]], speeds: list[dict[str, str]]
) -> list[Row]:
    measured = {row["config"]: row for row in speeds if row["scale"] == scale.name}
    found = []
    for training in scale.trainings:
        seeds = [seed for seed in range(SEEDS) if Cell(scale, training, seed) in done]
        if not seeds:
            continue

        def percent(column: str, training: Training, seed: int) -> float:
            return 100 * float(done[Cell(scale, training, seed)][column])

        plain = Training("")
        paired = [seed for seed in seeds if Cell(scale, plain, seed) in done]
        name = training.skip or "unpatched"
        speed = measured.get(name)
        found.append(
            Row(
                training,
                [percent("top1", training, seed) for seed in seeds],
                [percent("top1", training, s) - percent("top1", plain, s) for s in paired],
                [percent("top1_dense", training, seed) for seed in seeds],
                float(speed["paired_speedup"]) if speed else None,
                float(speed["ideal_speedup"]) if speed else None,
                float(speed["peak_memory"]) / float(measured["unpatched"]["peak_memory"])
                if speed
                else None,
            )
        )
    return found


def write(folder: Path, scales: Sequence[Scale]) -> None:
    done = finished(folder / "cells.csv", scales)
    speeds = read_csv(folder / "speed.csv")
    tables = {s: rows for s in scales if (rows := rows_of(s, done, speeds))}
    chart(tables).savefig(folder / "table1.png")
    lines = [
        "# Table 1 in training",
        "",
        "    python benchmarks/table1.py --data DIR --out OUT --jobs 2     # what is missing",
        "    python benchmarks/table1.py --data DIR --out OUT --speed      # on an idle machine",
        '    python benchmarks/table1.py --data DIR --out OUT --cell "49 tokens; 6(55%); seed 0"',
        "",
        *(f"- {name}: {value}" for name, value in machine.versions().items()),
        "",
        f"ViTs of 12 blocks from scratch, {SEEDS} seeds a setting. A change is paired: beside the",
        "unpatched model of the same seed, which saw the same pictures; ± is the standard",
        "deviation over the seeds. A setting skips after a warm-up of 5 % of the training, unless",
        f"it says how many {PARTS}ths. *Without skipping*: the same weights, tested so. *Training",
        "step*: speed-up of one that skips, measured in turn with the unpatched; *whole training*",
        "counts the warm-up. What this shows, and what not: [README.md](README.md). Single cells:",
        "[cells.csv](cells.csv), speeds: [speed.csv](speed.csv).",
        "",
        "![Change of top-1 against training speed-up, with the spread over seeds](table1.png)",
    ]
    for scale, rows in tables.items():
        lines += [
            "",
            f"## {scale.name}",
            f"Width {scale.width}, {scale.heads} heads, patches of {scale.patch} pixels, batch"
            f" {scale.batch}, {scale.images:,} pictures seen.",
            *markdown(HEADER, [row.cells() for row in rows]),
        ]
    missing = [str(cell) for cell in cells(tuple(scales)) if cell not in done]
    lines += ["", "## Cells that did not finish", *(f"- {cell}" for cell in missing or ["none"])]
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def colour(training: Training) -> str:
    if training.skip == STVIT:
        return PINK
    config = SkipConfig.parse(training.skip)
    if config.scorer == "random":
        return ORANGE
    return {"merge": BLUE, "fuse": GREEN}.get(config.method, GREY)


def chart(tables: dict[Scale, list[Row]]) -> Figure:
    figure = Figure(figsize=(5 * max(len(tables), 1), 4.5), dpi=150, layout="constrained")
    grid = figure.subplots(1, max(len(tables), 1), squeeze=False)[0]
    for axes, (scale, rows) in zip(grid, tables.items(), strict=False):
        axes.axhline(0, color=GREY, linewidth=1)
        for row in rows:
            if row.training.as_long or not row.training.skip or row.whole is None or not row.change:
                continue
            bar = statistics.stdev(row.change) if len(row.change) > 1 else 0
            mean = statistics.mean(row.change)
            axes.errorbar(row.whole, mean, yerr=bar, fmt="o", color=colour(row.training), ms=4)
            if row.training in TELLING:
                axes.annotate(str(row.training), (row.whole, mean), fontsize=7, xytext=(4, 4),
                              textcoords="offset points")  # fmt: skip
        axes.set_title(scale.name)
        axes.set_xlabel("speed-up of the whole training")
        axes.set_ylabel("change of top-1, points")
        axes.spines[["top", "right"]].set_visible(False)
    return figure
