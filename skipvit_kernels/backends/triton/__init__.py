"""The Triton kernels for NVIDIA and AMD GPUs, under torch's CUDA key (which serves ROCm too).

The launchers are found here under the operators' names, without autograd; they accept tensors on a
GPU, and on the CPU where Triton interprets (TRITON_INTERPRET=1 when this package is imported).
Triton itself is imported by the first launch: no CUDA context and no second of waiting before.

    rows.py     gather_rows, scatter_back and their backwards: rows that move
    topk.py     gather_topk, gather_topk_fuse and its backward: the selection
    scores.py   cls_scores
    merge.py    match_higher, match_kept, merge_rows, restore_rows: patches that merge
    launch.py   what they share: tile sizes and the launch
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from skipvit_kernels import ops


def unavailable_reason() -> str | None:
    """Why the Triton kernels do not run, or None where they do."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("triton.language")
    except Exception as error:
        return f"triton does not load: {type(error).__name__}: {error}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return None if torch.cuda.is_available() else "torch finds no CUDA or ROCm GPU"


def __getattr__(name: str) -> Any:
    """A launcher, by the operator's name: from the file of its group."""
    if name not in ops.OPERATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    launcher = getattr(importlib.import_module(f"{__name__}.{ops.OPERATORS[name]}"), name)
    globals()[name] = launcher
    return launcher


def _kernel(name: str) -> Callable[..., Any]:
    """The launcher, imported when it is first called."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        launcher = globals().get(name) or __getattr__(name)
        return launcher(*args, **kwargs)

    return kernel


def register(key: str, library: torch.library.Library = ops.LIBRARY) -> None:
    """Make the launchers the kernels of a dispatch key."""
    for name in ops.OPERATORS:
        library.impl(name, _kernel(name), key)


if importlib.util.find_spec("triton") is not None:
    register("CUDA")
