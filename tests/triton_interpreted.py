"""Triton's interpreter as a memory checker: every access of a kernel is held against its tensors.

After `install()` a load or store of any byte that is no element of a tensor given to the kernel
raises, the gaps of strided views included: compiled for a GPU such a kernel would read or overwrite
somebody else's memory, where the interpreter stays silent.
`accesses()` counts how often each element is read and written.

The interpreter also rounds float32 to bfloat16 towards zero, where every GPU rounds to nearest
even (Triton 3.6 to 3.9), multiplies matrices of bfloat16 as if their bits were integers, and others
in an order that depends on the place in the result (Triton 3.9); all that is corrected here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

from skipvit_kernels.backends.triton import topk


class OutOfBounds(AssertionError):
    pass


class _Tensors:
    """The bytes of a launch's tensors, and what was done to them."""

    def __init__(self, tensors: list[torch.Tensor], counting: bool) -> None:
        self.tensors = [t for t in tensors if t.numel()]
        self.ranges = []  # (first, past last, element size, addresses of a strided view)
        for t in self.tensors:
            size = t.element_size()
            spans = [(n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)]
            end = t.data_ptr() + (sum(spans) + 1) * size
            addresses = None
            if not t.is_contiguous():
                offsets = torch.zeros((), dtype=torch.int64)
                for n, s in zip(t.shape, t.stride(), strict=True):
                    offsets = offsets[..., None] + torch.arange(n) * s
                addresses = np.unique(t.data_ptr() + offsets.numpy() * size).astype(np.uint64)
            self.ranges.append((t.data_ptr(), end, size, addresses))
        self.counts = [np.zeros((2, t.numel()), np.int64) for t in self.tensors] if counting else []

    def check(self, pointers: np.ndarray, mask: np.ndarray, size: int, is_store: bool) -> None:
        pointers = np.broadcast_to(pointers, mask.shape)[mask.astype(bool)]
        if pointers.size == 0:
            return
        for i, (start, end, element_size, addresses) in enumerate(self.ranges):
            if not (start <= int(pointers[0]) < end and element_size == size):
                continue  # an access never spans two tensors
            if addresses is None:
                inside = (pointers >= start) & (pointers + size <= end)
                inside &= (pointers - np.uint64(start)) % size == 0
            else:
                at = np.searchsorted(addresses, pointers)
                inside = addresses[np.minimum(at, addresses.size - 1)] == pointers
            if not inside.all():
                continue
            if self.counts:
                elements = ((pointers - np.uint64(start)) // size).astype(np.int64)
                np.add.at(self.counts[i][int(is_store)], elements, 1)
            return
        raise OutOfBounds(
            f"{'store to' if is_store else 'load of'} {pointers.size} elements of {size} bytes, the"
            f" first at {int(pointers[0]):#x}, not all inside one of "
            f"{[tuple(t.shape) for t in self.tensors]}"
        )


_current: list[_Tensors] = []
_recorded: list[list[_Tensors]] = []


@functools.cache
def install() -> None:
    """Check every launch of this process from here on."""
    assert knobs.runtime.interpret, "set TRITON_INTERPRET=1"
    builder = interpreter.InterpreterBuilder
    load, store, cast = builder.create_masked_load, builder.create_masked_store, builder.cast_impl
    run = interpreter.GridExecutor.__call__

    def masked_load(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        if _current:
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            _current[-1].check(ptrs.data, mask.data, size, False)
        return load(self, ptrs, mask, *args)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        if _current:
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            _current[-1].check(ptrs.data, mask.data, size, True)
        return store(self, ptrs, value, mask, *args)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(src.data)).to(torch.bfloat16)
            bits = rounded.view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        def numbers(t: Any) -> Any:
            if t.dtype.scalar == tl.bfloat16:  # its bits are the upper half of float32's
                return (t.data.astype(np.uint32) << 16).view(np.float32)
            return t.data.astype(d.data.dtype)

        products = numbers(a)[:, :, None] * numbers(b)[None]
        return interpreter.TensorHandle(products.sum(axis=1) + d.data, d.dtype.scalar)

    def execute(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        _current.append(_Tensors(tensors, counting=bool(_recorded)))
        if _recorded:
            _recorded[-1].append(_current[-1])
        try:
            run(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            cause = error.__cause__
            raise cause if isinstance(cause, OutOfBounds) else error from cause
        finally:
            _current.pop()

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    # A program costs milliseconds here: only the smallest inputs select in every program.
    topk.MAX_SELECTING = 4
    interpreter.GridExecutor.__call__ = execute


@contextlib.contextmanager
def accesses() -> Iterator[list[_Tensors]]:
    """The launches inside, each with the reads and writes of every element of its tensors."""
    install()
    _recorded.append([])
    try:
        yield _recorded[-1]
    finally:
        _recorded.pop()
