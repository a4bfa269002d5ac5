"""The C++ kernels: importing `skipvit_kernels._C` registers them under torch's CPU key.

The launchers are the operators of that key, without autograd and with the checks of C++ alone. They
refuse to run where the library is missing: a caller of this module wants these kernels and not the
plain PyTorch that torch's dispatcher would fall back to.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from skipvit_kernels import ops as _schemas  # noqa: F401  (before the kernels)

skipvit = torch.ops.skipvit

load_error: ImportError | None = None
try:
    _C = importlib.import_module("skipvit_kernels._C")
except ImportError as error:
    load_error = error


def unavailable_reason() -> str | None:
    """Why the C++ kernels do not run, or None where they do."""
    if load_error is None:
        return None
    if isinstance(load_error, ModuleNotFoundError):
        return "skipvit_kernels was installed without its C++ kernels (skipvit_kernels._C)"
    return f"skipvit_kernels._C does not load: {load_error}"


def build_info() -> dict[str, str]:
    """Version, compiler, the instruction sets compiled in and the one in use."""
    _require()
    return _C.build_info()


def _require() -> None:
    if load_error is not None:
        raise RuntimeError(f"no CPU kernel: {unavailable_reason()}") from load_error


def cls_scores(
    q: Tensor, k: Tensor, *, scale: float | None = None, num_prefix_tokens: int = 1
) -> Tensor:
    _require()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return skipvit.cls_scores.default(q, k, scale, num_prefix_tokens)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    _require()
    return skipvit.gather_rows.default(x, index)


def gather_rows_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    _require()
    return skipvit.gather_rows_backward.default(grad, index, num_tokens)


def gather_topk(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    _require()
    return skipvit.gather_topk.default(x, scores, num_keep, num_prefix_tokens)


def gather_topk_fuse(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    _require()
    return skipvit.gather_topk_fuse.default(x, scores, num_keep, num_prefix_tokens)


def gather_topk_fuse_backward(
    grad: Tensor, x: Tensor, scores: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    _require()
    return skipvit.gather_topk_fuse_backward.default(grad, x, scores, index)


def scatter_back(
    x: Tensor, tokens: Tensor, index: Tensor, *, update: Tensor | None = None
) -> Tensor:
    _require()
    return skipvit.scatter_back.default(x, tokens, index, update)


def scatter_back_backward(
    grad: Tensor, index: Tensor, has_update: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _require()
    return skipvit.scatter_back_backward.default(grad, index, has_update)
