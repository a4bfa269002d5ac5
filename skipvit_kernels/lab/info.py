"""skipvit info: which kernel runs for every operator on every device, and why not another."""

from __future__ import annotations

import dataclasses

import torch

from skipvit_kernels.backends import BACKENDS, Backend
from skipvit_kernels.lab import machine
from skipvit_kernels.ops import OPERATORS

FALLBACK = "PyTorch"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What runs when an operator is called on tensors of one device.

    Attributes:
        operator: a name of `ops.OPERATORS`.
        key: torch's dispatch key: CPU, CUDA (NVIDIA and AMD) or PrivateUse1 (Ascend).
        runs: "C++", "Triton", "AscendC", or "PyTorch" where the reference stands in.
        reason: why the reference stands in, or why the kernel has nothing to run on here; None
            where the kernel runs.
    """

    operator: str
    key: str
    runs: str
    reason: str | None


def kernels() -> list[Kernel]:
    """One `Kernel` for each operator and dispatch key, as torch's dispatcher has them now."""
    return [_kernel(operator, backend) for operator in OPERATORS for backend in BACKENDS]


def _kernel(operator: str, backend: Backend) -> Kernel:
    reason = backend.module.unavailable_reason()
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"skipvit::{operator}", backend.key):
        return Kernel(operator, backend.key, backend.language, reason)
    reason = reason or f"the {backend.language} kernels do not include it"
    return Kernel(operator, backend.key, FALLBACK, reason)


def missing_kernels(device: str) -> set[str]:
    """Why plain PyTorch would run in place of the device's kernels: empty where they run."""
    (key,) = (backend.key for backend in BACKENDS if backend.device == device)
    return {kernel.reason for kernel in kernels() if kernel.key == key and kernel.reason}


def text() -> str:
    """The kernels and the machine, as `skipvit info` prints them."""
    found = kernels()
    width = max(map(len, OPERATORS)) + 2
    rows = [("operator", *(backend.key for backend in BACKENDS))]
    rows += [(name, *(k.runs for k in found if k.operator == name)) for name in OPERATORS]
    lines = [name.ljust(width) + "".join(c.ljust(13) for c in cells) for name, *cells in rows]
    lines.append("")
    missing: dict[tuple[str, str, str], list[str]] = {}
    for kernel in found:
        if kernel.reason is not None:
            why = kernel.key, kernel.runs, kernel.reason
            missing.setdefault(why, []).append(kernel.operator)
    for (key, runs, reason), operators in missing.items():
        which = "" if len(operators) == len(OPERATORS) else f" for {', '.join(operators)}"
        stands = "plain PyTorch" if runs == FALLBACK else f"the {runs} kernels are idle"
        lines.append(f"{key}: {stands}{which}, because {reason}")
    lines.append("")
    lines += [f"{name.ljust(width)}{value}" for name, value in machine.versions().items()]
    return "\n".join(line.rstrip() for line in lines)
