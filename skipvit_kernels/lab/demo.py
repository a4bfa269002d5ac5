"""skipvit demo: train a small ViT with and without skipping on this machine, and compare.

The data is scikit-learn's handwritten digits, which come with it: 1,797 images of 8 x 8 grey
pixels. Every pixel is a patch, so that 12 blocks see 64 patches and CLS. Runs on the CPU.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from skipvit_kernels.lab import clock, info
from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.cost import ideal_speedup
from skipvit_kernels.skipping.floor import sliced
from skipvit_kernels.skipping.patch import patch, record_skips

SETTINGS = {"baseline": "", "skip": "6(55%)+11", "fused": "6(45%)+fused"}
BATCH_SIZE = 32
LEARNING_RATE = 7e-4
DEPTH, WIDTH, HEADS = 12, 64, 2
ROUNDS = 25  # of the measurement: each times one training step of every model

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#999999"


@dataclasses.dataclass(frozen=True)
class Options:
    """Of `run`.

    Attributes:
        epochs: of each training, at least 1.
        out: folder to write; made if need be, files of earlier runs in it are replaced.
        threads: of the CPU, at least 1; None: torch's choice.
        seed: of the weights and of the order of the images; not of the split, which is fixed.

    Raises:
        ValueError: on values outside these, or a folder that cannot be written.
    """

    epochs: int
    out: Path
    threads: int | None
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("threads", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        existing = self.out.absolute()
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(f"out must be a folder that can be written, got {self.out}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one of `SETTINGS` came to; the ratios are of training steps.

    Attributes:
        name: "baseline", "skip" or "fused".
        config: its notation; "" drops nothing.
        tokens: per block, as many as its MLP sees: "65x5, 30x5, 65x2".
        images_per_second: of the shortest training step.
        speedup: over the baseline; median over the rounds, which a busy machine disturbs least.
        shortest_speedup: the same of the shortest steps.
        ideal_speedup: what the arithmetic alone allows.
        overhead: routing overhead: time over that of the sliced floor, less 1; median over the
            rounds. None for the baseline.
        shortest_overhead: the same of the shortest steps.
        peak_memory: bytes that a training step holds at most, beyond weights and optimizer.
        accuracy: share of the test images that the trained model gets right.
    """

    name: str
    config: str
    tokens: str
    images_per_second: float
    speedup: float
    shortest_speedup: float
    ideal_speedup: float
    overhead: float | None
    shortest_overhead: float | None
    peak_memory: int
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Digits:
    """(B, 1, 8, 8) float32 images in [-1, 1] and (B,) int64 labels."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls) -> Digits:
        """The same split whatever the seed: 1,437 to train on, 360 to test on."""
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
        labels = torch.tensor(data.target)
        train, test = train_test_split(
            torch.arange(len(labels)).numpy(), test_size=360, random_state=0, stratify=data.target
        )
        return cls(images[train], labels[train], images[test], labels[test])


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


def run(options: Options) -> list[Outcome]:
    """Train, measure, print one table and write `options.out`; about two minutes.

    Returns:
        The table's rows: baseline, skip, fused.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console()
    started = time.perf_counter()
    console.print(
        f"ViT of {DEPTH} blocks, {WIDTH} channels, 64 patches, batch {BATCH_SIZE}; "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}, "
        f"timm {timm.__version__}"
    )
    with warnings.catch_warnings():
        # Said once in a line of our own below, not by every operator into the progress bars.
        warnings.filterwarnings("ignore", message="skipvit::")
        for reason in info.missing_kernels("cpu"):
            console.print(f"without compiled kernels, so slower: {reason}", style="yellow")
        digits = Digits.load()
        models = _train_all(digits, options, console)
        with console.status("measuring"):
            rows, noise = _measure(models, digits)
        kept = {name: _kept(models[name], digits.test_images) for name in ("skip", "fused")}
    console.print(_rich_table(rows))
    if noise > 1.15:
        console.print(
            "The machine was busy with other things: half of the baseline's steps took "
            f"{noise:.1f} times the shortest or more. Expect other numbers next time.",
            style="yellow",
        )
    _write(options.out, rows, digits, kept)
    console.print(f"{time.perf_counter() - started:.0f} s; table and pictures in {options.out}")
    return rows


