"""skipvit demo: train a small ViT with and without skipping on this machine, and compare.

The data is scikit-learn's handwritten digits, which come with it: 1,797 images of 8 x 8 grey
pixels. Every pixel is a patch, so that 12 blocks see 64 patches and CLS. Runs on the CPU.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from skipvit_kernels.lab import bench, info, machine, report
from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.patch import patch, record_skips
from skipvit_kernels.skipping.sequence import SkipRecord

CONFIGS = ("6(55%)+11", "6(45%)+fused", "6(55%)+12:merge")
BATCH_SIZE = 32
LEARNING_RATE = 7e-4
DEPTH, WIDTH, HEADS = 12, 64, 2
ROUNDS = 25  # of the measurement: each times one training step of every model


def run(epochs: int, out: Path, seed: int) -> None:
    """Train, measure, print one table and write the folder `out`; about two minutes.

    Args:
        epochs: of each training, at least 1.
        out: made if need be; files of earlier runs in it are replaced.
        seed: of the weights and of the order of the images; not of the split, which is fixed.

    Raises:
        ValueError: on values outside these, or a folder that cannot be written.
    """
    bench.at_least(1, epochs=epochs)
    bench.at_least(0, seed=seed)
    report.check_folder("out", out)
    console = Console()
    started = time.perf_counter()
    about = machine.versions()
    console.print(
        f"ViT of {DEPTH} blocks, {WIDTH} channels, 64 patches; "
        + ", ".join(f"{name} {about[name]}" for name in ("torch", "timm", "CPU"))
    )
    with warnings.catch_warnings():
        # Said once in a line of our own below, not by every operator into the progress bars.
        warnings.filterwarnings("ignore", message="skipvit::")
        for reason in info.missing_kernels("cpu"):
            console.print(f"without compiled kernels, so slower: {reason}", style="yellow")
        train, test = digits()
        models = _train_all(train, epochs, seed, console)
        accuracy = [_accuracy(model, test) for model in models.values()]
        records = {config: _record(models[config], test.tensors[0]) for config in CONFIGS}
        with console.status("measuring"):
            rows = _measure(models["unpatched"])
    more = {"top-1": [f"{share:.1%}" for share in accuracy]}
    console.print(report.table("Training steps on this machine", rows, more))
    noise = statistics.median(rows[0].seconds) / min(rows[0].seconds)
    if noise > 1.15:
        console.print(
            "The machine was busy with other things: half of the unpatched model's steps took "
            f"{noise:.1f} times the shortest or more. Expect other numbers next time.",
            style="yellow",
        )
    figures = [
        row.record() | {"tokens": _tokens(row.config), "accuracy": share}
        for row, share in zip(rows, accuracy, strict=True)
    ]
    # All files or none: each is finished beside `out` before the first is moved into it.
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as unfinished:
        folder = Path(unfinished)
        report.write_csv(folder / "results.csv", figures)
        _chart(rows, accuracy).savefig(folder / "results.png")
        _skip_picture(test, records).savefig(folder / "skipped.png")
        for path in folder.iterdir():
            path.replace(out / path.name)
    console.print(f"{time.perf_counter() - started:.0f} s; table and pictures in {out}")


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,437 images to train on and 360 to test on, whatever the seed.

    (B, 1, 8, 8) float32 in [-1, 1], and (B,) int64 labels.
    """
    data = load_digits()
    images = data.images[:, None].astype("float32") / 8 - 1
    parts = train_test_split(
        images, data.target, test_size=360, random_state=0, stratify=data.target
    )
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return TensorDataset(train_images, train_labels), TensorDataset(test_images, test_labels)


def build_model(seed: int) -> VisionTransformer:
    """A ViT of 12 blocks, 64 channels and 64 patches; the same weights for the same seed.

    timm's initial weights are meant for much wider models and long training: with them a model this
    small does not begin to learn in ten epochs. "jax" scales the linear maps by their width, the
    positions start as large as the pixels, and a patch is embedded with its neighbours.
    """
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=8, patch_size=1, in_chans=1, num_classes=10,
        embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, weight_init="jax",
    )  # fmt: skip
    model.patch_embed.proj = nn.Conv2d(1, WIDTH, kernel_size=5, padding=2)
    for learned in (model.pos_embed, model.cls_token):
        assert learned is not None
        nn.init.normal_(learned, std=0.5)
    return model


