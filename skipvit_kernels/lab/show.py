"""skipvit show: what a model does with the patches of pictures, drawn over them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from skipvit_kernels import models
from skipvit_kernels.lab import bench, report
from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.patch import patch, record_skips, unpatch
from skipvit_kernels.skipping.sequence import SkipRecord

AT_ONCE = 16  # pictures in a forward
INCHES = 2.0  # of a picture's side
LEAST = 200  # pixels of it
FORMATS = (".png", ".pdf", ".svg")


class Column(NamedTuple):
    """Pictures to be drawn below each other: (B, 3, H, W) in [0, 1], and what is said above."""

    title: str
    pictures: Tensor


def run(
    paths: Iterable[Path],
    *,
    model: str,
    configs: Sequence[str],
    weights: Sequence[Path] = (),
    pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None,
    scores: bool = False,
    device: str = "cpu",
    out: Path,
) -> None:
    """Draw the pictures, and what each drop of the model left of them, into one file.

    A column for each drop of each configuration, or with several files of weights for the last drop
    under each of them: the choice over the epochs of a training. Of an STViT, which no patch
    changes, the regions of its semantic tokens; the configurations are not used.

    Args:
        paths: of pictures, and of folders of them.
        model: a timm model's name.
        configs: in the notation of `SkipConfig`, with at least one drop each.
        weights: checkpoints of that model, patched or not; none: random weights.
        pretrained: timm's own weights instead, which it downloads.
        model_args: further options of timm's create_model: classes, sizes, depths.
        scores: a column more for each, the scores that chose.
        device: "cpu" or "cuda".
        out: the picture to write; its suffix says the format, one of FORMATS.

    Raises:
        ValueError: where a picture or a checkpoint cannot be read, naming it, there is none, or
            model and configuration do not fit.
    """
    for config in configs:
        if not SkipConfig.parse(config).drop_at:
            raise ValueError(f"config must drop patches somewhere, got {config!r}")
    if out.suffix not in FORMATS:
        raise ValueError(f"out must end in {', '.join(FORMATS)}, got {out}")
    report.check_folder("out's folder", out.parent)
    files = find_pictures(paths)
    job = bench.Job(model, tuple(configs), len(files), training=False, device=device)
    options = dict(model_args or {})
    built = bench.build(job, pretrained=pretrained, **options).eval()
    images, shown = read_pictures(files, built, options.get("img_size"))
    # Lines between regions are of a pixel, too thick for pictures of a few.
    shown = nn.functional.interpolate(shown, scale_factor=-(-LEAST // min(shown.shape[2:])))
    columns = [Column("", shown)]
    stvit = isinstance(built, models.STViT)
    for config, file in itertools.product(("",) if stvit else configs, weights or (None,)):
        if file is not None:
            load(built, file)
        lines = [config] if len(configs) > 1 and not stvit else []
        lines += [file.stem] if file is not None and len(weights) > 1 else []
        if stvit:
            owner = torch.cat([built.clusters(some.to(device)) for some in images.split(AT_ONCE)])
            title = "\n".join([*lines, f"{built.semantic_grid**2} semantic tokens"])
            columns.append(Column(title, tinted(shown, owner.cpu())))
            continue
        records = record(patch(built, config, warmup_epochs=0), images.to(device))
        unpatch(built)
        drops = range(len(records[0].indices))
        for drop in drops[-1:] if len(weights) > 1 else drops:
            title = "\n".join([*lines[::-1], _title(records[0], drop)])
            if scores:
                heat = torch.cat([r.scores(drop)[:, r.num_prefix_tokens :] for r in records])
                columns.append(Column(f"scores\n{title}", heat_map(shown, heat)))
            overlays = [overlay(*args, drop) for args in _split(shown, records)]
            columns.append(Column(title, torch.cat(overlays)))
    draw(columns).savefig(out)


def find_pictures(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths`, and those of its folders that PIL knows by their suffix, sorted."""
    known = Image.registered_extensions()
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"pictures must be files or folders, got {path}, which is not there")
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [f for f in inside if f == path or f.suffix.lower() in known]
    if not files:
        raise ValueError(
            f"pictures must be files or folders of them, got {', '.join(map(str, paths))}"
        )
    return files


