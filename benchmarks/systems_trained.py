"""The systems trained alike by `skipvit train`: on as many pictures, and for as long.

    python benchmarks/systems_trained.py --data DIR --out docs/results/systems_trained --speed
    python benchmarks/systems_trained.py --data DIR --out docs/results/systems_trained

DIR, or the environment variable SKIPVIT_DATA, holds `fashion-mnist/`, the four IDX files as they
are distributed. The first command measures the epochs of all systems in turn, on an idle machine;
the second trains, those that are to take as long for as many epochs as that says. What is finished
is in the folder and is not trained again; the page is written after each training. `--work` keeps
the pictures and the checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import table1
import timm
import torch
from equal_time import SPEEDS, epochs_as_long, in_processes, speeds, trained
from PIL import Image
from results import append_csv, command, data_folder, read_csv
from table1_page import spread
from timm.models import load_checkpoint

import skipvit_kernels as sk
from skipvit_kernels.lab import machine, train
from skipvit_kernels.lab.report import check_folder, markdown, write_csv

TRUNK, STVIT = "vit_tiny_patch16_224", "stvit_deit_tiny_patch16_224"
SYSTEMS = {
    "no skipping": "",
    "SkipViT": "6(55%)+11",
    "EViT": "4,7,10(30%,30%,30%)+fused",
    "merging": "6(55%)+11:merge",
    "STViT": STVIT,
}
SHAPE = {"patch_size": 4, "embed_dim": 48, "num_heads": 3, "depth": 12, "weight_init": "jax"}
SEEDS = 3
COLUMNS = ("name", "as_long", "seed", "epochs", "cpu_seconds", "loss", "pictures", "top1")
HEADER = ("setting", "system", "seeds", "epochs", "CPU seconds", "top-1", "change")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A training: of a system, on as many pictures as the unpatched sees or for as long."""

    name: str
    as_long: bool
    seed: int

    def __str__(self) -> str:
        return f"{self.name}{', as long' if self.as_long else ''}, seed {self.seed}"


CELLS = [
    Cell(name, as_long, seed)
    for seed in range(SEEDS)
    for as_long in (False, True)
    for name, skip in SYSTEMS.items()
    if skip or not as_long
]


def write_pictures(folder: Path, to: Path, count: int) -> None:
    """The first pictures of the training set, a folder for each class."""
    pictures, labels, *_ = table1.load(folder, "cpu")
    for at, (picture, label) in enumerate(zip(pictures[:count, 0], labels[:count], strict=True)):
        path = to / "train" / str(int(label)) / f"{at:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.numpy()).save(path)


def settings_of(name: str, seed: int, epochs: int, work: Path, out: str) -> train.Settings:
    skip = SYSTEMS[name]
    return train.Settings(
        str(work), STVIT if skip == STVIT else TRUNK, work / out, "" if skip == STVIT else skip,
        val_split="", img_size=28, model_args=SHAPE, epochs=epochs, batch_size=50, opt="muon",
        lr=2e-2, lr_warmup_epochs=1, seed=seed, workers=0, cpu=True, resume=True,
        augment_args={"mean": 3 * (0.5,), "std": 3 * (0.5,), "scale": (0.8, 1.0),
                      "color_jitter": None},
    )  # fmt: skip


def train_cell(cell: Cell, *, args: argparse.Namespace, folder: Path, work: Path) -> list[Any]:
    """The cell's row of cells.csv."""
    epochs = epochs_as_long(args.out, cell.name, args.epochs) if cell.as_long else args.epochs
    out = str(cell).replace(", ", "-").replace(" ", "_")
    settings = settings_of(cell.name, cell.seed, epochs, work, out)
    found = trained(settings, args.threads)
    model = timm.create_model(settings.model, img_size=28, num_classes=10, **SHAPE)
    load_checkpoint(model, str(settings.out / train.LAST))
    if settings.skip:
        sk.patch(model, settings.skip)
    *_, pictures, labels = table1.load(folder, "cpu")
    top1 = table1.accuracy(model.eval(), pictures.expand(-1, 3, -1, -1), labels)
    return [*dataclasses.astuple(cell), *found, args.pictures, f"{top1:.4f}"]