def _train_all(
    data: TensorDataset, epochs: int, seed: int, console: Console
) -> dict[str, nn.Module]:
    """The models, each from the same weights over the same batches."""
    models: dict[str, nn.Module] = {}
    columns = (BarColumn(), TimeElapsedColumn(), "{task.percentage:3.0f} % {task.fields[loss]}")
    with Progress("{task.description:36}", *columns, console=console) as progress:
        for name in ("unpatched", *CONFIGS):
            model: nn.Module = build_model(seed)
            if name in CONFIGS:
                patch(model, name)
            steps = epochs * (len(data) // BATCH_SIZE)
            task = progress.add_task(f"{name}: {_tokens(name)} tokens", total=steps, loss="")
            for loss in _train(model, data, epochs, seed):
                progress.update(task, advance=1, loss=f"loss {loss:.2f}")
            models[name] = model.eval()
    return models


def _train(model: nn.Module, data: TensorDataset, epochs: int, seed: int) -> Iterator[float]:
    """AdamW with a warm-up and a cosine; yields the loss of every step."""
    order = torch.Generator().manual_seed(seed)
    batches = DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True, generator=order)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, epochs=epochs, steps_per_epoch=len(batches), pct_start=0.1
    )
    model.train()
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            yield loss.item()


def _measure(model: nn.Module) -> list[bench.Measurement]:
    """Training steps of the trained model, unpatched and with CONFIGS: those take equal times."""
    rows: list[bench.Measurement] = []
    job = bench.Job("small ViT", CONFIGS, BATCH_SIZE, training=True, rounds=ROUNDS)
    bench.run(job, rows, model=model.train())
    return report.without_floors(rows)


@torch.inference_mode()
def _accuracy(model: nn.Module, test: TensorDataset) -> float:
    images, labels = test.tensors
    return (model(images).argmax(dim=1) == labels).float().mean().item()


@torch.inference_mode()
def _record(model: nn.Module, images: Tensor) -> SkipRecord:
    """What the model kept of the images."""
    with record_skips(model) as records:
        model(images)
    return records[0]


def _tokens(name: str) -> str:
    """What the MLPs see, by the number of blocks: "65x5, 30x5, 65x2"."""
    config = SkipConfig.parse(name if name in CONFIGS else "")
    counts = [block.mlp for block in config.token_counts(DEPTH, num_patches=64)]
    return ", ".join(f"{count}x{len(list(run))}" for count, run in itertools.groupby(counts))


def _chart(rows: Sequence[bench.Measurement], accuracy: Sequence[float]) -> Figure:
    """Left the speed-up of a training step beside floor and ideal, right the accuracy."""
    figure = Figure(figsize=(9, 2.6), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 3))
    report.draw_speedups(left, "speed-up of a training step", rows)
    percent = [100 * share for share in accuracy]
    report.draw_bars(right, "test accuracy (%)", [row.config for row in rows], percent, "%.1f")
    report.add_legend(figure, left)
    return figure


def _skip_picture(test: TensorDataset, records: dict[str, SkipRecord]) -> Figure:
    """Eight test images, one a column: as they are, and what became of their patches."""
    images, labels = test.tensors
    shown = [int((labels == label).nonzero()[0]) for label in range(8)]
    ink = (images[shown, 0] + 1) / 2
    original = (1 - ink)[..., None].expand(-1, -1, -1, 3)
    tint = torch.tensor([int(report.ORANGE[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    pictures = {"image": original}
    for config, record in records.items():
        kept = record.kept()[shown, 1:].unflatten(1, (8, 8))
        marked = torch.where(kept[..., None], original, 0.3 * original + 0.7 * tint)
        if record.owners:  # each in the mean colour of those that it went with
            owner, colours = (
                record.owner()[shown, 1:, None].expand(-1, -1, 3),
                original.flatten(1, 2),
            )
            means = torch.zeros(len(shown), record.num_tokens, 3)
            means = means.scatter_reduce(1, owner, colours, "mean", include_self=False)
            marked = means.gather(1, owner).unflatten(1, (8, 8))
        verb = "merges to" if record.owners else "keeps"
        pictures[f"{config}\n{verb} {int(kept[0].sum())} of 64"] = marked
    figure = Figure(figsize=(9, 4.6), dpi=200, layout="constrained")
    grid: Any = figure.subplots(len(pictures), len(shown))
    for row, (label, picture) in zip(grid, pictures.items(), strict=True):
        for axes, image in zip(row, picture, strict=True):
            axes.imshow(image.numpy(), vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11)
    figure.supxlabel(
        "orange: skipped patches (one pixel each); merged ones in their mean colour", fontsize=11
    )
    return figure
