"""Triton without a GPU: the launchers run as they are, up to the driver's launch.

`OfflineDriver(target)` takes the place of Triton's driver: kernels are compiled for `target` by the
compiler that the target's users have, from the arguments that the launchers really pass (here CPU
tensors), and each launch is recorded instead of made. So a test sees which kernels an operator
launches at a shape, what they compile to, and what the way there costs on the host.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one program may have, in bytes.
MAX_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@dataclasses.dataclass
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]  # of the kernel, behind its metadata


class OfflineDriver:
    """What triton.runtime.JITFunction asks of a driver."""

    def __init__(self, target: str) -> None:
        self.name = target
        self.launches: list[Launch] = []
        self.utils = self  # load_binary and get_device_properties
        self.recording = True

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": MAX_SHARED[self.name]}

    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        return object(), name, 0, 0, 1024

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        def launcher(
            x: int, y: int, z: int, stream: int, function: str, packed: Any, *rest: Any
        ) -> None:
            launch_metadata, enter_hook, exit_hook, *arguments = rest
            if enter_hook is not None:
                enter_hook(launch_metadata)
            if self.recording:
                self.launches.append(Launch(function, (x, y, z), (packed, *arguments)))
            if exit_hook is not None:
                exit_hook(launch_metadata)

        return launcher


@contextlib.contextmanager
def offline(target: str) -> Iterator[OfflineDriver]:
    """Launchers on CPU tensors compile for `target` and record their launches."""
    from skipvit_kernels.backends.triton import launch, merge, rows, scores, topk

    kernels = [
        value
        for module in (merge, rows, scores, topk)
        for value in vars(module).values()
        if isinstance(value, triton.runtime.JITFunction)
    ]
    previous, warp_size = driver._active, launch.WARP_SIZE
    offline_driver = OfflineDriver(target)
    driver.set_active(offline_driver)
    assert not launch.INTERPRETING, "TRITON_INTERPRET must not be set"
    launch.CPU_TENSORS = True
    launch._compiled.clear()
    launch.WARP_SIZE = TARGETS[target].warp_size
    # Cached for device 0, whatever the target is.
    limits = launch.shared_memory, triton.compiler.compiler.max_shared_mem
    for limit in limits:
        limit.cache_clear()
    for kernel in kernels:
        kernel.device_caches.clear()
    try:
        yield offline_driver
    finally:
        for kernel in kernels:
            for cache, *_ in kernel.device_caches.values():
                for compiled_kernel in cache.values():
                    compiled_kernel.module = None  # there is nothing to unload
            kernel.device_caches.clear()
        driver._active = previous
        launch.CPU_TENSORS, launch.WARP_SIZE = False, warp_size
        launch._compiled.clear()
        for limit in limits:
            limit.cache_clear()


def compiled(*modules: Any) -> dict[str, list[Any]]:
    """The kernels compiled so far, by name; several where arguments were specialised apart."""
    found: dict[str, list[Any]] = collections.defaultdict(list)
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, triton.runtime.JITFunction) and value.device_caches:
                found[name] += value.device_caches[0][0].values()
    return found


@dataclasses.dataclass
class Resources:
    """What one compiled kernel takes of the machine, and how wide it moves data."""

    registers: int
    spills: int  # bytes a thread that do not fit the registers and go through memory
    scalar_spills: int  # AMD: scalar registers kept in lanes of vector registers; no memory traffic
    shared: int  # bytes
    wide_loads: int  # 16 bytes each
    narrow_loads: int
    wide_stores: int
    narrow_stores: int


def resources(kernel: Any, target: str) -> Resources:
    if target.startswith("gfx"):
        return _amd_resources(kernel)
    ptx = kernel.asm["ptx"]
    # Pipelined loads copy to shared memory: cp.async, whose size is an operand.
    loads = re.findall(r"ld\.global\S*|cp\.async\.c[ag]\S*[^;]*", ptx)
    stores = re.findall(r"st\.global\S*", ptx)

    def wide(instruction: str) -> bool:
        return bool(re.search(r"\.v4\.b32|\.v2\.b64|\], 0x10\b|\], 16\b", instruction))

    usage = _cuobjdump(kernel.asm["cubin"])
    number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    return Resources(
        registers=number["REG"],
        spills=number["STACK"] + number["LOCAL"],
        scalar_spills=0,
        shared=kernel.metadata.shared,
        wide_loads=sum(map(wide, loads)),
        narrow_loads=sum(not wide(i) for i in loads),
        wide_stores=sum(map(wide, stores)),
        narrow_stores=sum(not wide(i) for i in stores),
    )


def _cuobjdump(cubin: bytes) -> str:
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        pathlib.Path(path).write_bytes(cubin)
        command = [str(tool), "-res-usage", path]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _amd_resources(kernel: Any) -> Resources:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        assert match, f"the assembly does not say {name}"
        return int(match.group(1))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    return Resources(
        registers=field("vgpr_count"),
        spills=field("private_segment_fixed_size") + 4 * field("vgpr_spill_count"),
        scalar_spills=field("sgpr_spill_count"),
        shared=kernel.metadata.shared,
        wide_loads=count(r"(?:global|buffer)_load_dwordx4"),
        narrow_loads=count(r"(?:global|buffer)_load_(?!dwordx4)"),
        wide_stores=count(r"(?:global|buffer)_store_dwordx4"),
        narrow_stores=count(r"(?:global|buffer)_store_(?!dwordx4)"),
    )


def vit_inputs(batch: int, num_tokens: int, columns: int, heads: int, dtype: torch.dtype) -> Any:
    """x, scores (B, n), an index of 45 % of the patches, tokens; q and k as timm's qkv gives."""
    num_keep = -(-(num_tokens - 1) * 45 // 100)
    x = torch.empty(batch, num_tokens, columns, dtype=dtype)
    scores = torch.empty(batch, num_tokens - 1)
    index = torch.zeros(batch, num_keep + 1, dtype=torch.int64)
    tokens = torch.empty(batch, num_keep + 1, columns, dtype=dtype)
    qkv = torch.empty(batch, num_tokens, 3, heads, columns // heads, dtype=dtype)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return x, scores, num_keep, index, tokens, q[:, :, 0], k


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: int
    num_tokens: int
    columns: int
    heads: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"B{self.batch} N{self.num_tokens} C{self.columns} {dtype}"


# A kernel is compiled alike for every batch but where few images select in each program (B = 1).
SHAPES = (
    Shape(1, 197, 384, 6, torch.bfloat16),
    Shape(16, 197, 384, 6, torch.bfloat16),
    Shape(16, 197, 384, 6, torch.float32),
    Shape(16, 197, 768, 12, torch.bfloat16),
    Shape(16, 577, 768, 12, torch.bfloat16),
    Shape(4, 1025, 1024, 16, torch.bfloat16),
    Shape(1, 16385, 1024, 16, torch.bfloat16),
)


def run_all(shape: Shape) -> None:
    """Every operator and every way through its kernels, once."""
    from skipvit_kernels.backends import triton as kernels

    x, scores, num_keep, index, tokens, q, k = vit_inputs(
        shape.batch, shape.num_tokens, shape.columns, shape.heads, shape.dtype
    )
    update = x.new_empty(shape.batch, shape.columns)
    grad_fused = x.new_empty(shape.batch, num_keep + 2, shape.columns)
    kernels.cls_scores(q, k)
    kernels.gather_topk(x, scores, num_keep)
    kernels.gather_topk_fuse(x, scores, num_keep)
    kernels.gather_topk_fuse_backward(grad_fused, x, scores, index)
    kernels.gather_rows(x, index)
    kernels.gather_rows_backward(tokens, index, shape.num_tokens)
    kernels.scatter_back(x, tokens, index)
    kernels.scatter_back(x, tokens, index, update=update)
    kernels.scatter_back_backward(x, index, False)
    kernels.scatter_back_backward(x, index, True)
    owner, num_rows = x.new_empty(x.shape[:2], dtype=torch.int64), num_keep + 1
    kernels.match_higher(x, scores)
    kernels.match_higher(k, scores)
    kernels.match_kept(x, index)
    kernels.match_kept(k, index)
    _, sizes = kernels.merge_rows(x, owner, num_rows)
    kernels.merge_rows_backward(tokens, owner, None, sizes)
    kernels.restore_rows(x, tokens, tokens, owner)
    kernels.restore_rows_backward(x, owner, num_rows)


def compile_all(target: str, shape: Shape) -> Iterator[tuple[str, Any, Resources]]:
    """(name, compiled kernel, resources) of every kernel that the operators launch at a shape."""
    from skipvit_kernels.backends.triton import merge, rows, scores, topk

    with offline(target):
        run_all(shape)
        for name, variants in compiled(rows, scores, topk, merge).items():
            for variant, kernel in enumerate(variants):
                label = name.strip("_").removesuffix("_kernel")
                yield (
                    f"{label} ({variant + 1})" if len(variants) > 1 else label,
                    kernel,
                    resources(kernel, target),
                )


def write_table(path: str) -> None:
    lines = [
        "# Triton kernels compiled ahead of time",
        "",
        f"Triton {triton.__version__}, no GPU: `python tests/triton_offline.py {path}`. Registers a"
        " thread (AMD: vector registers); spills in bytes a thread; shared memory in bytes a"
        " program; how many of the global loads and stores in the code are 16 bytes wide (the"
        " others read the index, the scores and q). Variants of one kernel are numbered: without"
        " and with an update, zeros or rows of x. No spill anywhere; on AMD `s` counts scalar"
        " registers kept in lanes of vector registers, which move no memory. To write zeros for"
        " index entries out of range, `scatter_back_backward` takes 20 registers instead of 16 on"
        " gfx942, where up to 64 let as many waves run.",
        "",
    ]
    for target in TARGETS:
        lines += [
            f"## {target}",
            "",
            "| shape | kernel | warps | registers | spills | shared | wide loads | wide stores |",
            "|---|---|--:|--:|--:|--:|--:|--:|",
        ]
        for shape in SHAPES:
            for name, kernel, r in compile_all(target, shape):
                spills = f"{r.spills} + {r.scalar_spills} s" if r.scalar_spills else r.spills
                loads = f"{r.wide_loads} of {r.wide_loads + r.narrow_loads}"
                stores = f"{r.wide_stores} of {r.wide_stores + r.narrow_stores}"
                lines.append(
                    f"| {shape} | {name} | {kernel.metadata.num_warps} | {r.registers} | {spills}"
                    f" | {r.shared} | {loads} | {stores} |"
                )
        lines.append("")
    pathlib.Path(path).write_text("\n".join(lines))


if __name__ == "__main__":
    write_table(sys.argv[1])
