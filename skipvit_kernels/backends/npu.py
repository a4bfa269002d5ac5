"""The AscendC kernels for the Ascend910A, under torch's PrivateUse1 key, torch_npu's `npu`.

`skipvit_kernels/_ascend.so` is built on request (docs/ascend.md). It is loaded here when torch_npu
has been imported before this package, as torch's own backend autoloading does, and else by `load()`
or the first launch. This module never imports torch_npu: without CANN that import fails.

Never compiled with bisheng, never run on an NPU.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

from skipvit_kernels import ops as _schemas  # noqa: F401  (before the kernels)

skipvit = torch.ops.skipvit

LIBRARY = Path(__file__).parents[1] / "_ascend.so"


def unavailable_reason() -> str | None:
    """Why the AscendC kernels do not run, or None where they do."""
    if not LIBRARY.exists():
        return (
            "skipvit_kernels was installed without its Ascend kernels "
            "(skipvit_kernels/_ascend.so): build it with SKIPVIT_BUILD_ASCEND=1, see docs/ascend.md"
        )
    if "torch_npu" not in sys.modules:
        return "torch_npu is not imported: import it before skipvit_kernels"
    error = _load_error()
    return None if error is None else f"skipvit_kernels/_ascend.so does not load: {error}"


@functools.cache
def _load_error() -> str | None:
    """Loads the library, once; what went wrong, or None."""
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:
        return str(error.__cause__ or error)
    return None


def load() -> None:
    """Register the kernels, where torch_npu was imported after this package.

    Raises:
        RuntimeError: where they cannot run, saying why.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"no Ascend kernel: {reason}")


if "torch_npu" in sys.modules and LIBRARY.exists():
    _load_error()


def cls_scores(
    q: Tensor, k: Tensor, *, scale: float | None = None, num_prefix_tokens: int = 1
) -> Tensor:
    load()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return skipvit.cls_scores.default(q, k, scale, num_prefix_tokens)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    load()
    return skipvit.gather_rows.default(x, index)


def gather_rows_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    load()
    return skipvit.gather_rows_backward.default(grad, index, num_tokens)


def gather_topk(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    load()
    return skipvit.gather_topk.default(x, scores, num_keep, num_prefix_tokens)


def gather_topk_fuse(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    load()
    return skipvit.gather_topk_fuse.default(x, scores, num_keep, num_prefix_tokens)


def gather_topk_fuse_backward(
    grad: Tensor, x: Tensor, scores: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    load()
    return skipvit.gather_topk_fuse_backward.default(grad, x, scores, index)


def scatter_back(
    x: Tensor, tokens: Tensor, index: Tensor, *, update: Tensor | None = None
) -> Tensor:
    load()
    return skipvit.scatter_back.default(x, tokens, index, update)


def scatter_back_backward(
    grad: Tensor, index: Tensor, has_update: bool
) -> tuple[Tensor, Tensor, Tensor]:
    load()
    return skipvit.scatter_back_backward.default(grad, index, has_update)
