"""The cells of the study of Table 1: what is trained, at which scale, from which seed."""

from __future__ import annotations

import dataclasses
from typing import Any

SEEDS = 3
PARTS = 20  # of a training: what `set_epoch` counts in it, so that a part is 5 % of the epochs
WARMUP = 1  # parts without skipping; the paper's 15 epochs, were there 300 of them

SKIPPED = (
    *("4,7(30%,30%)+10", "4,7(30%,30%)+11", "5,8(35%,35%)+10", "5,8(35%,35%)+11"),
    *("6(45%)+11", "6(50%)+11", "6(55%)+11"),
)
# The same tokens in every block as `6(55%)+11` has, chosen or brought back otherwise.
CHANCE, MEAN, MERGE = (f"6(55%)+11:{word}" for word in ("score=random", "mean", "merge"))
STVIT = "STViT"
NEVER, FUSED, EVIT = "6(55%)", "6(45%)+fused", "4,7,10(30%,30%,30%)+fused"


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model trains.

    Attributes:
        skip: in SkipConfig's notation; or "STViT": that model, of the same depths and widths, which
            has no warm-up.
        warmup: parts before it skips.
        as_long: on as many more pictures as its steps are faster by the arithmetic: as long as the
            unpatched model trains.
    """

    skip: str
    warmup: int = WARMUP
    as_long: bool = False

    def __str__(self) -> str:
        warmup = "" if not self.patched or self.warmup == WARMUP else f", warm-up {self.warmup}"
        return (self.skip or "unpatched") + warmup + (", as long" if self.as_long else "")

    @property
    def patched(self) -> bool:
        return self.skip not in ("", STVIT)

    @property
    def key(self) -> tuple[str, ...]:
        """Its columns of cells.csv."""
        return self.skip, str(self.warmup if self.patched else 0), str(int(self.as_long))


TELLING = tuple(map(Training, ("", "6(55%)+11", CHANCE, MERGE, NEVER)))
# The systems beside each other, on as many pictures and for as long.
SYSTEMS = (
    *(Training(skip) for skip in (EVIT, STVIT)),
    *(Training(skip, as_long=True) for skip in ("6(55%)+11", EVIT, MERGE, STVIT)),
)
ROWS = (
    *(Training(skip) for skip in (*SKIPPED[:-1], FUSED, MEAN)),
    *(Training("6(55%)+11", warmup) for warmup in (0, 3)),
)
# Of which little is expected beyond `CHANCE` and the above: trained after everything else.
LATER = (
    *(Training(f"{skip}:score=random") for skip in SKIPPED[:-1]),
    *(Training(SKIPPED[0], warmup) for warmup in (0, 3)),
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """A model of 12 blocks, its data, and how long it trains.

    Attributes:
        name: in the tables.
        data: "fashion": Fashion-MNIST, 28 x 28 grey; "imagenette": ten classes of ImageNet at
            128 x 128.
        patch: side of a patch, pixels.
        width, heads: of the model.
        images: that a training sees, in passes over the training set.
        trainings: at this scale, each from SEEDS seeds.
        batch, lr: of a step of AdamW.
        augment: whether pictures are shifted and mirrored: where they are seen many times.
    """

    name: str
    data: str
    patch: int
    width: int
    heads: int
    images: int
    trainings: tuple[Training, ...]
    batch: int = 32
    lr: float = 2e-3
    augment: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Channels and side of a picture."""
        return (1, 28) if self.data == "fashion" else (3, 128)


CPU = (
    Scale("49 tokens", "fashion", 4, 48, 3, 24_000, TELLING + SYSTEMS + ROWS + LATER),
    Scale("196 tokens", "fashion", 2, 48, 3, 12_000, TELLING),
    Scale("49 tokens, twice as wide", "fashion", 4, 96, 6, 24_000, TELLING),
)
_EPOCHS = 100 * 9_469
_GPU: dict[str, Any] = {"batch": 128, "lr": 5e-4, "augment": True}
GPU = (
    Scale("256 tokens", "imagenette", 8, 384, 6, _EPOCHS, TELLING + SYSTEMS + ROWS + LATER, **_GPU),
    Scale("256 tokens, half as wide", "imagenette", 8, 192, 3, _EPOCHS, TELLING, **_GPU),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training."""

    scale: Scale
    training: Training
    seed: int

    def __str__(self) -> str:
        return f"{self.scale.name}; {self.training}; seed {self.seed}"


def cells(scales: tuple[Scale, ...]) -> list[Cell]:
    """All, in the order in which they are trained: what the study needs most comes first."""
    every = [
        Cell(scale, training, seed)
        for scale in scales
        for training in scale.trainings
        for seed in range(SEEDS)
    ]
    return sorted(every, key=lambda cell: cell.training in LATER)