def _train_all(digits: Digits, options: Options, console: Console) -> dict[str, nn.Module]:
    """The three models, each from the same weights over the same batches."""
    models: dict[str, nn.Module] = {}
    columns = (
        TextColumn("{task.description:22}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(), TextColumn("{task.fields[loss]}"),
    )  # fmt: skip
    steps = options.epochs * (len(digits.train_labels) // BATCH_SIZE)
    with Progress(*columns, console=console) as progress:
        for name, config in SETTINGS.items():
            model = build_model(options.seed)
            if config:
                patch(model, config)
            task = progress.add_task(f"train {name} {config}".strip(), total=steps, loss="")
            for loss in _train(model, digits, options.epochs, options.seed):
                progress.update(task, advance=1, loss=f"loss {loss:.2f}")
            models[name] = model.eval()
    return models


def _train(model: nn.Module, digits: Digits, epochs: int, seed: int) -> Iterator[float]:
    """AdamW with a warm-up and a cosine; yields the loss of every step."""
    order = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model)
    steps = epochs * (len(digits.train_labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    model.train()
    for _ in range(epochs):
        shuffled = torch.randperm(len(digits.train_labels), generator=order)
        for batch in shuffled.split(BATCH_SIZE):
            if len(batch) < BATCH_SIZE:
                continue
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                model(digits.train_images[batch]), digits.train_labels[batch]
            )
            loss.backward()
            optimizer.step()
            schedule.step()
            yield loss.item()


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )


def _measure(models: dict[str, nn.Module], digits: Digits) -> tuple[list[Outcome], float]:
    """Accuracy first, of the models as trained; then the time of training steps, on copies.

    Also returns the baseline's median step over its shortest: 1 on a quiet machine.
    """
    accuracy = {name: _accuracy(model, digits) for name, model in models.items()}
    copies = {name: copy.deepcopy(model) for name, model in models.items()}
    copies |= {
        f"sliced {name}": sliced(copy.deepcopy(models[name]), config)
        for name, config in SETTINGS.items()
        if config
    }
    images, labels = digits.train_images[:BATCH_SIZE], digits.train_labels[:BATCH_SIZE]
    steps = {
        name: clock.training_step(model.train(), images, labels, _optimizer(model))
        for name, model in copies.items()
    }
    times = clock.interleave(steps, rounds=ROUNDS)
    rows = []
    for name, text in SETTINGS.items():
        config = SkipConfig.parse(text)
        floor = f"sliced {name}"
        rows.append(
            Outcome(
                name=name,
                config=text,
                tokens=_compact([c.mlp for c in config.token_counts(DEPTH, num_patches=64)]),
                images_per_second=BATCH_SIZE / times.best(name),
                speedup=times.paired_ratio("baseline", name),
                shortest_speedup=times.ratio("baseline", name),
                ideal_speedup=ideal_speedup(models[name], config),
                overhead=times.paired_ratio(name, floor) - 1 if text else None,
                shortest_overhead=times.ratio(name, floor) - 1 if text else None,
                peak_memory=clock.peak_memory(steps[name]),
                accuracy=accuracy[name],
            )
        )
    return rows, statistics.median(times.seconds["baseline"]) / times.best("baseline")


@torch.inference_mode()
def _accuracy(model: nn.Module, digits: Digits) -> float:
    right = model(digits.test_images).argmax(dim=1) == digits.test_labels
    return right.float().mean().item()


@torch.inference_mode()
def _kept(model: nn.Module, images: Tensor) -> Tensor:
    """(B, 8, 8) bool: the patches that the model kept."""
    with record_skips(model) as records:
        model(images)
    return records[0].kept()[:, 1:].unflatten(1, (8, 8))


def _compact(counts: list[int]) -> str:
    """[65, 65, 30] -> "65x2, 30x1"."""
    return ", ".join(f"{count}x{len(list(run))}" for count, run in itertools.groupby(counts))


def _rich_table(rows: list[Outcome]) -> Table:
    """Fits a terminal of 80 columns."""
    table = Table(title="Training steps on this machine", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("setting", no_wrap=True)
    table.add_column("tokens\nper block", min_width=11)
    for heading in ("images\n/s", "speed-\nup", "ideal", "routing\noverhead", "peak\nmemory",
                    "test\naccuracy"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.config or row.name, row.tokens, f"{row.images_per_second:.0f}",
            f"{row.speedup:.2f}x", f"{row.ideal_speedup:.2f}x",
            "" if row.overhead is None else f"{row.overhead:+.1%}",
            f"{row.peak_memory / 2**20:.0f} MiB", f"{row.accuracy:.1%}",
        )  # fmt: skip
    return table


def _write(out: Path, rows: list[Outcome], digits: Digits, kept: dict[str, Tensor]) -> None:
    """All files or none: each is finished beside `out` before the first is moved into it."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as unfinished:
        folder = Path(unfinished)
        with (folder / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Outcome)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in rows)
        _chart(rows).savefig(folder / "results.png")
        _skip_picture(digits, kept).savefig(folder / "skipped.png")
        for path in folder.iterdir():
            path.replace(out / path.name)


def _chart(rows: list[Outcome]) -> Figure:
    """Left the speed-up of a training step beside the ideal, right the accuracy."""
    figure = Figure(figsize=(9, 3.4), dpi=200, layout="constrained")
    speed, accuracy = figure.subplots(1, 2, width_ratios=(4, 3))
    names = [f"{row.name}\n{row.config}" for row in rows]
    places = range(len(rows))
    measured = speed.bar(
        [p - 0.2 for p in places], [row.speedup for row in rows], 0.38, color=BLUE, label="measured"
    )
    ideal = speed.bar(
        [p + 0.2 for p in places],
        [row.ideal_speedup for row in rows],
        0.38,
        color=ORANGE,
        hatch="//",
        edgecolor="white",
        label="ideal",
    )
    for bars in (measured, ideal):
        speed.bar_label(bars, fmt="%.2f", padding=2)
    speed.axhline(1, color=GREY, linewidth=1)
    speed.set_ylabel("speed-up of a training step")
    speed.set_ylim(0, 1.25 * max(max(row.speedup, row.ideal_speedup) for row in rows))
    speed.legend(loc="upper left", ncols=2, frameon=False)
    bars = accuracy.bar(places, [100 * row.accuracy for row in rows], 0.6, color=BLUE)
    accuracy.bar_label(bars, fmt="%.1f", padding=2)
    accuracy.set_ylabel("test accuracy (%)")
    accuracy.set_ylim(0, 115)
    accuracy.set_yticks(range(0, 101, 20))
    for axes in (speed, accuracy):
        axes.set_xticks(places, names)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _skip_picture(digits: Digits, kept: dict[str, Tensor]) -> Figure:
    """Eight test images, one a column: as they are, and with the skipped patches marked."""
    shown = [int((digits.test_labels == label).nonzero()[0]) for label in range(8)]
    figure = Figure(figsize=(9, 3.6), dpi=200, layout="constrained")
    grid = figure.subplots(1 + len(kept), len(shown))
    ink = (digits.test_images[:, 0] + 1) / 2
    original = (1 - ink)[..., None].expand(-1, -1, -1, 3)
    tint = torch.tensor([int(ORANGE[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    _image_row(grid[0], "image", original[shown])
    for axes, (name, mask) in zip(grid[1:], kept.items(), strict=True):
        dimmed = torch.where(mask[..., None], original, 0.3 * original + 0.7 * tint)
        share = f"{int(mask[0].sum())} of 64"
        _image_row(axes, f"{name}\n{SETTINGS[name]}\nkeeps {share}", dimmed[shown])
    figure.supxlabel("orange: skipped patches (one pixel each)", fontsize=11)
    return figure


def _image_row(row: list[Axes], label: str, images: Tensor) -> None:
    for axes, image in zip(row, images, strict=True):
        axes.imshow(image.numpy(), vmin=0, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([])
    row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11)
