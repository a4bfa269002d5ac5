"""What the kernels share: how they address tensors, tile sizes from the shape alone, the launch.

Names in the kernels: `b_` a block of values, `o_` offsets along an axis, `m_` masks, `_ptr` and
`_ptrs` addresses; a scalar has no prefix. Results are contiguous, every other tensor comes with the
tuple of its strides, which Triton specialises one by one as it does an integer (`== 1`, `% 16`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether the kernels run in Triton's interpreter: decided, as now, where @triton.jit runs.
INTERPRETING = triton.knobs.runtime.interpret
# Whether CPU tensors may be launched on.
CPU_TENSORS = INTERPRETING
# Threads of a warp; 1,024 is the most that a program may have, on NVIDIA and AMD.
WARP_SIZE = 64 if torch.version.hip else 32
# Positions in an image are int32, up to a block of 1,024 beyond the last one.
MAX_SIZE = 2**31 - 1024
# Launches that the cache remembers, about 1 KB each; beyond, it starts again.
MAX_COMPILED = 4096


@triton.jit
def ptrs_at(ptr, offsets, strides):  # type: ignore[no-untyped-def]
    """ptr + offset * stride of every axis, in int64 whatever the offsets are.

    Axis by axis: the sum of all first takes up to 15 registers more.
    """
    tl.static_assert(len(offsets) == len(strides))
    for axis in tl.static_range(len(strides)):
        ptr += offsets[axis].to(tl.int64) * strides[axis]
    return ptr


@triton.jit
def image_and_tile(tiles_per_image):  # type: ignore[no-untyped-def]
    """The image and the tile in it that this program works on."""
    pid = tl.program_id(0)
    o_b = pid // tiles_per_image
    return o_b.to(tl.int64), pid - o_b * tiles_per_image


@triton.jit
def image_row_column(  # type: ignore[no-untyped-def]
    num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The image, and the first row and column of the tile in it that this program works on."""
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    o_b, tile = image_and_tile(tl.cdiv(num_rows, ROWS) * column_tiles)
    return o_b, tile // column_tiles * ROWS, tile % column_tiles * COLUMNS


@triton.constexpr_function
def sum_dtype(*pointers):  # type: ignore[no-untyped-def]
    """float32, or float64 where an input has it."""
    return tl.float64 if tl.float64 in [p.dtype.element_ty for p in pointers] else tl.float32


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


@functools.cache
def shared_memory(device: int) -> int:
    """Bytes of shared memory that a program on this device may have: Triton's own limit.

    48 KiB, which every GPU has, where the driver cannot be asked.
    """
    try:
        properties = triton.runtime.driver.active.utils.get_device_properties(device)
        return int(properties["max_shared_mem"])
    except (RuntimeError, AttributeError, KeyError):
        return 48 * 1024


_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, programs: int, out: Tensor, *, threads: int = 128, **arguments: Any
) -> None:
    """Run a kernel on out's device, over a grid of `programs`; `arguments` in the kernel's order.

    One-dimensional, because that dimension holds 2**31 - 1 programs where the others end at 65,535.
    """
    if programs == 0:
        return
    device = out.get_device()
    if device < 0 and not CPU_TENSORS:
        raise ValueError(f"tensors must be on a CUDA or ROCm GPU, got {out.device}")
    if INTERPRETING:
        _check(kernel, arguments)
        kernel[(programs,)](**arguments, num_warps=threads // WARP_SIZE)
    elif device < 0 or device == torch.cuda.current_device():
        _launch_compiled(kernel, programs, device, threads, arguments)
    else:
        with torch.cuda.device(device):
            _launch_compiled(kernel, programs, device, threads, arguments)


def _launch_compiled(
    kernel: Any, programs: int, device: int, threads: int, arguments: dict[str, Any]
) -> None:
    """What Triton works out anew at every launch depends on this key alone: ask it once per key.

    The number of programs is in it because of AMD, where Triton asks of each tensor whether it is
    within 2 GB: that depends on the batch, which is no argument of any kernel.
    """
    # By id: kernels are never freed, and their own hash takes 0.2 us.
    described: list[Any] = [id(kernel), programs, device, threads]
    describe = described.append
    for value in arguments.values():
        kind = type(value)
        if kind is int or kind is tuple:
            describe(value)
        elif isinstance(value, Tensor):
            describe(value.dtype)
            describe(value.data_ptr() % 16)
        else:  # with its type, because 1 == True and 2 == 2.0, and they hash alike
            describe(kind)
            describe(value)
    key = tuple(described)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*arguments.values())
        return
    _check(kernel, arguments)
    if len(_compiled) >= MAX_COMPILED:
        _compiled.clear()  # Triton keeps the kernels themselves
    # A product that is fused into the addition of a shuffled one differs between the two lanes.
    options = {"num_warps": threads // WARP_SIZE, "enable_fp_fusion": False}
    # Without a limit, ptxas moves some kernels' last registers to memory to fit one program more.
    # AMD's compiler knows no such option.
    if WARP_SIZE == 32:
        options["maxnreg"] = 128
    _compiled[key] = kernel[(programs,)](**arguments, **options)


def _check(kernel: Any, arguments: dict[str, Any]) -> None:
    if list(arguments) != kernel.arg_names:
        raise TypeError(f"{kernel.__name__} takes {kernel.arg_names}, got {list(arguments)}")
    for name, value in arguments.items():
        if isinstance(value, int) and value > MAX_SIZE:
            raise ValueError(f"{name} must be at most {MAX_SIZE}, got {value}")
