"""Fine-tuning with skipping: DeiT-tiny from its weights, on ten classes of ImageNet.

    python benchmarks/fine_tune.py --data DIR --out docs/results/fine_tune_deit_tiny --speed
    python benchmarks/fine_tune.py --data DIR --out docs/results/fine_tune_deit_tiny

DIR, or the environment variable SKIPVIT_DATA, holds `deit_tiny_patch16_224.safetensors` and the
packs `imagenette128_train.npz` and `imagenette128_val.npz` (JPEG files end to end, as frontier.py
has them, and in `classes` ImageNet's name of each label). `skipvit train` trains, as EViT
fine-tunes (its README and scripts: no warm-up, weight decay 1e-6, the cosine down to a tenth); the
head begins as the ten rows of DeiT's. The first command measures the epochs of all settings in
turn, on an idle machine; in the second whoever skips trains for as many epochs as take the time of
the unpatched model's. What is finished is in the folder and is not trained again; the page is
written after each training.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from equal_time import SPEEDS, epochs_as_long, in_processes, speeds, trained
from PIL import Image
from results import append_csv, command, data_folder, read_csv
from table1_page import spread
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from timm.models import load_checkpoint, load_state_dict
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

import skipvit_kernels as sk
from skipvit_kernels.lab import machine, train
from skipvit_kernels.lab.report import check_folder, markdown, write_csv

MODEL, SIDE = "deit_tiny_patch16_224", 128
WEIGHTS = "deit_tiny_patch16_224.safetensors"
PACKS = {"train": "imagenette128_train.npz", "validation": "imagenette128_val.npz"}
SETTINGS = {
    "without skipping": "",
    "skipped, back at 11": "6(55%)+11",
    "skipped, back by the mean": "6(55%)+11:mean",
    "fused": "6(45%)+fused",
    "merged": "6(55%)+12:merge",
    "merged in three stages": "4,7,10(30%,30%,30%)+12:merge",
}
SEEDS = 3
COLUMNS = ("name", "seed", "epochs", "cpu_seconds", "loss", "pictures", "tested", "top1")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A training of a setting, from the same weights, its pictures in an order of the seed's."""

    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


CELLS = [Cell(name, seed) for seed in range(SEEDS) for name in SETTINGS]


