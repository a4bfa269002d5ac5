"""Dense quality: DeiT-tiny's last features after skipping against those of the unpatched model.

    python benchmarks/frontier_dense.py --data DIR --out docs/results/dense_deit_tiny

DIR, or SKIPVIT_DATA, as for frontier.py; the numbers are of its 1,000 pictures, of which nothing is
shown. The picture is of two photographs that come with scikit-learn, which it needs beside.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from frontier import BATCH, PICTURES, WEIGHTS, centre, load_model, load_pictures, normalised
from matplotlib.figure import Figure
from PIL import Image
from results import command, data_folder
from sklearn.datasets import load_sample_images
from torch import Tensor
from tqdm import tqdm

import skipvit_kernels as sk
from skipvit_kernels.lab import machine
from skipvit_kernels.lab.report import check_folder, markdown
from skipvit_kernels.skipping import floor

UPDATES = {"": "paper", ":mean": "mean", ":merge": "merge"}
DROPS = ("6(55%)+11", "6(55%)+12", "4,7(30%,30%)+10", "4,7,10(40p,40p,40p)+12")
BEST = (
    "4,7,10(40p,40p,40p)+12:merge,score=similar,match=keys",
    "4-11(20p)+12:merge,score=similar,match=keys",
    "4,7,10(40p,40p,40p)+12:merge,score=marginal,match=keys",
    "4,5,8(53p,48p,48p)+12:merge,score=marginal,match=keys",
)
SHOWN = "6(55%)+11"


def features(model: Any, pictures: Tensor) -> Tensor:
    """(n, 196, C) behind the last norm, of the patches."""
    batches = pictures.split(BATCH)
    return torch.cat([model.forward_features(normalised(batch))[:, 1:] for batch in batches])


def similarity(
    model: Any, pictures: Tensor, unpatched: Tensor, config: str
) -> tuple[Tensor, Tensor]:
    """(n, 196) cosines of each position with what it was `unpatched`, and which were kept."""
    twin = sk.patch(floor.twin(model), config)
    with sk.record_skips(twin) as records:
        cosines = F.cosine_similarity(features(twin, pictures), unpatched, dim=-1)
    return cosines, torch.cat([record.kept()[:, 1:] for record in records])


def photographs() -> Tensor:
    """(2, 224, 224, 3) uint8: scikit-learn's china.jpg and flower.jpg, the centre."""
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    small = (photo.resize((round(256 * photo.width / photo.height), 256)) for photo in photos)
    return torch.from_numpy(np.stack([centre(photo) for photo in small]))


def draw(model: Any) -> Figure:
    """A row for each photograph; 14 x 14 positions as brighter, the less they have changed."""
    photos = photographs()
    unpatched = features(model, photos)
    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(len(photos), 1 + len(UPDATES))
    for axes, photo in zip(panels[:, 0], photos, strict=True):
        axes.imshow(photo.numpy())
    for column, (update, name) in enumerate(UPDATES.items(), start=1):
        cosines, _ = similarity(model, photos, unpatched, SHOWN + update)
        panels[0, column].set_title(f"{name}: {SHOWN}{update}", fontsize=8)
        for axes, values in zip(panels[:, column], cosines, strict=True):
            shown = axes.imshow(values.view(14, 14).numpy(), vmin=0, vmax=1)
            axes.set_xlabel(f"mean {values.mean():.2f}", fontsize=8)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    label = "cosine similarity with the unpatched features"
    figure.colorbar(shown, ax=panels, shrink=0.8).set_label(label, fontsize=8)
    return figure


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of weights and pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    args = parser.parse_args()
    folder = data_folder(parser, args.data, (WEIGHTS, PICTURES))
    check_folder("out", args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model(folder)
    draw(model).savefig(args.out / "dense.png")
    pictures, _ = load_pictures(folder)
    unpatched = features(model, pictures)
    configs = [drop + update for drop in DROPS for update in UPDATES]
    columns = ("setting", "mean", "kept", "skipped", "5th percentile", "ideal speed-up")
    rows = []
    for config in tqdm([*configs, *BEST], desc="settings"):
        cosines, kept = similarity(model, pictures, unpatched, config)
        worst = cosines.flatten().kthvalue(max(1, cosines.numel() // 20)).values
        values = (cosines.mean(), cosines[kept].mean(), cosines[~kept].mean(), worst)
        cells = [f"{float(value):.3f}" for value in values]
        rows.append([config, *cells, f"{sk.ideal_speedup(model, config):.3f}"])
    with (args.out / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    (args.out / "report.md").write_text("\n".join(page(command(folder), columns, rows)) + "\n")


def page(called: str, columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return [
        "# Dense quality: DeiT-tiny off the shelf",
        "",
        f"    {called}",
        "",
        *(f"- {name}: {value}" for name, value in machine.versions().items()),
        "",
        "Cosine similarity of the features behind the last norm with those of the unpatched model,",
        "position by position, over the patches of 1,000 pictures: of all, of those that were kept",
        "in every layer, and of those that skipped some or were merged; and what 5 % of the",
        "positions lie below.",
        *markdown(columns, rows),
        "",
        "![Similarity by position, of two photographs](dense.png)",
        "",
        "The photographs, cropped here, are `china.jpg` (by danielbuechele on Flickr) and",
        "`flower.jpg` (by vultilion on Flickr), which come with scikit-learn under CC BY 2.0.",
    ]


if __name__ == "__main__":
    main()
