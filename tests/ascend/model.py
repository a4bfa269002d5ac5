"""The Ascend kernels on the CPU model of an AI core, under the operators' names.

Builds ascend_ops/kernels (unchanged) with g++ against the stand-in kernel_operator.h beside this
file, and calls them on CPU tensors through ascend_ops/host, the code that the torch_npu binding
uses. A breach of a 910A rule in a kernel raises RuntimeError.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

REPOSITORY = Path(__file__).parents[2]
# The mutation check puts a tree with a faulty kernel here.
ROOT = Path(os.environ.get("SKIPVIT_ASCEND_SOURCES", REPOSITORY))
BUILD = REPOSITORY / "build" / "ascend_model"
SOURCES = ("tests/ascend/model.cpp", "ascend_ops/host/operators.cpp")
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]

# Cores of successive calls, so that every test that compares two calls compares two ways to share.
_cores = itertools.cycle([32, 1, 7, 3, 30, 2])
# Of the last call: bytes read past a tensor, non-finite operands met, peak bytes of unified buffer,
# and the peak that the tiling computed.
last_stats: tuple[int, ...] = (0, 0, 0, 0)


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def unavailable_reason() -> str | None:
    if shutil.which(compiler()) is None:
        return f"no C++17 compiler: {compiler()} is not on PATH"
    return None


def build(root: Path = ROOT, out: Path = BUILD, *, reduce_float: bool = False) -> Path:
    """The model's library for the sources under `root`, built once per content.

    reduce_float: with the sum across lanes that the 910A documents for half alone (fold.h).
    """
    flags = [*FLAGS, *["-DSKIPVIT_REDUCE_FLOAT"] * reduce_float]
    folders = root / "ascend_ops", root / "tests/ascend"
    files = sorted(file for folder in folders for file in folder.rglob("*.[hc]*"))
    digest = hashlib.sha256(" ".join([compiler(), *flags]).encode())
    for file in files:
        digest.update(file.read_bytes())
    if root != REPOSITORY:
        out = root / "build"
    library = out / f"libmodel_{digest.hexdigest()[:16]}.so"
    if not library.exists():
        out.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        sources = [str(root / source) for source in SOURCES]
        include = f"-I{root / 'tests/ascend'}"
        command = [compiler(), *flags, include, *sources, "-o", str(unfinished)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        unfinished.replace(library)
    return library


class _View(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_char_p),
        ("dim", ctypes.c_int32),
        ("absent", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
    )


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.skipvit_model_error.restype = ctypes.c_char_p
    library.skipvit_model_refuse_chip.restype = ctypes.c_char_p
    library.skipvit_model_count.restype = ctypes.c_char_p
    library.skipvit_model_plan.restype = ctypes.c_void_p
    library.skipvit_model_ub_bytes.restype = ctypes.c_int64
    return library


_library = functools.cache(lambda: load(build()))


def refuse_chip(name: str | None) -> str:
    """Why the kernels cannot run on a chip of this name, or an empty text."""
    text: bytes = _library().skipvit_model_refuse_chip(None if name is None else name.encode())
    return text.decode()


class Count(NamedTuple):
    """Of one launch: its busiest core by the model's guessed costs, and what had to move at all."""

    kernel: str
    cycles: float
    instructions: int
    scalars: int
    vectors: int
    transfers: int
    bytes: int
    must_move: int  # by all cores: each byte read once, each written once
    cores: int


def last_counts(library: ctypes.CDLL | None = None) -> list[Count]:
    """The launches of the last call."""
    library = library or _library()
    values, found = (ctypes.c_double * 8)(), []
    while name := library.skipvit_model_count(len(found), values):
        found.append(Count(name.decode(), values[0], *(int(value) for value in values[1:])))
    return found


def scale_costs(factor: float, library: ctypes.CDLL | None = None) -> None:
    """Every fixed cost of an instruction times `factor`; those of bytes and repeats stay."""
    (library or _library()).skipvit_model_scale_costs(ctypes.c_double(factor))


def _view(name: str, tensor: Tensor | None) -> _View:
    if tensor is None:
        return _View(name=name.encode(), dtype=b"", absent=1)
    return _View(
        name=name.encode(),
        data=tensor.data_ptr(),
        dtype=str(tensor.dtype).removeprefix("torch.").encode(),
        dim=tensor.dim(),
        sizes=(ctypes.c_int64 * 4)(*tensor.shape),
        strides=(ctypes.c_int64 * 4)(*tensor.stride()),
    )


def _bytes(tensor: Tensor) -> int:
    """From the first element of a tensor to the end of its last one."""
    if tensor.numel() == 0:
        return 0
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in sizes) + 1) * tensor.element_size()


