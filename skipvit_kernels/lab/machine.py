"""What this machine is: its processors, its free memory, the versions of what runs on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

import skipvit_kernels
from skipvit_kernels import backends


def versions() -> dict[str, str]:
    """What a bug report needs: versions by package, the CPU, its threads, the C++ build."""
    found = {
        "skipvit_kernels": skipvit_kernels.__version__,
        "torch": torch.__version__,
        "timm": _version("timm"),
        "triton": _version("triton"),
        "Python": platform.python_version(),
        "CPU": f"{cpu_name()}, {torch.get_num_threads()} threads",
    }
    if torch.cuda.is_available():
        found["CUDA device"] = torch.cuda.get_device_name()
    if backends.cpu.unavailable_reason() is None:
        found["C++ kernels"] = ", ".join(
            f"{name} {value}" for name, value in backends.cpu.build_info().items()
        )
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The model name where the system tells it (Linux), else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def free_memory(device: str) -> int:
    """Bytes that are left for tensors on a device; of the CPU all it has where it does not tell."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    if not Path("/proc/meminfo").exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return proc_bytes("meminfo", "MemAvailable")


def proc_bytes(file: str, key: str) -> int:
    """What Linux counts under `key` in a file of /proc."""
    return 1024 * int(re.findall(rf"{key}:\s*(\d+) kB", Path("/proc", file).read_text())[0])
