"""skipvit info: which kernel runs for every operator on every device, and why not another."""

from __future__ import annotations

import dataclasses

import torch

from skipvit_kernels import backends, ops
from skipvit_kernels.lab import machine

# torch's dispatch key: the module of `backends` that registers under it, and what it brings.
_BACKENDS = {
    "CPU": ("cpu", "C++"),
    "CUDA": ("triton", "Triton"),
    "PrivateUse1": ("npu", "AscendC"),
}
FALLBACK = "PyTorch"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What runs when an operator is called on tensors of one device.

    Attributes:
        operator: a name of `ops.SCHEMAS`.
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
    return [_kernel(operator, key) for operator in ops.SCHEMAS for key in _BACKENDS]


def _kernel(operator: str, key: str) -> Kernel:
    module_name, language = _BACKENDS[key]
    backend = getattr(backends, module_name, None)
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"skipvit::{operator}", key):
        return Kernel(operator, key, language, backend.unavailable_reason() if backend else None)
    if backend is None:
        reason = f"this version has no {language} kernels"
    else:
        reason = backend.unavailable_reason() or f"the {language} kernels do not include it"
    return Kernel(operator, key, FALLBACK, reason)


def missing_kernels(device: str) -> set[str]:
    """Why plain PyTorch would run in place of the device's kernels: empty where they run."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    return {kernel.reason for kernel in kernels() if kernel.key == key and kernel.reason}


def text() -> str:
    """The kernels and the machine, as `skipvit info` prints them."""
    table = {(kernel.operator, kernel.key): kernel for kernel in kernels()}
    width = max(map(len, ops.SCHEMAS)) + 2
    lines = ["operator".ljust(width) + "".join(key.ljust(13) for key in _BACKENDS)]
    for operator in ops.SCHEMAS:
        lines.append(
            operator.ljust(width)
            + "".join(table[operator, key].runs.ljust(13) for key in _BACKENDS)
        )
    lines.append("")
    missing: dict[tuple[str, str, str], list[str]] = {}
    for kernel in table.values():
        if kernel.reason is not None:
            why = kernel.key, kernel.runs, kernel.reason
            missing.setdefault(why, []).append(kernel.operator)
    for (key, runs, reason), operators in missing.items():
        which = "" if len(operators) == len(ops.SCHEMAS) else f" for {', '.join(operators)}"
        stands = "plain PyTorch" if runs == FALLBACK else f"the {runs} kernels are idle"
        lines.append(f"{key}: {stands}{which}, because {reason}")
    lines.append("")
    lines += [f"{name.ljust(width)}{value}" for name, value in machine.versions().items()]
    return "\n".join(line.rstrip() for line in lines)
