"""What the kernels share: tile sizes from the shape alone, and the launch."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

# Whether the kernels run in Triton's interpreter, on CPU tensors: decided where @triton.jit runs.
INTERPRETING = triton.knobs.runtime.interpret
# Threads of a warp; 1,024 is the most that a program may have, on NVIDIA and AMD.
WARP_SIZE = 64 if torch.version.hip else 32


@functools.cache
def move_tile(columns: int, element_size: int) -> tuple[int, int]:
    """(rows, columns) of the tile that one program of 4 warps moves.

    8 KB at most: 4 loads of 16 bytes in flight for each of 128 threads. The widest power of two
    that pads the rows by no more than an eighth, so that few threads idle.
    """
    columns = max(1, columns)
    width = min(triton.next_power_of_2(columns), 4096 // element_size)
    while width > 32 and -(-columns // width) * width > columns * 9 / 8:
        width //= 2
    return max(1, min(16, 8192 // (width * element_size))), width


@functools.cache
def sum_tile(columns: int, element_size: int) -> tuple[int, int]:
    """(rows, columns) of the tile in which one program passes over all rows of an image.

    128 bytes wide, so that an image spreads over many programs, and 4 KB large. It may depend on
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


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
    """Run `kernel` over a one-dimensional grid: 2**31 - 1 programs, where y and z end at 65,535."""
    if programs == 0:
        return
    if device.type == "cpu":
        if not INTERPRETING:
            raise ValueError("x must be on a CUDA or ROCm GPU, got cpu")
        kernel[(programs,)](*args, **options)
    elif device.index == torch.cuda.current_device():
        kernel[(programs,)](*args, **options)
    else:
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **options)


@triton.jit
def image_and_tile(tiles_per_image):
    """The image and the tile in it that this program works on."""
    pid = tl.program_id(0)
    image = pid // tiles_per_image
    return image.to(tl.int64), pid - image * tiles_per_image