def run(
    operator: str,
    tensors: dict[str, Tensor | None],
    numbers: tuple[float, ...] = (),
    cores: int | None = None,
    library: ctypes.CDLL | None = None,
) -> list[Tensor]:
    """One operator on `cores` cores; tensors are dense, but for the keys of cls_scores."""
    global last_stats
    library = library or _library()
    cores = cores or next(_cores)
    views = [_view(name, tensor) for name, tensor in tensors.items()]
    plain = (_View * 4)(*views)
    values = (ctypes.c_double * 2)(*numbers)
    kind = ctypes.c_int(0)
    call = library.skipvit_model_plan(operator.encode(), plain, values, cores, ctypes.byref(kind))
    if not call:
        message = library.skipvit_model_error().decode()
        raise TypeError(message) if kind.value == 1 else ValueError(message)

    handle = ctypes.c_void_p(call)
    outputs, storages = [], []
    for i in range(library.skipvit_model_outputs(handle)):
        sizes, storage = (ctypes.c_int64 * 4)(), ctypes.c_int64()
        dtype = ctypes.c_char_p()
        dim = library.skipvit_model_output(
            handle, i, sizes, ctypes.byref(storage), ctypes.byref(dtype)
        )
        shape = list(sizes[:dim])
        memory = torch.empty(storage.value, dtype=getattr(torch, dtype.value.decode()))
        storages.append(memory)
        outputs.append(memory[: torch.Size(shape).numel()].view(shape))

    planned = library.skipvit_model_ub_bytes(handle)
    inputs = [tensor for tensor in tensors.values() if tensor is not None]
    memory = [*inputs, *storages]
    addresses = (ctypes.c_void_p * len(memory))(*(m.data_ptr() for m in memory))
    bytes_ = (ctypes.c_int64 * len(memory))(*(_bytes(m) for m in memory))
    must = (ctypes.c_int64 * len(outputs))(*(_bytes(o) for o in outputs))
    stats = (ctypes.c_int64 * 3)()
    if library.skipvit_model_launch(handle, addresses, bytes_, len(inputs), must, stats):
        message = library.skipvit_model_error().decode()
        raise RuntimeError(f"{operator} on {cores} cores: {message}")
    last_stats = (*stats, planned)
    return outputs


# ------------------------------------------------------------------------- the launchers


def cls_scores(
    q: Tensor, k: Tensor, *, scale: float | None = None, num_prefix_tokens: int = 1
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gap = (k.stride(2) - k.shape[3]) * k.element_size()  # as ascend_ops/host: reads_in_place
    if k.stride(3) != 1 or (k.shape[2] > 1 and (gap < 0 or gap % 32)):
        k = k.contiguous()
    return run("cls_scores", {"q": q.contiguous(), "k": k}, (scale, num_prefix_tokens))[0]


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    return run("gather_rows", {"x": x.contiguous(), "index": index.contiguous()})[0]


def gather_rows_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    tensors = {"grad": grad.contiguous(), "index": index.contiguous()}
    return run("gather_rows_backward", tensors, (num_tokens,))[0]


def gather_topk(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    tensors = {"x": x.contiguous(), "scores": scores.contiguous()}
    tokens, index = run("gather_topk", tensors, (num_keep, num_prefix_tokens))
    return tokens, index


def gather_topk_fuse(
    x: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    tensors = {"x": x.contiguous(), "scores": scores.contiguous()}
    tokens, index = run("gather_topk_fuse", tensors, (num_keep, num_prefix_tokens))
    return tokens, index


def gather_topk_fuse_backward(
    grad: Tensor, x: Tensor, scores: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    tensors = {"grad": grad, "x": x, "scores": scores, "index": index}
    dense = {name: tensor.contiguous() for name, tensor in tensors.items()}
    grad_x, grad_scores = run("gather_topk_fuse_backward", dense)
    return grad_x, grad_scores


def scatter_back(
    x: Tensor, tokens: Tensor, index: Tensor, *, update: Tensor | None = None
) -> Tensor:
    tensors = {"x": x.contiguous(), "tokens": tokens.contiguous(), "index": index.contiguous()}
    dense_update = None if update is None else update.contiguous()
    return run("scatter_back", {**tensors, "update": dense_update})[0]


def scatter_back_backward(
    grad: Tensor, index: Tensor, has_update: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = {"grad": grad.contiguous(), "index": index.contiguous()}
    grad_x, grad_tokens, grad_update = run("scatter_back_backward", tensors, (has_update,))
    return grad_x, grad_tokens, grad_update
