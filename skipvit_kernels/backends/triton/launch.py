"""What the kernels share: tile sizes from the shape alone, and the launch."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

_runtime = triton.knobs.runtime

# Whether the kernels run in Triton's interpreter: decided, as now, where @triton.jit runs.
INTERPRETING = triton.knobs.runtime.interpret
# Whether CPU tensors may be launched on.
CPU_TENSORS = INTERPRETING
# Threads of a warp; 1,024 is the most that a program may have, on NVIDIA and AMD.
WARP_SIZE = 64 if torch.version.hip else 32


@functools.cache
def move_tile(columns: int, element_size: int) -> tuple[int, int]:
    """(rows, columns) of the tile that one program of 128 threads moves.

    8 KB at most: 4 loads of 16 bytes in flight for each thread. The widest power of two
    that pads the rows by no more than an eighth, so that few threads idle.
    """
    columns = max(1, columns)
    width = min(triton.next_power_of_2(columns), 4096 // element_size)
    while width > 32 and cdiv(columns, width) * width > columns * 9 / 8:
        width //= 2
    return max(1, min(16, 8192 // (width * element_size))), width


@functools.cache
def sum_tile(columns: int, element_size: int) -> tuple[int, int]:
    """(rows, columns) of the tile in which one program passes over all rows of an image.

    128 bytes wide, so that an image spreads over many programs, and 4 KB large. It depends on
    nothing but the row: an image must get the same bits in every batch.
    """
    width = min(triton.next_power_of_2(max(1, columns)), 128 // element_size)
    return 4096 // (max(width, 16) * element_size), width


@functools.cache
def block(size: int) -> int:
    """The power of two, 16 at least, that holds `size` elements."""
    return max(16, triton.next_power_of_2(size))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


# (kernel's id, device, threads, scalars, dtype and alignment of each pointer) -> compiled kernel
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    programs: int,
    out: Tensor,
    pointers: tuple[Tensor | None, ...],
    scalars: tuple[Any, ...],
    threads: int = 128,
) -> None:
    """Run kernel(*pointers, *scalars) on out's device, over a grid of `programs`.

    One-dimensional, because that dimension holds 2**31 - 1 programs where the others end at 65,535.
    """
    if programs == 0:
        return
    device = out.get_device()
    if device < 0 and not CPU_TENSORS:
        raise ValueError(f"tensors must be on a CUDA or ROCm GPU, got {out.device}")
    if INTERPRETING:
        kernel[(programs,)](*pointers, *scalars, num_warps=threads // WARP_SIZE)
    elif device < 0 or device == torch.cuda.current_device():
        _launch_compiled(kernel, programs, device, pointers, scalars, threads)
    else:
        with torch.cuda.device(device):
            _launch_compiled(kernel, programs, device, pointers, scalars, threads)


def _has_calls(hook: Any) -> bool:
    """Whether a profiler listens; also where the hook is not Triton's own list of them."""
    return bool(getattr(hook, "calls", True))


def _launch_compiled(
    kernel: Any,
    programs: int,
    device: int,
    pointers: tuple[Tensor | None, ...],
    scalars: tuple[Any, ...],
    threads: int,
) -> None:
    """What Triton works out anew at every launch depends on this key alone: ask it once per key."""
    described = [
        None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16) for tensor in pointers
    ]
    # By id: kernels are never freed, and their own hash takes 0.2 us.
    key = (id(kernel), device, threads, scalars, *described)
    compiled = _compiled.get(key)
    if compiled is None:
        # A limit of their own: without one, ptxas moves some kernels' last registers to memory to
        # fit one program more. AMD's compiler knows no such option.
        limit = {"maxnreg": 128} if WARP_SIZE == 32 else {}
        _compiled[key] = kernel[(programs,)](
            *pointers, *scalars, num_warps=threads // WARP_SIZE, **limit
        )
    elif _has_calls(_runtime.launch_enter_hook) or _has_calls(_runtime.launch_exit_hook):
        compiled[(programs, 1, 1)](*pointers, *scalars)
    else:  # what that does, without the lists for hooks: 1 us less
        stream = driver.active.get_current_stream(device)
        compiled.run(
            *(programs, 1, 1, stream, compiled.function, compiled.packed_metadata),
            *(None, None, None, *pointers, *scalars),
        )


@triton.jit
def image_and_tile(tiles_per_image):  # type: ignore[no-untyped-def]
    """The image and the tile in it that this program works on."""
    pid = tl.program_id(0)
    image = pid // tiles_per_image
    return image.to(tl.int64), pid - image * tiles_per_image
