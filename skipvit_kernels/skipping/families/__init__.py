"""Which family knows a model: one file each, and one row here.

A row names classes, so that nothing is imported before a model is at hand whose library has been.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from torch import nn

from skipvit_kernels.skipping.families import refused
from skipvit_kernels.skipping.families.base import Attended as Attended
from skipvit_kernels.skipping.families.base import Context as Context
from skipvit_kernels.skipping.families.base import Family as Family
from skipvit_kernels.skipping.families.base import Inside as Inside
from skipvit_kernels.skipping.families.base import ViTShape as ViTShape
from skipvit_kernels.skipping.families.base import as_called as as_called
from skipvit_kernels.skipping.families.base import check_hooks as check_hooks
from skipvit_kernels.skipping.families.base import class_name


class Row(NamedTuple):
    """A family by its module and class, the models that it knows, and their blocks."""

    family: str
    models: tuple[str, ...]
    blocks: tuple[str, ...]


_VIT = "timm.models.vision_transformer."
_EVA = "timm.models.eva."
_RELPOS = "timm.models.vision_transformer_relpos."
_QWEN = "timm.models.qwen3_vit.Qwen3Vit"
_DEEPSEEK = "timm.models.deepseek_vit.DeepseekVit"
_GEMMA = "timm.models.gemma4_vit.Gemma4"

ROWS = [
    Row(
        ".vit.ViT",
        models=(f"{_VIT}VisionTransformer", "timm.models.deit.VisionTransformerDistilled"),
        blocks=(f"{_VIT}Block",),
    ),
    Row(".vit.PostNorm", models=(), blocks=(f"{_VIT}ResPostBlock",)),
    Row(".vit.Twofold", models=(), blocks=(f"{_VIT}ParallelThingsBlock",)),
    Row(
        ".vit.SideBySide",
        models=(),
        blocks=(f"{_VIT}ParallelScalingBlock", f"{_VIT}DiffParallelScalingBlock"),
    ),
    Row(".eva.Eva", models=(f"{_EVA}Eva",), blocks=(f"{_EVA}EvaBlock",)),
    Row(".eva.PostNorm", models=(), blocks=(f"{_EVA}EvaBlockPostNorm",)),
    Row(".eva.Unmasked", models=(), blocks=(f"{_DEEPSEEK}Block",)),
    Row(".relative.Beit", ("timm.models.beit.Beit",), ("timm.models.beit.Block",)),
    Row(".relative.RelPos", (f"{_RELPOS}VisionTransformerRelPos",), (f"{_RELPOS}RelPosBlock",)),
    Row(".relative.RelPosPostNorm", models=(), blocks=(f"{_RELPOS}ResPostRelPosBlock",)),
    Row(".naflex.NaFlex", models=("timm.models.naflexvit.NaFlexVit",), blocks=()),
    Row(
        ".encoders.Encoder",
        models=tuple(
            f"{name}{kind}" for name in (_QWEN, _DEEPSEEK) for kind in ("Encoder", "Classifier")
        ),
        blocks=(),
    ),
    Row(
        ".gemma.Gemma4",
        models=(f"{_GEMMA}VitEncoder", f"{_GEMMA}VitClassifier"),
        blocks=(f"{_GEMMA}Block",),
    ),
]


def of(model: nn.Module) -> type[Family]:
    """The family of a model, as `of_class`."""
    return of_class(type(model))


def of_class(kind: type) -> type[Family]:
    """The family of a class of models, or of the one that it derives from.

    Raises:
        ValueError: where there is none, or a subclass has a forward of its own, naming the class.
    """
    reason = None
    for place, base in enumerate(kind.__mro__):
        if reason := refused.reason(base):
            break
        for row in ROWS:
            if class_name(base) in row.models:
                _check_overrides(kind, kind.__mro__[:place], base)
                return _load(row)
    known = ", ".join(name.rpartition(".")[2] for row in ROWS for name in row.models)
    raise ValueError(
        f"model must be a timm {known}, got {kind.__name__}: "
        + (reason or "its blocks are not known to run on a subset of the tokens")
        + ("" if reason else " (patch a model before DDP or torch.compile wraps it)")
    )


def of_block(block: Any, what: str = "block") -> type[Family]:
    """The family of a block, by its very class: another forward is not known. Raises as `of`."""
    for row in ROWS:
        if class_name(type(block)) in row.blocks:
            return _load(row)
    known = ", ".join(name.removeprefix("timm.models.") for row in ROWS for name in row.blocks)
    raise ValueError(f"{what} must be one of timm's {known}, got {class_name(type(block))}")


def _check_overrides(kind: type, derived: tuple[type, ...], base: type) -> None:
    """A class between the model's and the known one must leave the way through the blocks alone."""
    for each in derived:
        own = {"forward", "forward_features"} & vars(each).keys()
        if own and not each.__module__.startswith(__package__.rpartition(".")[0]):
            raise ValueError(
                f"model must run its blocks as {base.__name__} does, got {kind.__name__}, whose "
                f"{each.__name__} overrides {' and '.join(sorted(own))}: wrap runs of its blocks "
                "in SkipBlock where it calls them"
            )


def _load(row: Row) -> type[Family]:
    module, _, name = row.family.rpartition(".")
    return getattr(importlib.import_module(module, __package__), name)
