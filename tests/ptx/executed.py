"""Compiled PTX in place of a GPU: the Triton backend launched on CPU tensors.

    pytest -p ptx.executed tests/ops/test_operators.py     # with PYTHONPATH=tests

The launchers run as they are (triton_offline.py); each launch executes the PTX that Triton compiled
for it (machine.py) on the tensors it was given. Between PTX and a GPU are ptxas, the driver and the
hardware's own arithmetic, which this does not show.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import struct
from collections.abc import Callable, Iterator
from typing import Any

import backend_matrix
import torch
import triton_offline
from ptx.machine import BUILD, Fault, Memory, Program, unavailable_reason
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend

from skipvit_kernels.backends.triton import topk

TARGET = "sm_90"
DTYPES = {
    "*fp64": torch.float64, "*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16,
    "*i64": torch.int64, "*i32": torch.int32,
}  # fmt: skip

# name of a kernel -> how many were compiled (one for each kind of arguments), launches, programs
executed: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)


def leaves(value: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """(path, value) of what Triton takes for an argument: tuples are taken apart."""
    if isinstance(value, tuple):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, i))
    else:
        yield path, value


class Kernel:
    """A compiled kernel, and what its arguments must be."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = list(leaves(tuple(source.signature.values())))
        self.constants = {path: v for path, v in source.constants.items()}
        self.divisible = {p for p, v in source.attrs.items() if ["tt.divisibility", 16] in v}
        self.shared = metadata.shared

    def launch(self, program: Program, programs: int, memory: Memory, arguments: Any) -> None:
        values, tensors = [], []
        for (path, kind), (_, value) in zip(self.signature, leaves(arguments), strict=True):
            what = f"{program.name}: argument {path} is {value!r:.60}, compiled for"
            if kind == "constexpr":
                if self.constants.get(path) != value:
                    raise Fault(f"{what} {self.constants.get(path)}")
                continue
            if isinstance(value, torch.Tensor):
                if DTYPES[kind] != value.dtype:
                    raise Fault(f"{what} {kind}")
                tensors.append(value)
                value = value.data_ptr()
            elif kind == "fp32":
                value = struct.unpack("I", struct.pack("f", value))[0]
            else:
                bits, signed = int(kind[1:]), kind[0] == "i"
                if (
                    not isinstance(value, int)
                    or not -signed << bits - 1 <= value < 1 << bits - signed
                ):
                    raise Fault(f"{what} {kind}")
            if path in self.divisible and value % 16:
                raise Fault(f"{what} multiples of 16")
            values.append(value % 2**64)
        # Behind the arguments are Triton's own two buffers, which no kernel of ours uses.
        values += [0] * (len(program.parameters) - len(values))
        program.run(values, tensors, memory, programs, self.shared)
        executed[program.name]["launches"] += 1
        executed[program.name]["programs"] += programs


class Driver:
    def __init__(self) -> None:
        self.memory = Memory([])  # of the operator's call in progress
        self.launched: list[Program] = []  # by it
        self.instead: dict[Program, Program] = {}  # for the mutation check

    def load_binary(self, name: str, ptx: bytes, *_: Any) -> tuple[Any, ...]:
        executed[name]["compiled"] += 1
        return object(), Program(ptx.decode()), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        kernel = Kernel(source, metadata)

        def launch(x: int, y: int, z: int, stream: int, program: Program, *rest: Any) -> None:
            _packed, _metadata, _enter, _leave, *arguments = rest
            assert y == z == 1
            self.launched.append(program)
            program = self.instead.get(program, program)
            kernel.launch(program, x, self.memory, tuple(arguments))

        return launch

    def call(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        """The operator on tensors whose every byte is initialised."""

        def called(*args: Any, **options: Any) -> Any:
            given = (*args, *options.values())
            self.memory = Memory(a for a in given if isinstance(a, torch.Tensor))
            self.launched.clear()
            return operator(*args, **options)

        return called


@contextlib.contextmanager
def ptx_driver(target: str = TARGET) -> Iterator[Driver]:
    """Launchers on CPU tensors execute the PTX of their kernels."""
    driver = Driver()
    cubin, folder, lines = (
        CUDABackend.make_cubin,
        knobs.cache.dir,
        knobs.compilation.disable_line_info,
    )
    # What ptxas would make of it is of no use here, and half of the time.
    CUDABackend.make_cubin = lambda self, ptx, *_: ptx.encode()
    # Which is why the kernels must not be found by anybody else.
    knobs.cache.dir = str(BUILD / "triton")
    knobs.compilation.disable_line_info = True
    try:
        with triton_offline.offline(target) as offline:
            offline.load_binary = driver.load_binary
            offline.launcher_cls = driver.launcher_cls
            yield driver
    finally:
        CUDABackend.make_cubin, knobs.cache.dir = cubin, folder
        knobs.compilation.disable_line_info = lines


# ------------------------------------------------------------------------- the pytest plugin


class Backend(backend_matrix.Backend):
    def launcher(self, operator: str) -> Callable[..., Any]:
        return driver.call(super().launcher(operator))


_stack = contextlib.ExitStack()
driver: Driver


def pytest_configure() -> None:
    global driver
    driver = _stack.enter_context(ptx_driver())
    topk.MAX_SELECTING = 8  # only the smallest inputs select in every program: a fifth of the time
    triton = backend_matrix.BACKENDS["triton"]
    fields = {f.name: getattr(triton, f.name) for f in dataclasses.fields(triton)}
    fields.update(device="cpu", lacks=lambda module: unavailable_reason())
    backend_matrix.BACKENDS.clear()
    backend_matrix.BACKENDS["triton"] = Backend(**fields)


def pytest_unconfigure() -> None:
    _stack.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section(f"PTX executed, {TARGET}")
    for name, count in sorted(executed.items()):
        terminalreporter.line(
            f"{name:32} {count['compiled']:4} compiled {count['launches']:6} launches"
            f" {count['programs']:8} programs"
        )
