"""The C++ kernels: importing `skipvit_kernels._C` registers them under torch's CPU key.

The launchers are the operators themselves, whose schemas are the public signatures: without
autograd and with the checks of C++ alone. They refuse to run where the library is missing: a caller
of this module wants these kernels and not the plain PyTorch that torch's dispatcher would fall back
to.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path
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
    if not isinstance(load_error, ModuleNotFoundError):
        return f"skipvit_kernels._C does not load: {load_error}"
    package = Path(__file__).parents[1]
    checkout = package.parent
    is_checkout = (checkout / "setup.py").exists() and (checkout / "csrc").exists()
    if not is_checkout or _find_library([package]):  # a built one is only kept from loading
        return "skipvit_kernels was installed without its C++ kernels (skipvit_kernels._C)"
    reason = f"Python imported the sources in {package}, where skipvit_kernels._C was not built"
    build = f"run `SKIPVIT_BUILD_CPP=1 pip install --no-build-isolation -e .` in {checkout}"
    installed = _find_library([Path(entry, package.name) for entry in sys.path])
    if installed is None:
        return f"{reason}: {build}"
    return (
        f"{reason}, though an installed copy has it ({installed}): run `pytest` or `skipvit` "
        f"instead of `python -m`, which looks into the current folder first, or {build}"
    )


def _find_library(packages: list[Path]) -> str | None:
    """Path of the first skipvit_kernels._C in these folders that this Python can import."""
    spec = PathFinder.find_spec("skipvit_kernels._C", list(map(str, packages)))
    return None if spec is None else spec.origin


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
