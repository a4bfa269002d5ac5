"""The frontier: top-1 against measured speed-up of DeiT-tiny, off the shelf, by method and setting.

    python benchmarks/frontier.py --data DIR --out docs/results/frontier_deit_tiny

DIR, or the environment variable SKIPVIT_DATA, holds `deit_tiny_patch16_224.safetensors` and
`imagenet_sample1000_256.npz`: JPEG files of 256 x 256 end to end in `data` (uint8), where they
begin in `offsets` (int64, n + 1), ImageNet's class numbers in `labels`. Accuracy comes first, under
any load; then the speeds, for which the machine must be idle: every setting in turn, round by
round, and as speed-up the median over the rounds of t(unpatched) / t(setting). What is finished is
in the folder and is not measured again: accuracy.csv, seconds.csv. Then it writes the page.
"""

from __future__ import annotations

import argparse
import io
import itertools
from pathlib import Path
from typing import Any

import frontier_page
import numpy as np
import timm
import torch
from frontier_settings import all_settings
from PIL import Image
from results import append_csv, command, data_folder, read_csv
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_checkpoint
from torch import Tensor, nn
from tqdm import tqdm

from skipvit_kernels.lab import clock
from skipvit_kernels.lab.report import check_folder

WEIGHTS, PICTURES = "deit_tiny_patch16_224.safetensors", "imagenet_sample1000_256.npz"
BATCH = 32  # of the speeds; accuracy does not depend on it

# ------------------------------------------------------------------------------------ data


def load_model(folder: Path) -> Any:
    model = timm.create_model("deit_tiny_patch16_224")
    load_checkpoint(model, str(folder / WEIGHTS))
    return model.eval()


def load_pictures(folder: Path) -> tuple[Tensor, Tensor]:
    """(n, 224, 224, 3) uint8, the centre of each, and their labels (n,) int64."""
    with np.load(folder / PICTURES) as pack:
        data, offsets, labels = (pack[name] for name in ("data", "offsets", "labels"))
    files = (io.BytesIO(data[a:b].tobytes()) for a, b in itertools.pairwise(offsets))
    pictures = np.stack([centre(Image.open(file)) for file in files])
    return torch.from_numpy(pictures), torch.from_numpy(labels).long()


def centre(picture: Image.Image) -> np.ndarray:
    """(224, 224, 3)."""
    left, top = ((side - 224) // 2 for side in picture.size)
    return np.asarray(picture.convert("RGB").crop((left, top, left + 224, top + 224)))


def normalised(pictures: Tensor) -> Tensor:
    """(B, 224, 224, 3) uint8 -> (B, 3, 224, 224) as DeiT was trained."""
    mean, std = map(torch.tensor, (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return ((pictures / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


# -------------------------------------------------------------------------------- accuracy


ACCURACY = ("setting", "images", "top1", "top5", "gained", "lost")


@torch.inference_mode()
def measure_accuracy(model: Any, folder: Path, path: Path) -> None:
    """Add to `path` what it lacks: right answers, and those gained and lost beside the unpatched.

    Every row holds with and without the CLS-only last block, which is compared and then used.
    """
    known = {row["setting"] for row in read_csv(path)}
    settings = all_settings()
    pairs = zip(settings[::2], settings[1::2], strict=True)
    missing = [pair for pair in pairs if str(pair[0]) not in known]
    if not missing:
        return
    pictures, labels = load_pictures(folder)
    unpatched = logits_of(model, pictures).argmax(dim=1) == labels
    for full, cls_only in tqdm(missing, desc="accuracy", unit="setting"):
        logits = logits_of(cls_only.build(model), pictures)
        same = logits_of(full.build(model), pictures[:BATCH])
        torch.testing.assert_close(logits[:BATCH], same, rtol=1e-3, atol=1e-3, msg=str(full))
        hits = logits.topk(5).indices == labels[:, None]
        first = hits[:, 0]
        counts = (first, hits.any(dim=1), first & ~unpatched, unpatched & ~first)
        append_csv(path, ACCURACY, [str(full), len(labels), *(int(c.sum()) for c in counts)])


def logits_of(model: nn.Module, pictures: Tensor) -> Tensor:
    return torch.cat([model(normalised(batch)) for batch in pictures.split(BATCH)])


# ----------------------------------------------------------------------------------- speed


def measure_speed(model: Any, folder: Path, path: Path, rounds: int) -> None:
    """Add rounds to `path` up to so many, a column for each setting: seconds of a batch."""
    settings = all_settings()
    names = list(map(str, settings))
    left = rounds - len(read_csv(path))
    if left <= 0:
        return
    images = normalised(load_pictures(folder)[0][:BATCH])
    calls = {str(setting): clock.forward_step(setting.build(model), images) for setting in settings}
    clock.interleave(calls, clock.Times([]), rounds=0, warmup=2)
    for _ in tqdm(range(left), desc="speed", unit="round"):
        times = clock.Times([])
        clock.interleave(calls, times, rounds=1, warmup=0)
        append_csv(path, names, [f"{times.best(name):.6f}" for name in names])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of weights and pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    parser.add_argument("--rounds", type=int, default=15, help="of the speeds")
    parser.add_argument("--threads", type=int, default=2, help="of torch, for the speeds")
    parser.add_argument("--accuracy-only", action="store_true", help="leave the speeds for later")
    args = parser.parse_args()
    folder = data_folder(parser, args.data, (WEIGHTS, PICTURES))
    check_folder("out", args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model(folder)
    measure_accuracy(model, folder, args.out / "accuracy.csv")
    if args.accuracy_only:
        return
    torch.set_num_threads(args.threads)
    measure_speed(model, folder, args.out / "seconds.csv", args.rounds)
    frontier_page.write(args.out, command=command(folder))


if __name__ == "__main__":
    main()
