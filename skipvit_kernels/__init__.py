"""Skip the patches that do not matter: SkipViT as fused kernels for vision transformers.

    import skipvit_kernels as sk
    model = timm.create_model("vit_small_patch16_224")
    sk.patch(model, "6(55%)+11", warmup_epochs=15)

The operators `cls_scores`, `gather_topk`, `gather_topk_fuse`, `gather_rows`, `scatter_back`,
`match_higher`, `match_kept`, `merge_rows` and `restore_rows` need torch alone; `patch` and what
goes with it need timm.
"""

import importlib
from typing import Any

from skipvit_kernels import backends as _backends  # noqa: F401  (registers the kernels)
from skipvit_kernels.ops import (
    cls_scores,
    gather_rows,
    gather_topk,
    gather_topk_fuse,
    match_higher,
    match_kept,
    merge_rows,
    restore_rows,
    scatter_back,
)
from skipvit_kernels.ops.library import reference_operators
from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.cost import ViTShape, activations, ideal_speedup, macs
from skipvit_kernels.skipping.patch import (
    is_patched,
    keep_patches,
    patch,
    record_skips,
    set_epoch,
    unpatch,
)
from skipvit_kernels.skipping.run import SkipBlock
from skipvit_kernels.skipping.sequence import SkipRecord
from skipvit_kernels.skipping.verify import VerifyReport, verify

__all__ = [
    "Advice",
    "SkipBlock",
    "SkipConfig",
    "SkipRecord",
    "VerifyReport",
    "ViTShape",
    "activations",
    "advise",
    "cls_scores",
    "gather_rows",
    "gather_topk",
    "gather_topk_fuse",
    "ideal_speedup",
    "is_patched",
    "keep_patches",
    "macs",
    "match_higher",
    "match_kept",
    "merge_rows",
    "patch",
    "record_skips",
    "reference_operators",
    "restore_rows",
    "scatter_back",
    "set_epoch",
    "unpatch",
    "verify",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Advice measures: who wants an operator alone loads no clock and no profiler."""
    if name not in ("Advice", "advise"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("skipvit_kernels.lab.advise"), name)
