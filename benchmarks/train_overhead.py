"""What `skipvit train` adds to a minimal loop over the same model, data and device.

    python benchmarks/train_overhead.py --model deit_tiny_patch16_224 --skip "6(55%)+11"

Both train a copy of the model on the same folder of pictures, made for it, with the same loader and
optimizer, an epoch each in turn; the minimal loop a second time too: what its ratio misses 1 by is
noise. Epochs only: neither validation nor checkpoints, which a minimal loop would need as well.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from equal_time import epoch_of
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2

import skipvit_kernels as sk
from skipvit_kernels.lab import clock, machine, train
from skipvit_kernels.lab.bench import at_least

MINIMAL, AGAIN, TRAIN = "minimal loop", "minimal loop again", "skipvit train"
CLASSES = 2


def make_pictures(folder: Path, count: int, side: int) -> None:
    """JPEGs of noise, as large as those of a small data set: they take as long to read."""
    noise = np.random.default_rng(0)
    for at in range(count):
        path = folder / "train" / str(at % CLASSES) / f"{at}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, quality=85)


def minimal(settings: train.Settings, device: torch.device) -> Callable[[], None]:
    """An epoch of the loop that a user would write, as a call."""
    model = timm.create_model(settings.model, num_classes=CLASSES).to(device).train()
    sk.patch(model, settings.config)
    optimizer = create_optimizer_v2(
        model, settings.opt, lr=settings.lr, weight_decay=settings.weight_decay
    )
    loader = create_loader(
        create_dataset("", settings.data, "train"),
        is_training=True,
        batch_size=settings.batch_size,
        num_workers=settings.workers,
        use_prefetcher=False,
        pin_memory=device.type == "cuda",
        **resolve_data_config({}, model=model),
    )

    def epoch() -> None:
        for images, labels in loader:
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--skip", default="6(55%)+11", metavar="CONFIG")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=12, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    at_least(1, batches=args.batches, rounds=args.rounds, threads=args.threads)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder), args.batches * args.batch_size, side=256)
        settings = train.Settings(
            folder, args.model, Path(folder) / "out", args.skip, val_split="", cpu=args.cpu,
            batch_size=args.batch_size, workers=args.workers, epochs=2 * args.rounds + 2,
        )  # fmt: skip
        training = train.Training(settings)
        device = training.accelerator.device
        calls = {
            MINIMAL: minimal(settings, device),
            TRAIN: epoch_of(training),
            AGAIN: minimal(settings, device),
        }
        times = clock.Times([])
        clock.interleave(calls, times, rounds=args.rounds, warmup=1, device=device.type)
    print(f"{args.model}, {args.skip}, {device}, {machine.versions()['CPU']}")
    images = args.batches * args.batch_size
    for name in calls:
        more = times.paired_ratio(name, MINIMAL) - 1
        print(f"{name:20} {images / times.best(name):8.1f} images/s, {more:+.1%} time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