def finished(path: Path) -> dict[Cell, dict[str, str]]:
    return {
        Cell(row["name"], row["as_long"] == "True", int(row["seed"])): row for row in read_csv(path)
    }


def table(done: dict[Cell, dict[str, str]], as_long: bool) -> list[list[str]]:
    """Percent and points, over the seeds that are finished."""

    def top1(cell: Cell) -> float:
        return 100 * float(done[cell]["top1"])

    rows = []
    for name, skip in SYSTEMS.items():
        found = [
            c for c in CELLS if c in done and (c.name, c.as_long) == (name, as_long and skip != "")
        ]
        if not found:
            continue
        plain = {c: dataclasses.replace(c, name="no skipping", as_long=False) for c in found}
        change = [top1(c) - top1(plain[c]) for c in found if plain[c] in done]
        rows.append([
            *(skip or "unpatched", name, str(len(found)), done[found[0]]["epochs"]),
            spread([float(done[cell]["cpu_seconds"]) for cell in found], "{:.0f}"),
            *(spread([top1(cell) for cell in found]), spread(change, "{:+.2f}") if skip else ""),
        ])  # fmt: skip
    return rows


def write_page(folder: Path, called: str) -> None:
    done = finished(folder / "cells.csv")
    speedups = {row["name"]: f"x{float(row['speedup']):.2f}" for row in read_csv(folder / SPEEDS)}
    lines = [
        "# The systems trained alike by `skipvit train`",
        "",
        f"    {called} --speed     # before, on an idle machine",
        f"    {called}",
        "",
        *(f"- {name}: {value}" for name, value in machine.versions().items()),
        "",
        "ViTs of 12 blocks and 48 channels from scratch on pictures of Fashion-MNIST, 49 patches,",
        f"{next(iter(done.values()))['pictures']} pictures an epoch, cropped and mirrored, Muon,",
        "the same recipe for all, skipping from the first step; tested on the 10,000 pictures of",
        "the test set after the last epoch. A change is beside the unpatched model of the same",
        "seed, which began from the same weights and saw the same pictures in the same order",
        "(STViT begins from others); ± is the standard deviation over the seeds. CPU seconds are",
        "of the whole training on one thread, on a machine that did other things too.",
        "",
        "## On as many pictures",
        *markdown(HEADER, table(done, as_long=False)),
        "",
        "## For as long",
        "As many epochs as take the time of the unpatched model's. By how much an epoch is faster,",
        f"measured: {', '.join(f'{name} {factor}' for name, factor in speedups.items())}.",
        *markdown(HEADER, table(done, as_long=True)),
        "",
        "Each training: [cells.csv](cells.csv); the epochs' times: [speed.csv](speed.csv).",
    ]
    if missing := [str(cell) for cell in CELLS if cell not in done]:
        lines += ["", f"Not finished: {'; '.join(missing)}."]
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the data set")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    parser.add_argument("--work", type=Path, help="for pictures and checkpoints (default: a new)")
    parser.add_argument("--pictures", type=int, default=1_000, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=12, help="without skipping")
    parser.add_argument("--speed", action="store_true", help="measure the epochs instead")
    parser.add_argument("--rounds", type=int, default=9, help="of the speeds")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    folder = data_folder(parser, args.data, table1.FILES["cpu"])
    check_folder("out", args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as new:
        work = args.work or Path(new)
        write_pictures(folder, work, args.pictures)
        if args.speed:
            several = {name: settings_of(name, 0, 1_000, work, "speed") for name in SYSTEMS}
            write_csv(args.out / SPEEDS, speeds(several, args.rounds))
            return
        done = finished(args.out / "cells.csv")
        call = functools.partial(train_cell, args=args, folder=folder, work=work)
        left = [cell for cell in CELLS if cell not in done]
        called = command(folder).replace(str(work), "WORK")
        if done:
            write_page(args.out, called)
        for row in in_processes(call, left, args.jobs):
            append_csv(args.out / "cells.csv", COLUMNS, row)
            write_page(args.out, called)


if __name__ == "__main__":
    main()
