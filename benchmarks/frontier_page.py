"""The page of the frontier, from what was measured: report.md, results.csv and the chart."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from frontier_settings import TOME, Setting, all_settings
from matplotlib.figure import Figure

from skipvit_kernels.lab import machine
from skipvit_kernels.lab.report import BLUE, GREEN, GREY, ORANGE, add_legend, markdown

RED, PINK, SKY = "#D55E00", "#CC79A7", "#56B4E9"  # Okabe and Ito's others
STYLES = {
    "unpatched": (GREY, "*"),
    "paper": (GREY, "v"),
    "mean": (ORANGE, "^"),
    "never": (PINK, "P"),
    "fused": (RED, "X"),
    "merge in stages": (SKY, "s"),
    "merge in many layers": (BLUE, "o"),
    "merge, not restored": (GREEN, "D"),
    "ToMe": ("black", "x"),
}
LOSSES = (0.0, 0.5, 1.0, 2.0)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one setting reached: percent and points of top-1, speed over the unpatched model."""

    setting: Setting
    top1: float
    top5: float
    change: float
    error: float
    speedup: float

    def cells(self) -> list[str]:
        return [f"{self.change:+.1f}", f"x{self.speedup:.2f}"]


def read_rows(folder: Path) -> list[Row]:
    with (folder / "accuracy.csv").open(newline="") as file:
        accuracy = {row["setting"]: row for row in csv.DictReader(file)}
    with (folder / "seconds.csv").open(newline="") as file:
        rounds = [{name: float(t) for name, t in row.items()} for row in csv.DictReader(file)]
    rows = []
    for setting in all_settings():
        hits = accuracy[str(dataclasses.replace(setting, cls_only=False))]
        n, top1, top5, gained, lost = (int(value) for value in list(hits.values())[1:])
        # Of a sum of +1 for each picture gained and -1 for each lost.
        error = math.sqrt(gained + lost - (gained - lost) ** 2 / n)
        speedup = statistics.median(r["unpatched"] / r[str(setting)] for r in rounds)
        percent = [100 * value / n for value in (top1, top5, gained - lost, error)]
        rows.append(Row(setting, *percent, speedup))
    return rows


def write(folder: Path, *, command: str) -> None:
    rows = read_rows(folder)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        columns = "method", "setting", "top1", "top5", "change", "standard_error", "speedup"
        writer.writerow(columns)
        for row in rows:
            values = [f"{v:.2f}" for v in (row.top1, row.top5, row.change, row.error)]
            writer.writerow([row.setting.group, str(row.setting), *values, f"{row.speedup:.3f}"])
    chart(rows).savefig(folder / "frontier.png")
    lines = ["# Top-1 against measured speed: DeiT-tiny off the shelf", "", f"    {command}", ""]
    lines += [f"- {name}: {value}" for name, value in machine.versions().items()]
    lines += [
        "",
        "Nothing was trained. Top-1 is of 1,000 ImageNet pictures (224 centre crop), one of each",
        "class and such as DeiT was trained on: read the changes, not the levels. The standard",
        "error beside a change is of the difference on the same pictures. Speed-up is over the",
        "unpatched model, batch 32, float32, inference: the median over rounds of all settings in",
        "turn. `cls` is the lossless last block; it changes no logit, so that both rows of a",
        "setting have one accuracy. ToMe is ours, written plainly from its paper, under SDPA like",
        "all others; with `cls` it has what its paper has not. How the settings were found, on",
        "these same pictures, and what did not help: [search.md](search.md). Numbers:",
        "[results.csv](results.csv); single rounds: [seconds.csv](seconds.csv).",
        "",
        "![Top-1 against measured speed-up, by method](frontier.png)",
        "",
        "## The setting to use",
        "The fastest that loses no more. *Restored*: every token is back before the last block.",
        *markdown(("points lost", "restored", "change", "speed-up", "any", "change", "speed-up"),
                  (budget(rows, loss) for loss in LOSSES)),
        "",
        "## Beside ToMe",
        "The fastest merging that gets at least as many pictures right.",
        *markdown(("ToMe, ours", "change", "speed-up", "merge", "change", "speed-up", "ratio"),
                  beside_tome(rows)),
        "",
        "## Everything",
    ]  # fmt: skip
    header = ("setting", "method", "top-1", "top-5", "change", "standard error", "speed-up")
    lines += markdown(header, map(cells, rows))
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def cells(row: Row) -> list[str]:
    values = f"{row.top1:.1f}", f"{row.top5:.1f}", f"{row.change:+.1f}", f"{row.error:.1f}"
    return [str(row.setting), row.setting.group, *values, f"{row.speedup:.3f}"]


def ours(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not row.setting.text.startswith(TOME)]


def fastest(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: row.speedup)


def budget(rows: Iterable[Row], loss: float) -> list[str]:
    within = [row for row in ours(rows) if row.change >= -loss]
    restored = fastest([row for row in within if row.setting.restores])
    found = fastest(within)
    return [f"{loss:g}", f"`{restored.setting}`", *restored.cells(), f"`{found.setting}`",
            *found.cells()]  # fmt: skip


def beside_tome(rows: Sequence[Row]) -> Iterable[list[str]]:
    for tome in rows:
        merged = [r for r in ours(rows) if r.setting.merges and r.top1 >= tome.top1]
        if tome.setting.text.startswith(TOME) and merged:
            best = fastest(merged)
            ratio = f"{best.speedup / tome.speedup:.2f}"
            yield [str(tome.setting), *tome.cells(), f"`{best.setting}`", *best.cells(), ratio]


def chart(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=GREY, linewidth=1)
    for group, (colour, marker) in STYLES.items():
        for cls_only, face, line in ((False, "none", ":"), (True, colour, "-")):
            found = [r for r in rows if (r.setting.group, r.setting.cls_only) == (group, cls_only)]
            found.sort(key=lambda row: row.speedup)
            axes.plot(
                [row.speedup for row in found],
                [row.change for row in found],
                color=colour, marker=marker, linestyle=line, linewidth=1, markersize=5,
                markerfacecolor=face, label=group if cls_only else None,
            )  # fmt: skip
    axes.set_xlabel("measured speed-up over the unpatched model (filled: lossless last block)")
    axes.set_ylabel("change of top-1, points")
    axes.spines[["top", "right"]].set_visible(False)
    add_legend(figure, axes)
    return figure
