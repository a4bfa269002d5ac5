"""The paper's Table 1 put to the test: small ViTs trained with and without skipping.

    python benchmarks/table1.py --data DIR --out docs/results/table1_fashion_mnist --jobs 2
    python benchmarks/table1.py --data DIR --out docs/results/table1_fashion_mnist --speed

DIR, or the environment variable SKIPVIT_DATA, holds `fashion-mnist/`, the four IDX files as they
are distributed; with `--device cuda`, `imagenette128_train.npz` and `imagenette128_val.npz`, packs
like those of frontier.py. A cell is a scale, a setting and a seed (table1_cells.py): a process of
its own, on one thread, whose row of cells.csv is written when it ends. What is there is not trained
again, so that the study can be ended at any time and gone on with; `--cell "49 tokens; 6(55%)+11;
seed 0"` trains one and prints its row. Models of one seed begin from the same weights and see
the same pictures in the same order. Accuracy does not depend on the load of the machine; the
speeds do, so that `--speed` wants it idle. Every run ends with the page.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import table1_page
import torch
from PIL import Image
from results import append_csv, data_folder
from table1_cells import CPU, GPU, PARTS, STVIT, Cell, Scale, Training, cells
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import skipvit_kernels as sk
from skipvit_kernels import models
from skipvit_kernels.lab import bench, clock, report

FILES = {
    "cpu": tuple(
        f"fashion-mnist/{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ),
    "cuda": ("imagenette128_train.npz", "imagenette128_val.npz"),
}
COLUMNS = (
    *("scale", "setting", "warmup", "as_long", "seed"),
    *("top1", "top1_dense", "loss", "images", "cpu_seconds"),
)
SPEEDS = (
    *("config", "images_per_second", "paired_speedup", "ideal_speedup", "paired_overhead"),
    "peak_memory",
)

# ------------------------------------------------------------------------------------ data


def load(folder: Path, device: str) -> list[Tensor]:
    """Training pictures (n, C, S, S) uint8 and labels (n,), then those of the test, all there."""
    if device == "cpu":
        parts = [read_idx(folder / name) for name in FILES[device]]
    else:
        parts = [part for name in FILES[device] for part in read_pack(folder / name)]
    return [torch.from_numpy(part).to(device) for part in parts]


def read_idx(path: Path) -> np.ndarray:
    """(n, 1, 28, 28) uint8, or (n,) int64 of labels."""
    data = gzip.decompress(path.read_bytes())
    if data[3] == 3:
        return np.frombuffer(data, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy()
    return np.frombuffer(data, np.uint8, offset=8).astype(np.int64)


def read_pack(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3, 128, 128) uint8 and (n,) int64."""
    with np.load(path) as pack:
        data, offsets, labels = (pack[name] for name in ("data", "offsets", "labels"))
    files = (io.BytesIO(data[a:b].tobytes()) for a, b in itertools.pairwise(offsets))
    pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return pictures.transpose(0, 3, 1, 2).copy(), labels.astype(np.int64)


def normalised(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


def batches(pictures: Tensor, labels: Tensor, cell: Cell) -> Iterator[tuple[Tensor, Tensor]]:
    """Without an end: passes over the pictures in an order of the seed's."""
    draw = torch.Generator().manual_seed(cell.seed)
    orders = iter(lambda: torch.randperm(len(labels), generator=draw), None)
    for index in itertools.chain.from_iterable(o.split(cell.scale.batch)[:-1] for o in orders):
        found = pictures[index]
        yield normalised(moved(found, draw) if cell.scale.augment else found), labels[index]


def moved(pictures: Tensor, draw: torch.Generator) -> Tensor:
    """The pictures, each shifted by up to an eighth of its side, half of them mirrored."""
    batch, side = len(pictures), pictures.shape[-1]
    reach, along = side // 8, torch.arange(side)
    shift = torch.randint(0, 2 * reach + 1, (2, batch, 1), generator=draw)
    mirrored = torch.randint(0, 2, (batch, 1), generator=draw) > 0
    rows = along + shift[0]
    columns = torch.where(mirrored, side - 1 - along, along) + shift[1]
    padded = F.pad(pictures, (reach,) * 4)
    image = torch.arange(batch)[:, None, None]
    # Indexed in the first and the last two dimensions: the channels come last.
    return padded[image, :, rows[:, :, None], columns[:, None]].movedim(3, 1)


# -------------------------------------------------------------------------------- training


def build(scale: Scale, training: Training, seed: int) -> VisionTransformer:
    """The model, patched where it is to be; the same weights for the same seed.

    timm's initial weights are meant for wider models and longer training: under them this one has
    learned nothing after 600 steps. As in `skipvit demo` the linear maps are scaled by their width,
    a patch is embedded with its neighbours, and the positions start as large as the pixels.
    """
    torch.manual_seed(seed)
    channels, side = scale.shape
    make = models.STViT if training.skip == STVIT else VisionTransformer
    model = make(
        img_size=side, patch_size=scale.patch, in_chans=channels, num_classes=10,
        embed_dim=scale.width, depth=12, num_heads=scale.heads, weight_init="jax",
    )  # fmt: skip
    model.patch_embed.proj = nn.Conv2d(
        channels, scale.width, 2 * scale.patch, stride=scale.patch, padding=scale.patch // 2
    )
    for learned in (model.pos_embed, model.cls_token):
        if learned is not None:
            nn.init.normal_(learned, std=0.5)
    if training.patched:
        sk.patch(model, training.skip, warmup_epochs=training.warmup)
    return model


def speedup(scale: Scale, training: Training) -> float:
    """Of the whole training, by the arithmetic."""
    flops = []
    for skip in ("", training.skip):
        model = build(scale, Training(skip, warmup=0), 0).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, scale.shape[0], *2 * scale.shape[1:]))
        flops.append(counter.get_total_flops())
    warmup = training.warmup / PARTS if training.patched else 0.0
    return 1 / (warmup + (1 - warmup) * flops[1] / flops[0])


