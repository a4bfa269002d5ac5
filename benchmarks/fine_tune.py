"""Fine-tuning with skipping: DeiT-tiny from its weights, on ten classes of ImageNet.

    python benchmarks/fine_tune.py --data DIR --out docs/results/fine_tune_deit_tiny

DIR, or the environment variable SKIPVIT_DATA, holds `deit_tiny_patch16_224.safetensors` and the
packs `imagenette128_train.npz` and `imagenette128_val.npz` (JPEG files end to end, as frontier.py
has them, and in `classes` ImageNet's name of each label). `skipvit train` trains, as EViT
fine-tunes (its README and scripts: no warm-up, weight decay 1e-6, the cosine down to a tenth); the
head begins as the ten rows of DeiT's. Whoever skips trains for as many epochs more as his steps are
faster by the arithmetic, so that all take the same time. What is finished is in the folder and is
not trained again; the page is written after each.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from results import append_csv, command, data_folder, read_csv
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from timm.models import load_checkpoint, load_state_dict
from torch import Tensor
from tqdm import tqdm

import skipvit_kernels as sk
from skipvit_kernels.lab import machine
from skipvit_kernels.lab.report import check_folder, markdown

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
RECIPE = (
    *("--lr", "2e-5", "--lr-warmup-epochs", "0", "--weight-decay", "1e-6", "--batch-size", "32"),
    *("--sched-args", "min_lr=2e-6", "--augment-args", "scale=(0.5,1.0)"),
)
COLUMNS = (
    *("name", "skip", "epoch", "seconds", "loss", "top1", "top1_before", "pictures", "tested"),
)


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


def epochs_of(skip: str, unpatched: int) -> int:
    """As many as take the time of so many without skipping."""
    model = timm.create_model(MODEL, img_size=SIDE)
    return round(unpatched * sk.ideal_speedup(model, skip))


@torch.inference_mode()
def before(skip: str, weights: Path, folder: Path) -> float:
    """Top-1 of the weights as they come, skipping."""
    model = timm.create_model(MODEL, img_size=SIDE, num_classes=10)
    load_checkpoint(model, str(weights))
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
    pixels = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"), np.float32)
    mean, std = map(np.float32, (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return torch.from_numpy((pixels / 255 - mean) / std).permute(2, 0, 1)


def train(name: str, args: argparse.Namespace, work: Path) -> list[list[Any]]:
    """A row for each epoch."""
    skip, out = SETTINGS[name], work / name.replace(" ", "_")
    command = [sys.executable, "-m", "skipvit_kernels", "train", str(work), "--model", MODEL]
    command += ["--img-size", str(SIDE), "--fine-tune", str(work / "weights.pth"), *RECIPE]
    command += ["--epochs", str(epochs_of(skip, args.epochs)), "--out", str(out), "--resume"]
    command += ["--workers", "0", "--threads", str(args.threads), "--augment-args", "crop_pct=1.0"]
    subprocess.run([*command, *(["--skip", skip] if skip else [])], check=True)
    pictures, tested = (len(list((work / split).glob("*/*.jpg"))) for split in PACKS)
    first = before(skip, work / "weights.pth", work / "validation")
    seconds, rows = 0.0, []
    for row in read_csv(out / "log.csv"):
        seconds += pictures // 32 * 32 / float(row["images_per_second"])
        figures = [f"{float(row[key]):.4f}" for key in ("loss", "val_top1")]
        rows.append([name, skip, int(row["epoch"]) + 1, f"{seconds:.1f}", *figures,
                     f"{first:.4f}", pictures, tested])  # fmt: skip
    return rows


def write_page(folder: Path, called: str) -> None:
    rows = read_csv(folder / "epochs.csv")
    last = {row["name"]: row for row in rows}
    lines = ["# Fine-tuning with skipping", "", f"    {called}", ""]
    lines += [f"- {name}: {value}" for name, value in machine.versions().items()]
    lines += [
        "",
        f"DeiT-tiny at {SIDE} px on ten classes of ImageNet (pictures that it was trained on: read",
        "the differences), as many epochs as take the same time by the arithmetic. *Before*: the",
        "weights as they come, skipping. Seconds are of the training steps alone, and those of a",
        "machine that did other things too.",
        *markdown(
            ("setting", "", "pictures", "epochs", "seconds", "before", "after"),
            (
                [row["skip"] or "unpatched", name, row["pictures"], row["epoch"], row["seconds"]]
                + [f"{float(row[key]):.1%}" for key in ("top1_before", "top1")]
                for name, row in last.items()
            ),
        ),
        "",
        f"Tested on {rows[0]['tested']} pictures. Every epoch: [epochs.csv](epochs.csv).",
    ]
    if missing := [name for name in SETTINGS if name not in last]:
        lines += ["", f"Not finished: {', '.join(missing)}."]
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of weights and packs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    parser.add_argument("--work", type=Path, help="for pictures and checkpoints (default: a new)")
    parser.add_argument("--pictures", type=int, default=9_469, help="to train on, about")
    parser.add_argument("--tested", type=int, default=3_925, help="pictures to test on, about")
    parser.add_argument("--epochs", type=int, default=4, help="without skipping")
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
        done = {row["name"] for row in read_csv(args.out / "epochs.csv")}
        for name in tqdm([name for name in SETTINGS if name not in done], unit="training"):
            for row in train(name, args, work):
                append_csv(args.out / "epochs.csv", COLUMNS, row)
            write_page(args.out, command(folder))


if __name__ == "__main__":
    main()
