"""The C++ kernels: importing `skipvit_kernels._C` registers them under torch's CPU key.

The launchers are the operators themselves, whose schemas are the public signatures: without
autograd and with the checks of C++ alone. They refuse to run where the library is missing: a caller
of this module wants these kernels and not the plain PyTorch that torch's dispatcher would fall back
to.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from skipvit_kernels import ops  # before the kernels: it defines their schemas

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


def __getattr__(name: str) -> Any:
    """A launcher, by the operator's name."""
    if name not in ops.OPERATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _require()
    return getattr(torch.ops.skipvit, name).default