def train(cell: Cell, folder: Path, device: str) -> list[Any]:
    """The cell's row of cells.csv."""
    scale, training = cell.scale, cell.training
    pictures, labels, *test = load(folder, device)
    model = build(scale, training, cell.seed).to(device).train()
    factor = speedup(scale, training) if training.as_long else 1
    steps = round(scale.images * factor) // scale.batch
    optimizer = torch.optim.AdamW(
        model.parameters(), scale.lr, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, scale.lr, total_steps=steps, pct_start=0.1
    )
    losses = []
    for step, (images, answers) in zip(range(steps), batches(pictures, labels, cell), strict=False):
        if training.patched:
            sk.set_epoch(model, step * PARTS // steps)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = F.cross_entropy(model(images), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    model.eval()
    as_trained = accuracy(model, *test)
    dense = accuracy(sk.unpatch(model), *test) if training.patched else as_trained
    return [
        *(scale.name, *training.key, cell.seed),
        *(f"{share:.4f}" for share in (as_trained, dense)),
        f"{torch.stack(losses[-steps // PARTS :]).mean().item():.4f}",
        *(steps * scale.batch, f"{time.process_time():.0f}"),
    ]


@torch.inference_mode()
def accuracy(model: Any, pictures: Tensor, labels: Tensor) -> float:
    guesses = [model(normalised(batch)).argmax(dim=1) for batch in pictures.split(500)]
    return (torch.cat(guesses) == labels).float().mean().item()


def train_in_process(cell: Cell, args: argparse.Namespace, folder: Path) -> list[Any] | str:
    """The row, or why there is none."""
    command = [sys.executable, __file__, "--data", folder, "--out", args.out]
    command += ["--device", args.device, "--cell", str(cell)]
    threads = {"OMP_NUM_THREADS": "1"} if args.device == "cpu" else {}
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if ran.returncode:
        return f"{cell}: exit status {ran.returncode}: {ran.stderr.strip().splitlines()[-1:]}"
    return json.loads(ran.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------- speed


def measure_speed(scale: Scale, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Training steps of every setting of the scale in turn, and of its floor; then of STViT."""
    configs = tuple(dict.fromkeys(t.skip for t in scale.trainings if t.patched))
    job = bench.Job(
        "small ViT", configs, scale.batch, training=True, device=args.device,
        bfloat16=args.device == "cuda", rounds=args.rounds,
    )  # fmt: skip
    measured: list[bench.Measurement] = []
    with tqdm(total=job.num_calls, desc=scale.name, unit="step") as bar:
        model = build(scale, Training(""), 0).to(args.device).train()
        bench.run(job, measured, model=model, on_call=bar.update)
    rows = [{name: row.record()[name] for name in SPEEDS} for row in measured]
    if any(training.skip == STVIT for training in scale.trainings):
        rows.append(measure_stvit(scale, model, args))
    return [{"scale": scale.name} | row for row in rows]


def measure_stvit(scale: Scale, unpatched: Any, args: argparse.Namespace) -> dict[str, Any]:
    """STViT's training steps, and in turn with them those of the unpatched model."""
    images = torch.randn(scale.batch, *scale.shape, scale.shape[1], device=args.device)
    labels = torch.zeros(scale.batch, dtype=torch.int64, device=args.device)
    stvit = build(scale, Training(STVIT), 0).to(args.device).train()
    calls = {
        name: clock.training_step(model, images, labels, bfloat16=args.device == "cuda")
        for name, model in (("unpatched", unpatched), (STVIT, stvit))
    }
    times = clock.Times([])
    clock.interleave(calls, times, rounds=args.rounds, warmup=2, device=args.device)
    values = (
        *(STVIT, scale.batch / times.best(STVIT), times.paired_ratio("unpatched", STVIT)),
        *(speedup(scale, Training(STVIT)), None),
        clock.peak_memory(calls[STVIT], device=args.device),
    )
    return dict(zip(SPEEDS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the data set")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    parser.add_argument("--device", choices=FILES, default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--cell", help="train this one alone and print its row")
    parser.add_argument("--speed", action="store_true", help="measure the speeds instead")
    parser.add_argument("--rounds", type=int, default=15, help="of the speeds")
    parser.add_argument("--threads", type=int, default=2, help="of torch, for the speeds")
    args = parser.parse_args()
    report.check_folder("out", args.out)
    scales = CPU if args.device == "cpu" else GPU
    every = {str(cell): cell for cell in cells(scales)}
    if args.cell:
        if args.cell not in every:
            parser.error(f"cell must be one of the study's, got {args.cell!r}")
        folder = data_folder(parser, args.data, FILES[args.device])
        torch.set_num_threads(1)
        print(json.dumps(train(every[args.cell], folder, args.device)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "cells.csv"
    if args.speed:
        torch.set_num_threads(args.threads)
        report.write_csv(
            args.out / "speed.csv", [row for scale in scales for row in measure_speed(scale, args)]
        )
    else:
        folder = data_folder(parser, args.data, FILES[args.device])
        done = table1_page.finished(path, scales)
        left = [cell for cell in every.values() if cell not in done]
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            rows = [pool.submit(train_in_process, cell, args, folder) for cell in left]
            for row in tqdm(concurrent.futures.as_completed(rows), total=len(rows), unit="cell"):
                if isinstance(found := row.result(), str):
                    tqdm.write(found, file=sys.stderr)
                else:
                    append_csv(path, COLUMNS, found)
    table1_page.write(args.out, scales)


if __name__ == "__main__":
    main()