def read_pictures(
    files: Iterable[Path], model: nn.Module, img_size: Any = None
) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) as the model takes them, and the same crops in [0, 1], to be drawn.

    img_size: where the model was built for another than its own.
    """
    from timm.data import create_transform, resolve_data_config

    settings = resolve_data_config({"img_size": img_size} if img_size else {}, model=model)
    transform: Any = create_transform(**settings)
    tensors = []
    for file in files:
        try:
            with Image.open(file) as opened:
                picture = opened.convert("RGB")
        except Exception as error:  # PIL's decoders have a dozen kinds
            raise ValueError(f"{file} cannot be read as a picture: {error}") from error
        tensors.append(transform(picture))
    images = torch.stack(tensors)
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("mean", "std"))
    return images, (images * std + mean).clamp(0, 1)


def load(model: nn.Module, file: Path) -> None:
    """Load a checkpoint of the model, or raise a ValueError that names it."""
    from timm.models import load_checkpoint

    if not file.exists():
        raise ValueError(f"weights must be checkpoints, got {file}, which is not there")
    try:
        load_checkpoint(model, str(file))
    except Exception as error:  # torch's and safetensors' are of a dozen kinds too
        reason = " ".join(str(error).split())  # torch gives a line for each missing key
        raise ValueError(f"{file} cannot be loaded into the model: {reason:.300}") from error


@torch.inference_mode()
def record(model: nn.Module, images: Tensor) -> list[SkipRecord]:
    """What the model kept, a record for each AT_ONCE pictures."""
    with record_skips(model) as records:
        for some in images.split(AT_ONCE):
            model(some)
    return records


def overlay(pictures: Tensor, record: SkipRecord, drop: int) -> Tensor:
    """The pictures (B, 3, H, W) with skipped patches faded, or merged ones in their mean colour."""
    prefix = record.num_prefix_tokens
    if record.owners:
        return regions(pictures, (record.owner(drop)[:, prefix:] - prefix).cpu())
    kept = _to_pixels(record.kept(drop)[:, prefix:].cpu().float(), pictures)
    return torch.lerp(torch.ones_like(pictures), pictures, 0.2 + 0.8 * kept)


def regions(pictures: Tensor, owner: Tensor) -> Tensor:
    """The pictures with the patches of each owner (B, N) in their mean colour, lines between."""
    colours = nn.functional.adaptive_avg_pool2d(pictures, _grid(owner.shape[1], pictures))
    colours = colours.flatten(2)
    where = owner[:, None].expand_as(colours)
    means = torch.zeros_like(colours).scatter_reduce(2, where, colours, "mean", include_self=False)
    return _lined(_to_pixels(means.gather(2, where), pictures), owner)


def tinted(pictures: Tensor, owner: Tensor) -> Tensor:
    """The pictures with the patches of each owner (B, N) under its colour, lines between.

    An owner's patches need not touch each other, as those of a merge mostly do: their mean colour
    would not tell that they are one.
    """
    from matplotlib.colors import hsv_to_rgb

    hues = owner * 0.618 % 1  # golden: owners of close numbers, which are neighbours, differ
    colours = hsv_to_rgb(torch.stack([hues, *2 * [torch.ones_like(hues)]], dim=2).numpy())
    tint = _to_pixels(torch.from_numpy(colours).to(pictures).transpose(1, 2), pictures)
    return _lined(torch.lerp(pictures, tint, 0.4), owner)


def _lined(pictures: Tensor, owner: Tensor) -> Tensor:
    """The pictures with a line where neighbours of the patches (B, N) have other owners."""
    owners = _to_pixels(owner[:, None].float(), pictures)
    edge = torch.zeros_like(owners, dtype=torch.bool)
    edge[..., 1:, :] |= owners[..., 1:, :] != owners[..., :-1, :]
    edge[..., :, 1:] |= owners[..., :, 1:] != owners[..., :, :-1]
    return torch.where(edge, pictures * 0.5 + 0.5, pictures)


def heat_map(pictures: Tensor, scores: Tensor) -> Tensor:
    """(B, 3, H, W): ranks of the scores (B, n) from dark to bright; grey where there is none."""
    from matplotlib import colormaps

    scores = scores.float().cpu()
    # By rank: a few patches take most of the attention, and the rest would all be dark.
    ranks = scores.nan_to_num(-torch.inf).argsort(dim=1).argsort(dim=1).float()
    missing = scores.isnan().sum(dim=1, keepdim=True)
    ranks = (ranks - missing) / (scores.shape[1] - missing - 1).clamp(min=1)
    colours = torch.from_numpy(colormaps["viridis"](ranks.clamp(0, 1).numpy())[..., :3]).float()
    colours[scores.isnan()] = 0.85
    return _to_pixels(colours.transpose(1, 2), pictures)


def draw(columns: Sequence[Column]) -> Figure:
    """The columns beside each other, their pictures in rows."""
    rows = len(columns[0].pictures)
    lines = max(column.title.count("\n") + 1 for column in columns)
    size = (INCHES * len(columns), INCHES * rows + 0.15 * (lines + 1))
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for at, column in enumerate(columns):
        for row, picture in enumerate(column.pictures):
            axes: Axes = grid[row, at]
            axes.imshow(picture.permute(1, 2, 0).numpy(), vmin=0, vmax=1)
            axes.set_axis_off()
        grid[0, at].set_title(column.title, fontsize=8)
    return figure


def _split(pictures: Tensor, records: list[SkipRecord]) -> Iterable[tuple[Tensor, SkipRecord]]:
    return zip(pictures.split(AT_ONCE), records, strict=True)


def _title(record: SkipRecord, drop: int) -> str:
    prefix = record.num_prefix_tokens
    left, patches = record.indices[drop].shape[1] - prefix, record.num_tokens - prefix
    verb = "merged to" if record.owners else "keeps"
    return f"layer {record.config.drop_at[drop]}: {verb} {left} of {patches}"


def _grid(num_patches: int, pictures: Tensor) -> tuple[int, int]:
    """Rows and columns of square patches."""
    height, width = pictures.shape[-2:]
    side = (height * width / num_patches) ** 0.5
    return round(height / side), round(width / side)


def _to_pixels(values: Tensor, pictures: Tensor) -> Tensor:
    """(B, n) or (B, X, n) of patches as (B, 1 or X, H, W)."""
    values = values[:, None] if values.dim() == 2 else values
    grid = values.unflatten(2, _grid(values.shape[2], pictures))
    return nn.functional.interpolate(grid, pictures.shape[-2:], mode="nearest")
