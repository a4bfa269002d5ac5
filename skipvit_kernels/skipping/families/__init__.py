"""Which family knows a model: one file each, and one row here.

A row names classes, so that nothing is imported before a model is at hand whose library has been.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from torch import nn

from skipvit_kernels.skipping.families.base import Attended as Attended
from skipvit_kernels.skipping.families.base import Context as Context
from skipvit_kernels.skipping.families.base import Family as Family
from skipvit_kernels.skipping.families.base import ViTShape as ViTShape


class Row(NamedTuple):
    """A family by its module and class, the models that it knows, and their blocks."""

    family: str
    models: tuple[str, ...]
    blocks: tuple[str, ...]


ROWS = [
    Row(
        ".vit.ViT",
        models=("timm.models.vision_transformer.VisionTransformer",),
        blocks=("timm.models.vision_transformer.Block",),
    ),
]


def of(model: nn.Module) -> type[Family]:
    """The family of a model, as `of_class`."""
    return of_class(type(model))


def of_class(kind: type) -> type[Family]:
    """The family of a class of models, or of the one that it derives from.

    Raises:
        ValueError: where there is none, naming the class.
    """
    for base in kind.__mro__:
        for row in ROWS:
            if _name(base) in row.models:
                return _load(row)
    known = " or ".join(name.rpartition(".")[2] for row in ROWS for name in row.models)
    raise ValueError(
        f"model must be a timm {known}, got {kind.__name__}: its blocks are not known to "
        "run on a subset of the tokens (patch a model before DDP or torch.compile wraps it)"
    )


def of_block(block: Any, what: str = "block") -> type[Family]:
    """The family of a block, by its very class: another forward is not known. Raises as `of`."""
    for row in ROWS:
        if _name(type(block)) in row.blocks:
            return _load(row)
    known = " or ".join(name for row in ROWS for name in row.blocks)
    raise ValueError(f"{what} must be a {known}, got {_name(type(block))}")


def _load(row: Row) -> type[Family]:
    module, _, name = row.family.rpartition(".")
    return getattr(importlib.import_module(module, __package__), name)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
