"""The backends that the shared operator suite runs through, and what each one lacks here."""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from skipvit_kernels import ops

REQUIRED = frozenset(filter(None, os.environ.get("SKIPVIT_REQUIRE", "").split(",")))
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

MERGING = frozenset(name for name, group in ops.OPERATORS.items() if group == "merge")
COMPARING = frozenset({"match_higher", "match_kept"})  # the others of MERGING take owners

# (backend, operator) -> how often the suite took its launcher, for the summary at the end.
launches: collections.Counter[tuple[str, str]] = collections.Counter()


@dataclasses.dataclass(frozen=True)
class Backend:
    """A module with launchers under the operators' names."""

    name: str
    module: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    lacks: Callable[[Any], str | None]  # given the module; why it cannot run here, or None
    checks_index: bool = True  # False where looking at an index would be a synchronisation
    row_bytes: int = 1  # rows of every tensor are a whole number of these
    saturates: bool = False  # no infinity and no NaN comes out of its arithmetic
    left_out: frozenset[str] = frozenset()  # operators that the reference serves there

    def channels(self, wanted: int, dtype: torch.dtype) -> int:
        """The least number of channels from `wanted` on that this backend takes."""
        step = max(1, self.row_bytes // dtype.itemsize)
        return -(-wanted // step) * step

    def require(self) -> Any:
        """The module; where it cannot run, a skipped test, or a failed one if it is required."""
        module = importlib.import_module(self.module)
        missing = self.lacks(module)
        if missing:
            if self.name in REQUIRED:
                pytest.fail(f"backend {self.name} is required and cannot run: {missing}")
            pytest.skip(f"backend {self.name} cannot run: {missing}")
        return module

    def launcher(self, operator: str) -> Callable[..., Any]:
        module = self.require()
        if operator in self.left_out:
            pytest.skip(f"{self.name} leaves {operator} to the reference")
        launches[self.name, operator] += 1
        if self.name == "triton" and INTERPRETING:
            importlib.import_module("triton_interpreted").install()
        return getattr(module, operator)


BACKENDS = {
    "cpu": Backend(
        "cpu",
        "skipvit_kernels.backends.cpu",
        "cpu",
        ALL_DTYPES,
        lambda module: module.unavailable_reason(),
    ),
    # On a GPU; or, with TRITON_INTERPRET=1, in Triton's interpreter on CPU tensors.
    "triton": Backend(
        "triton",
        "skipvit_kernels.backends.triton",
        "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu",
        ALL_DTYPES,
        lambda module: module.unavailable_reason(),
        checks_index=False,
    ),
    # The Ascend910A kernels on a CPU model of the chip, which does not look at an index either.
    "npu-model": Backend(
        "npu-model",
        "ascend.model",
        "cpu",
        (torch.float32, torch.float16),
        lambda module: module.unavailable_reason(),
        checks_index=False,
        row_bytes=32,
        saturates=True,
        left_out=MERGING,
    ),
}


@functools.cache
def ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
