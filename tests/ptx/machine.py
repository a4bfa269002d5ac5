"""PTX on a CPU: the parser, and the library that executes what it reads (machine.cpp).

`Program(ptx).run(arguments, tensors, grid, shared)` runs a kernel on CPU tensors; a breach of what
machine.cpp lists raises `Fault`, an instruction that it does not know `UnknownInstruction`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SOURCE = Path(__file__).with_name("machine.cpp")
BUILD = Path(__file__).parents[2] / "build" / "ptx"
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]
# Registers with a meaning, of which machine.cpp knows the first two; `_` takes what nobody wants.
REGISTERS = ("%tid.x", "%ctaid.x", "_")
# Flags of a byte, as in machine.cpp.
OPEN, INITIALISED = 1, 2


class Fault(AssertionError):
    """What a GPU would not survive, or would survive with another result each time."""


class UnknownInstruction(NotImplementedError):
    pass


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def unavailable_reason() -> str | None:
    if shutil.which(compiler()) is None:
        return f"no C++17 compiler: {compiler()} is not on PATH"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """Built once per content."""
    digest = hashlib.sha256(" ".join([compiler(), *FLAGS]).encode() + SOURCE.read_bytes())
    path = BUILD / f"libmachine_{digest.hexdigest()[:16]}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler(), *FLAGS, str(SOURCE), "-o", str(unfinished)], check=True)
        unfinished.replace(path)
    found = ctypes.CDLL(str(path))
    found.ptx_error.restype = ctypes.c_char_p
    found.ptx_load.restype = ctypes.c_void_p
    return found


class _Region(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("flags", ctypes.c_void_p),
    )


class Memory:
    """Which bytes of the storages that launches see were ever written.

    Those of `inputs` were; any other one is a launcher's own, and was not.
    """

    def __init__(self, inputs: Iterable[torch.Tensor]) -> None:
        # Storages are kept, lest another one comes to lie at the address.
        self.flags: dict[int, tuple[Any, np.ndarray]] = {}
        for tensor in inputs:
            self._flags(tensor)[:] = INITIALISED

    def _flags(self, tensor: torch.Tensor) -> np.ndarray:
        storage = tensor.untyped_storage()
        new = storage, np.zeros(storage.nbytes(), np.uint8)
        return self.flags.setdefault(storage.data_ptr(), new)[1]

    def regions(self, tensors: list[torch.Tensor]) -> Any:
        """Those of one launch, which may touch the elements of `tensors` and nothing else."""
        tensors = [t for t in tensors if t.numel()]
        for t in tensors:
            self._flags(t).__iand__(INITIALISED)
        for t in tensors:
            size = t.element_size()
            view = np.lib.stride_tricks.as_strided(
                self._flags(t)[t.storage_offset() * size :],
                (*t.shape, size),
                (*(stride * size for stride in t.stride()), 1),
            )
            view |= OPEN
        used = {t.untyped_storage().data_ptr() for t in tensors}
        arrays = [(base, self.flags[base][1]) for base in used]
        return (_Region * len(arrays))(*(_Region(b, f.size, f.ctypes.data) for b, f in arrays))


class Program:
    _handle = None

    def __init__(self, ptx: str) -> None:
        self.ptx = ptx
        ptx = re.sub(r"//.*", "", ptx)
        head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{(.*?)\n\}", ptx, re.S)
        threads = head and re.search(r"\.reqntid (\d+)", head[3])
        if not head or not threads:
            raise UnknownInstruction("no kernel with a fixed number of threads")
        self.name: str = head[1]
        self.registers = {name: i for i, name in enumerate(REGISTERS)}
        self.constants: dict[str, int] = {"global_smem": 0}  # by its register's name
        parameters = re.findall(r"\.param \.(\w+)\b.*?([\w$]+)(?:,|$)", head[2])
        self.parameters = [kind for kind, _ in parameters]
        body = self._body(head[4])
        lines = [f"parameter {self._register(name)}" for _, name in parameters]
        lines += [f"constant {self._register(n)} {v}" for n, v in self.constants.items()]
        lines.insert(0, f"size {len(self.registers)} {threads[1]}")
        self._handle = ctypes.c_void_p(library().ptx_load("\n".join(lines + body).encode()))
        if not self._handle:
            raise UnknownInstruction(f"{self.name}: {library().ptx_error().decode()}")

    def __del__(self) -> None:
        library().ptx_free(self._handle)

    def _body(self, text: str) -> list[str]:
        """Lines for machine.cpp: name, predicate, whether negated, operands, text."""
        statements: list[str] = []
        labels: dict[str, int] = {}
        for piece in re.sub(r"(?m)^\s*\.loc\b.*", "", text).split(";"):
            *names, statement = re.split(r"([$\w]+):\s", piece)
            labels.update(dict.fromkeys(names[1::2], len(statements)))
            statement = " ".join(statement.split()).lstrip("{} ")  # a scope of inline assembly
            if statement and not statement.startswith((".reg ", ".pragma ")):
                statements.append(statement)
        lines = []
        for statement in statements:
            match = re.fullmatch(r"(?:@(\S+) )?(\S+) ?(.*)", statement)
            assert match, statement
            guard, name, rest = match.groups()
            predicate, negated = -1, 0
            if guard:
                predicate, negated = self._register(guard.lstrip("!")), int(guard[0] == "!")
            name = name.removesuffix(".uni")
            if name == "bra":
                operands = [f"0 {labels[rest]}"]
            else:
                operands = re.split(r"[,|]", re.sub(r"[{}\[\]]", "", rest)) if rest else []
                operands = [self._operand(o) for o in operands]
            space, _, kind = name.rpartition(".")
            if space == "ld.param":  # a parameter's register holds it as wide as it is
                signed = kind[0] == "s" and rest.startswith("%rd")
                name = "cvt.s64.s32" if signed else "mov.b64"
            elif "{" in rest and space == "mov":  # halves of a register
                name = f"{'un' if rest[0] == '{' else ''}pack{len(operands) - 1}.{kind}"
            count = len(operands)
            lines.append(" ".join([name, f"{predicate} {negated} {count}", *operands, statement]))
        return lines

    def _register(self, name: str) -> int:
        return self.registers.setdefault(name, len(self.registers))

    def _operand(self, text: str) -> str:
        """Its register and, of an address, what is added: immediates have registers too."""
        base, _, offset = text.strip().partition("+")
        base = base.strip()
        immediate = re.fullmatch(r"(-?)(0[fFdDxX])?([0-9A-Fa-f]+)U?", base)
        if immediate:
            sign, prefix, digits = immediate.groups()
            value = int(sign + digits, 16 if prefix else 10)
            self.constants[base] = value % 2**64
        elif base[0] == "%" and base not in self.registers and not base[-1].isdigit():
            raise UnknownInstruction(f"{self.name}: special register {base}")
        return f"{self._register(base)} {int(offset or 0)}"

    def run(
        self,
        values: list[int],
        tensors: list[torch.Tensor],
        memory: Memory,
        programs: int,
        shared: int,
    ) -> None:
        """`values`: the parameters' bits."""
        regions = memory.regions(tensors)
        parameters = (ctypes.c_uint64 * len(values))(*values)
        failed = library().ptx_run(
            self._handle, parameters, regions, ctypes.c_int64(len(regions)),
            ctypes.c_int64(programs), ctypes.c_int64(shared),
        )  # fmt: skip
        if failed:
            raise Fault(f"{self.name}, {library().ptx_error().decode()}")
