"""Top-1, top-5 and speed of skipping configurations, off the shelf, on labelled images.

    python benchmarks/accuracy.py --model deit_tiny_patch16_224 --weights deit_tiny.safetensors \
        --images imagenet_val/ --crop-pct 0.875 --csv accuracy.csv

IMAGES is a folder of class folders whose sorted order is the order of the labels. Every batch runs
through every configuration before the next batch is read, so that the speeds are of one run,
interleaved: the speed-up is the median over the batches of t(unpatched) / t(configuration).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint
from tqdm import tqdm

import skipvit_kernels as sk
from skipvit_kernels.lab.machine import cpu_name
from skipvit_kernels.skipping import presets

TABLE_1 = [text for text in presets.TABLE_1 if not text.endswith("+fused")]
CONFIGS = ("", *TABLE_1, *(f"{text}:mean" for text in TABLE_1), "6(45%)+fused", "6(55%)")


@dataclasses.dataclass
class Tally:
    """One configuration: hits among `images`, seconds per batch, beside what to expect."""

    config: str
    ideal_speedup: float
    images: int = 0
    top1: int = 0
    top5: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)

    def add(self, logits: torch.Tensor, labels: torch.Tensor, seconds: float) -> None:
        hits = logits.topk(5).indices == labels[:, None]
        self.images += len(labels)
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.any(1).sum())
        self.seconds.append(seconds)

    def report(self, baseline: Tally) -> dict[str, str]:
        # The last batch may be smaller, but it is so for every configuration.
        ratios = [b / s for b, s in zip(baseline.seconds, self.seconds, strict=True)]
        return {
            "config": self.config or "(unpatched)",
            "top1": f"{100 * self.top1 / self.images:.2f}",
            "top5": f"{100 * self.top5 / self.images:.2f}",
            "top1_change": f"{100 * (self.top1 - baseline.top1) / self.images:+.2f}",
            "images_per_s": f"{self.images / sum(self.seconds):.1f}",
            "speedup": f"{statistics.median(ratios):.3f}",
            "ideal_speedup": f"{self.ideal_speedup:.3f}",
        }


def evaluate(
    model: torch.nn.Module, loader: torch.utils.data.DataLoader, configs: list[str], device: str
) -> list[dict[str, str]]:
    rows = [Tally(text, sk.ideal_speedup(model, text)) for text in configs]
    for images, labels in tqdm(loader, desc="batches", unit="batch"):
        images, labels = images.to(device), labels.to(device)
        for row in rows:
            if row.config:
                sk.patch(model, row.config)
            try:
                logits, seconds = timed(model, images)
            finally:
                if row.config:
                    sk.unpatch(model)
            row.add(logits, labels, seconds)
    return [row.report(rows[0]) for row in rows]


@torch.inference_mode()
def timed(model: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    logits = model(images)
    synchronize()
    return logits, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm model name")
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint or .safetensors")
    parser.add_argument("--images", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--class-map", default="", help="timm class map, where labels are a subset")
    parser.add_argument("--configs", nargs="+", default=CONFIGS[1:], help="default: all of Table 1")
    parser.add_argument("--crop-pct", type=float, help="share of the resized image that is cropped")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads on the CPU")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    args = parser.parse_args()
    for path in (args.weights, args.images):
        if not path.exists():
            parser.error(f"{path} does not exist")
    if args.threads:
        torch.set_num_threads(args.threads)

    model = timm.create_model(args.model)
    load_checkpoint(model, str(args.weights))
    model = model.to(args.device).eval()
    try:
        configs = [str(sk.SkipConfig.parse(text)) for text in args.configs]
        for text in configs:
            sk.verify(model, text)
    except ValueError as error:
        parser.error(str(error))
    data = resolve_data_config({"crop_pct": args.crop_pct}, model=model)
    loader = create_loader(
        create_dataset("", root=str(args.images), class_map=args.class_map),
        data["input_size"],
        args.batch_size,
        interpolation=data["interpolation"],
        mean=data["mean"],
        std=data["std"],
        crop_pct=data["crop_pct"],
        num_workers=args.workers,
        use_prefetcher=False,
        persistent_workers=False,
    )
    table = evaluate(model, loader, ["", *configs], args.device)

    print(
        f"{args.model}, {len(loader.dataset)} images, batch {args.batch_size}, {args.device} "
        f"({cpu_name()}, {torch.get_num_threads()} threads), "
        f"torch {torch.__version__}, timm {timm.__version__}"
    )
    widths = {name: max(len(row[name]) for row in table) for name in table[0]}
    widths = {name: max(width, len(name)) for name, width in widths.items()}
    print("  ".join(name.ljust(width) for name, width in widths.items()))
    for row in table:
        print("  ".join(row[name].ljust(width) for name, width in widths.items()))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    sys.exit(main())
