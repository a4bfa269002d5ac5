"""The AscendC kernels for the Ascend910A, under torch's PrivateUse1 key, torch_npu's `npu`.

`skipvit_kernels/_ascend.so` is built on request (docs/ascend.md). It is loaded here when torch_npu
has been imported before this package, as torch's own backend autoloading does, and else by `load()`
or the first launch. This module never imports torch_npu: without CANN that import fails.

Never compiled with bisheng, never run on an NPU.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import torch

from skipvit_kernels import ops  # before the kernels: it defines their schemas

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
    return _load_error()


@functools.cache
def _load_error() -> str | None:
    """Loads the library, once; what went wrong, or None. It registers nothing on a foreign chip."""
    try:
        torch.ops.load_library(LIBRARY)
        refusal = ctypes.CDLL(str(LIBRARY)).skipvit_ascend_refusal
    except (OSError, RuntimeError, AttributeError) as error:
        return f"skipvit_kernels/_ascend.so does not load: {error.__cause__ or error}"
    refusal.restype = ctypes.c_char_p
    refused: bytes | None = refusal()
    return None if refused is None else refused.decode()


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


def __getattr__(name: str) -> Any:
    """A launcher, by the operator's name: the operator itself, whose schema is its signature."""
    if name not in ops.OPERATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load()
    return getattr(torch.ops.skipvit, name).default