def unpack(pack: Path, folder: Path, count: int) -> list[str]:
    """Write evenly spaced pictures, about so many, to a folder for each class; the classes."""
    with np.load(pack) as found:
        data, offsets, labels, classes = (
            found[name] for name in ("data", "offsets", "labels", "classes")
        )
    for at in range(0, len(labels), max(1, len(labels) // count)):
        path = folder / f"{labels[at]:02}" / f"{at}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[offsets[at] : offsets[at + 1]].tobytes())
    return classes.tolist()


def ten_classes(weights: Path, classes: list[str], to: Path) -> None:
    """The checkpoint with the head's rows of these classes alone."""
    state = load_state_dict(str(weights))
    order = ImageNetInfo("imagenet-1k").label_names()
    rows = [order.index(name) for name in classes]
    for name in ("head.weight", "head.bias"):
        state[name] = state[name][rows].clone()
    torch.save({"state_dict": state}, to)


@torch.inference_mode()
def accuracy(skip: str, weights: Path, folder: Path) -> float:
    """Top-1 of the weights on the pictures of a folder, skipping."""
    model = timm.create_model(MODEL, img_size=SIDE, num_classes=10)
    load_checkpoint(model, str(weights), filter_fn=checkpoint_filter_fn)  # for another size
    sk.patch(model.eval(), skip)
    paths = sorted(folder.glob("*/*.jpg"))
    hits = 0
    for at in range(0, len(paths), 64):
        batch = paths[at : at + 64]
        guesses = model(torch.stack([read(path) for path in batch])).argmax(1).tolist()
        hits += sum(g == int(p.parent.name) for g, p in zip(guesses, batch, strict=True))
    return hits / len(paths)


def read(path: Path) -> Tensor:
    """(3, SIDE, SIDE) as DeiT was trained."""
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32)
    mean, std = map(np.float32, (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return torch.from_numpy((pixels / 255 - mean) / std).permute(2, 0, 1)


def settings_of(name: str, seed: int, epochs: int, work: Path, out: str) -> train.Settings:
    return train.Settings(
        str(work), MODEL, work / out, SETTINGS[name], val_split="", img_size=SIDE, epochs=epochs,
        batch_size=16, lr=3e-5, lr_warmup_epochs=0, weight_decay=1e-6, sched_args={"min_lr": 3e-6},
        augment_args={"scale": (0.5, 1.0)}, fine_tune=work / "weights.pth", seed=seed, workers=0,
        cpu=True, resume=True,
    )  # fmt: skip


def train_cell(cell: Cell, *, args: argparse.Namespace, work: Path) -> list[Any]:
    """The cell's row of cells.csv."""
    epochs = epochs_as_long(args.out, cell.name, args.epochs)
    out = str(cell).replace(", ", "-").replace(" ", "_")
    settings = settings_of(cell.name, cell.seed, epochs, work, out)
    found = trained(settings, args.threads)
    pictures, tested = (len(list((work / split).glob("*/*.jpg"))) for split in PACKS)
    top1 = accuracy(settings.skip, settings.out / train.LAST, work / "validation")
    return [cell.name, cell.seed, *found, pictures, tested, f"{top1:.4f}"]


def finished(path: Path) -> dict[Cell, dict[str, str]]:
    return {Cell(row["name"], int(row["seed"])): row for row in read_csv(path)}


def table(done: dict[Cell, dict[str, str]], measured: list[dict[str, str]]) -> list[list[str]]:
    """Percent and points, over the seeds that are finished."""

    def top1(cell: Cell) -> float:
        return 100 * float(done[cell]["top1"])

    rows = []
    for row in measured:
        name, skip = row["name"], SETTINGS[row["name"]]
        found = [cell for cell in CELLS if cell in done and cell.name == name]
        if not found:
            continue
        plain = {cell: dataclasses.replace(cell, name="without skipping") for cell in found}
        change = [top1(a) - top1(b) for a, b in plain.items() if b in done]
        seconds = [float(done[cell]["cpu_seconds"]) for cell in found]
        rows.append([
            *(skip or "unpatched", name, str(len(found)), f"x{float(row['speedup']):.2f}"),
            *(done[found[0]]["epochs"], spread(seconds, "{:.0f}")),
            f"{100 * float(row['top1_before']):.1f}",
            *(spread([top1(cell) for cell in found]), spread(change, "{:+.2f}") if skip else ""),
        ])  # fmt: skip
    return rows


def write_page(folder: Path, called: str) -> None:
    done = finished(folder / "cells.csv")
    some = next(iter(done.values()))
    header = (
        *("setting", "", "seeds", "an epoch's speed-up", "epochs", "CPU seconds", "before"),
        *("after", "change"),
    )
    lines = [
        "# Fine-tuning with skipping",
        "",
        f"    {called} --speed     # before, on an idle machine",
        f"    {called}",
        "",
        *(f"- {name}: {value}" for name, value in machine.versions().items()),
        "",
        f"DeiT-tiny at {SIDE} px on ten classes of ImageNet, {some['pictures']} pictures of the",
        f"training set an epoch, tested on {some['tested']} of the validation set, from both of",
        "which DeiT has learned: read the differences. As many epochs as take the time of the",
        "unpatched model's, as measured. *Before*: top-1 of the weights as they come, skipping. A",
        "change is beside the unpatched model of the same seed; ± is the standard deviation over",
        "the seeds. CPU seconds are of the whole training on one thread, on a machine that did",
        "other things too.",
        *markdown(header, table(done, read_csv(folder / SPEEDS))),
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
    parser.add_argument("--data", type=Path, help="folder of weights and packs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    parser.add_argument("--work", type=Path, help="for pictures and checkpoints (default: a new)")
    parser.add_argument("--pictures", type=int, default=9_469, help="of an epoch, about")
    parser.add_argument("--tested", type=int, default=3_925, help="pictures to test on, about")
    parser.add_argument("--epochs", type=int, default=8, help="without skipping")
    parser.add_argument("--speed", action="store_true", help="measure the epochs instead")
    parser.add_argument("--rounds", type=int, default=5, help="of the speeds")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    folder = data_folder(parser, args.data, (WEIGHTS, *PACKS.values()))
    check_folder("out", args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as new:
        work = args.work or Path(new)
        for split, count in zip(PACKS, (args.pictures, args.tested), strict=True):
            classes = unpack(folder / PACKS[split], work / split, count)
        ten_classes(folder / WEIGHTS, classes, work / "weights.pth")
        if args.speed:
            several = {name: settings_of(name, 0, 1_000, work, "speed") for name in SETTINGS}
            rows = speeds(several, args.rounds)
            for row in rows:
                first = work / "weights.pth", work / "validation"
                row["top1_before"] = accuracy(SETTINGS[row["name"]], *first)
            write_csv(args.out / SPEEDS, rows)
            return
        done = finished(args.out / "cells.csv")
        call = functools.partial(train_cell, args=args, work=work)
        left = [cell for cell in CELLS if cell not in done]
        called = command(folder).replace(str(work), "WORK")
        if done:
            write_page(args.out, called)
        for row in in_processes(call, left, args.jobs):
            append_csv(args.out / "cells.csv", COLUMNS, row)
            write_page(args.out, called)


if __name__ == "__main__":
    main()
