"""Cells of the sweep: one operator on one input, held against the reference, in a child process.

A cell's name is the whole of it: its data are drawn from a generator that the name seeds. One
alone, in this process, as a debugger wants it:

    PYTHONPATH=tests python tests/ops/sweep.py cpu "gather_topk B=1 P=0 n=2 C=3 K=0"

Without cells it reads one name a line and answers each with a line of JSON: what was wrong or null,
and what was launched. Whoever writes the names knows at which of them the process died.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import random
import signal
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from backend_matrix import BACKENDS, COMPARING, INTERPRETING, MERGING, Backend, launches, ulp
from test_operators import ADVERSE, check_cls_scores, check_higher, check_match, same_bits
from torch import Tensor

import skipvit_kernels
from skipvit_kernels import reference

SECONDS_PER_CELL = 120  # a kernel that does not return is killed; the first cell may build a model

LAYOUTS = ("contiguous", "transposed", "offset", "every-other")
EXPANDED = ("expanded-0", "expanded-1", "expanded-2")
# Around the widths of vectors: 4 to 64 elements.
CHANNELS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129)
# What an entry of an index may not be; N is the number of rows.
OUT_OF_RANGE = {
    "-1": -1,
    "N": None,
    "2**31": 2**31,
    "2**32+3": 2**32 + 3,  # in 32 bits a row like any other
    "2**63-1": 2**63 - 1,
    "-2**63": -(2**63),
}
SCORES = ("random", "subnormal", *(name.replace(" ", "-") for name in ADVERSE))


@dataclasses.dataclass(frozen=True)
class Cell:
    """The name of a cell has the fields that differ from these."""

    operator: str
    dtype: str = "float32"
    scores_dtype: str = "float32"
    B: int = 2
    P: int = 1
    n: int = 9
    C: int = 16
    K: int = 4
    H: int = 0  # 0: scores without heads
    layout: str = "contiguous"  # or mixed: drawn for each tensor
    values: str = "random"
    scores: str = "random"
    rows: str = "kept"  # of an index; or shuffled, repeated, or what one entry is instead
    route: str = "launcher"  # or public: with gradients
    threads: int = 1
    seed: int = 0

    def __str__(self) -> str:
        fields = dataclasses.fields(self)[1:]
        changed = (f for f in fields if getattr(self, f.name) != f.default)
        return " ".join([self.operator, *(f"{f.name}={getattr(self, f.name)}" for f in changed)])

    @staticmethod
    def named(name: str) -> Cell:
        operator, *pairs = name.split()
        fields = dict(pair.split("=") for pair in pairs)
        numbers = {f.name for f in dataclasses.fields(Cell) if isinstance(f.default, int)}
        return Cell(operator, **{k: int(v) if k in numbers else v for k, v in fields.items()})  # type: ignore[arg-type]


def base(operator: str) -> str:
    """The operator of cells that have a name of their own."""
    return operator.partition("+")[0]


# ------------------------------------------------------------------------------ comparisons


def same_numbers(got: Tensor, want: Tensor) -> None:
    """Bit for bit, but for the payload of a NaN that arithmetic made."""
    same_bits(got.masked_fill(got.isnan(), 1), want.masked_fill(want.isnan(), 1))
    assert torch.equal(got.isnan(), want.isnan())


def sums(got: Tensor, terms: Tensor, dim: int, accumulate: torch.dtype) -> None:
    """got is the sum of the float64 terms, within the rounding of any order (see test_operators).

    Left out is where the order decides about an overflow.
    """
    assert got.is_contiguous()
    exact, sizes = terms.sum(dim), terms.abs()
    count = terms.shape[dim] + 3
    bound = count * ulp(accumulate) * sizes.sum(dim) + ulp(got.dtype) / 2 * exact.abs()
    bound += torch.finfo(got.dtype).tiny
    result = got.double()
    agrees = (result == exact) | (result.isnan() & exact.isnan())
    agrees |= exact.isfinite() & ((result - exact).abs() <= bound)
    largest = min(torch.finfo(got.dtype).max, torch.finfo(accumulate).max) / 2
    agrees |= sizes.nan_to_num(0, 0).sum(dim) > largest
    assert bool(agrees.all()), f"{result[~agrees][:3].tolist()} for {exact[~agrees][:3].tolist()}"


def any_of(compare: Callable[[Tensor], None], wanted: Iterable[Tensor]) -> None:
    """Passes where `compare` does for one of those wanted."""
    failures = []
    for want in wanted:
        try:
            return compare(want)
        except AssertionError as error:
            failures.append(error)
    raise failures[0]


# ------------------------------------------------------------------------------------ case


class Case:
    """A cell's tensors, and its call."""

    def __init__(self, cell: Cell, backend: Backend, launch: Callable[..., Any] | None) -> None:
        self.cell, self.backend, self.launch = cell, backend, launch
        self.dtype = getattr(torch, cell.dtype)
        self.num_tokens, self.num_rows = cell.P + cell.n, cell.P + cell.K
        self.public = cell.route == "public"
        self.generator = torch.Generator().manual_seed(zlib.crc32(str(cell).encode()))
        self.memories: list[tuple[Tensor, Tensor]] = []  # each with its copy from before the call
        self.results: tuple[Tensor, ...] = ()
        # Of an index: its columns; once for each way to leave one out, where not all can stand.
        self.columns = [list(range(self.num_rows))]

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def randint(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self.generator))

    def lay(self, tensor: Tensor) -> Tensor:
        """The tensor in the cell's layout, amid memory that a kernel must neither use nor change.

        Expanded it has the values of its first slice everywhere.
        """
        layout = self.cell.layout
        if layout == "mixed":
            layout = (*LAYOUTS, *EXPANDED)[self.randint(7)]
        if layout.startswith("expanded"):
            # Rows of an index are unique: only the images can share them.
            dim = int(layout[-1]) % tensor.dim() if tensor.is_floating_point() else 0
            shape, tensor = tensor.shape, tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
        strides, span = [0] * tensor.dim(), 2 if layout == "every-other" else 1
        gap = 3 if layout == "offset" or layout.startswith("expanded") else 0
        for d in sorted(range(tensor.dim()), reverse=layout != "transposed"):
            strides[d] = span
            span *= tensor.shape[d] + gap
        margin = 64 + gap  # with a gap off every alignment
        sentinel = math.nan if tensor.is_floating_point() else 2**40
        memory = tensor.new_full((span + 2 * margin,), sentinel).to(self.backend.device)
        view = memory.as_strided(tensor.shape, strides, margin)
        view.copy_(tensor)
        self.memories.append((memory, memory.clone()))
        if layout.startswith("expanded"):
            view = view.expand(shape)
        return view.requires_grad_() if self.public and view.is_floating_point() else view

    def floats(self, *shape: int) -> Tensor:
        kind, dtype = self.cell.values, self.dtype
        if kind == "bits":  # a move must not look at them
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
            ends = torch.iinfo(bits)
            numbers = torch.randint(
                ends.min, ends.max, shape, dtype=bits, generator=self.generator
            ).view(dtype)
        else:
            numbers = torch.randn(shape, generator=self.generator).to(dtype)
        if kind == "special":
            others = (math.nan, math.inf, -math.inf, -0.0, 0.0, torch.finfo(dtype).tiny / 4)
            choice = self.rand(*shape) * 100
            for i, other in enumerate(others):
                numbers = numbers.masked_fill((choice >= i) & (choice < i + 1), other)
        return self.lay(numbers)

    def scores(self) -> Tensor:
        cell, dtype = self.cell, getattr(torch, self.cell.scores_dtype)
        shape = (cell.B, cell.H, cell.n) if cell.H else (cell.B, cell.n)
        numbers = self.rand(*shape)
        if cell.scores == "subnormal":
            numbers = numbers.double() * torch.finfo(dtype).tiny
        elif cell.scores != "random":
            numbers = ADVERSE[cell.scores.replace("-", " ")](numbers)
        return self.lay(numbers.to(dtype))

    def index(self) -> Tensor:
        """(B, M), M = P + K; what is wrong in it is wrong in one column, in every image."""
        cell = self.cell
        prefix = torch.arange(cell.P).expand(cell.B, -1)
        kept = self.rand(cell.B, cell.n).argsort(1)[:, : cell.K].sort(1).values + cell.P
        index = torch.cat([prefix, kept], 1)
        if cell.rows != "kept":
            index = self.rand(cell.B, self.num_tokens).argsort(1)[:, : self.num_rows]
        wrong = []
        if cell.rows in OUT_OF_RANGE:
            wrong = [self.randint(self.num_rows)]
            value = OUT_OF_RANGE[cell.rows]
            index[:, wrong[0]] = self.num_tokens if value is None else value
        elif cell.rows == "repeated":
            wrong = torch.randperm(self.num_rows, generator=self.generator)[:2].tolist()
            index[:, wrong[0]] = index[:, wrong[1]]
        if wrong:
            (whole,) = self.columns
            self.columns = [[c for c in whole if c != gone] for gone in wrong]
        return self.lay(index)

    def owners(self) -> tuple[Tensor, int, list[int]]:
        """(B, N) owners, their number M, and the columns that are right in every image.

        Every value is taken but with rows=repeated, where 0 is missing if there is another one.
        """
        cell, num_tokens = self.cell, self.num_tokens
        num_rows = self.num_rows or min(1, num_tokens)
        owner = torch.arange(num_tokens).expand(cell.B, -1).clone()
        others = self.rand(cell.B, num_tokens - num_rows) * num_rows
        owner[:, num_rows:] = others.long().clamp(max=max(0, num_rows - 1))
        owner = owner.gather(1, self.rand(cell.B, num_tokens).argsort(1))
        columns = list(range(num_tokens))
        if cell.rows in OUT_OF_RANGE:
            value = OUT_OF_RANGE[cell.rows]
            wrong = columns.pop(self.randint(num_tokens))
            owner[:, wrong] = num_rows if value is None else value
        elif cell.rows == "repeated":
            owner = owner.clamp(min=min(1, num_rows - 1))
        return self.lay(owner), num_rows, columns

    def ranks(self, *shape: int) -> Tensor:
        """Of eight values, so that many are equal, and NaN."""
        values = (self.rand(*shape) * 8).floor()
        return self.lay(values.masked_fill(values == 7, torch.nan)).detach()

    def sizes(self, *shape: int) -> Tensor:
        """Exact in float32 for as many as there are: their order makes no difference."""
        return self.lay(((self.rand(*shape) * 40).floor() + 1) / 8).detach()

    def refusal(self) -> tuple[tuple[type[Exception], ...], str] | None:
        """The errors one of which must come, and how its message must start."""
        cell, backend = self.cell, self.backend
        dtypes = [self.dtype]
        if "topk" in cell.operator:
            dtypes.append(getattr(torch, cell.scores_dtype))
        whole_rows = cell.C * self.dtype.itemsize % backend.row_bytes == 0
        whole_rows &= cell.C > 0 or backend.row_bytes == 1
        if not whole_rows or not set(dtypes) <= set(backend.dtypes):
            return (TypeError, ValueError), ""
        if cell.operator == "cls_scores" and cell.C == 0 and self.public:
            return (ValueError,), "q must have at least one head of width 1"
        if cell.operator == "match_kept" and cell.K == 0 < cell.n:
            return (ValueError, RuntimeError), "index must hold at least one kept patch"
        invalid = cell.rows in OUT_OF_RANGE or cell.rows == "repeated"
        if backend.checks_index and invalid and takes_index(cell.operator):
            if cell.rows == "repeated" and not refuses_repeated(cell):
                return None
            argument = "owner" if takes_owner(cell.operator) else "index"
            return (ValueError,) if self.public else (ValueError, RuntimeError), f"{argument} must"
        return None

    def call(self, *args: Any, **options: Any) -> tuple[Tensor, ...] | None:
        """The outputs, or None for a refusal that had to come. No input and no gap has changed."""
        errors, start = self.refusal() or ((), "")
        assert self.launch is not None
        got = None
        try:
            with torch.set_grad_enabled(self.public):
                got = self.launch(*args, **options)
        except errors as error:
            assert str(error).startswith(start), error
        else:
            assert not errors, f"was not refused: {start or self.cell}"
        for memory, before in self.memories:
            assert torch.equal(memory.view(torch.uint8), before.view(torch.uint8)), (
                "wrote into an input or beside it"
            )
        if got is None:
            return None
        self.results = got if isinstance(got, tuple) else (got,)
        return tuple(result.detach() for result in self.results)

    def gradients(self, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Of the public function's first result."""
        return torch.autograd.grad(self.results[0], inputs, grad)

    def computes(self, *tensors: Tensor) -> bool:
        """Whether the backend has arithmetic for these."""
        return not self.backend.saturates or all(bool(t.isfinite().all()) for t in tensors)


# ------------------------------------------------------------------- the operators' checks


def valid(index: Tensor, num_tokens: int) -> Tensor:
    return (index >= 0) & (index < num_tokens)


def same_rows(case: Case, got: Tensor, x: Tensor, index: Tensor) -> None:
    """got is x[index], with zeros for a row out of range; on the NPU such a row is anything."""
    inside = valid(index, x.shape[1])
    want = x.new_zeros(*index.shape, x.shape[2])
    if bool(inside.any()):
        want = reference.gather_rows(x, index.where(inside, 0)).masked_fill(~inside[..., None], 0)
    if case.backend.name == "npu-model":
        got = got.masked_fill(~inside[..., None], 0)
    same_bits(got, want)


def moved(index: Tensor, num_tokens: int) -> Tensor:
    """(B, N, 1): the rows that the index names."""
    named = torch.zeros(index.shape[0], num_tokens + 1, dtype=torch.bool, device=index.device)
    place = index.where(valid(index, num_tokens), num_tokens)
    return named.scatter(1, place, True)[:, :num_tokens, None]


def check_cls_scores_cell(case: Case) -> None:
    cell = case.cell
    heads = max(1, cell.H)
    q = case.floats(cell.B, heads, cell.C)
    k = case.floats(cell.B, heads, case.num_tokens, cell.C)
    scale = max(1, cell.C) ** -0.5
    got = case.call(q, k, scale=scale, num_prefix_tokens=cell.P)
    if got is None:
        return
    (scores,), q, k = got, q.detach(), k.detach()
    assert scores.dtype == torch.float32
    finite = q.flatten(1).isfinite().all(1) & k.flatten(1).isfinite().all(1)
    if bool(finite.any()) or not cell.B:
        check_cls_scores(scores[finite], q[finite], k[finite], scale, cell.P)
    if case.computes(q, k):
        want = reference.cls_scores(q, k, scale=scale, num_prefix_tokens=cell.P)
        assert scores.shape == want.shape and torch.equal(scores.isnan(), want.isnan())


def selection(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """x, scores and what came out, the part that gather_topk and gather_topk_fuse share checked."""
    cell = case.cell
    x, scores = case.floats(cell.B, case.num_tokens, cell.C), case.scores()
    got = case.call(x, scores, cell.K, num_prefix_tokens=cell.P)
    if got is None:
        return None
    tokens, index = got
    want = reference.gather_topk(x, scores, cell.K, num_prefix_tokens=cell.P)
    converted = cell.H > 0 or cell.scores_dtype != "float32"
    if converted and not case.computes(scores, reference.head_mean(scores)):
        assert bool((index[:, 1:] > index[:, :-1]).all() and valid(index, case.num_tokens).all())
        want = reference.gather_rows(x, index), index
    same_bits(index, want[1])
    same_bits(tokens[:, : case.num_rows].contiguous(), want[0])
    assert tokens.shape[1] == case.num_rows + (cell.operator == "gather_topk_fuse")
    return x, scores, tokens, index


def check_gather_topk(case: Case) -> None:
    got = selection(case)
    if got is None or not case.public:
        return
    x, _, tokens, index = got
    grad = case.floats(*tokens.shape).detach()
    (grad_x,) = case.gradients(grad, x)
    same_bits(grad_x, reference.gather_rows_backward(grad, index, case.num_tokens))


def check_gather_topk_fuse(case: Case) -> None:
    got = selection(case)
    if got is None:
        return
    x, scores, tokens, index = got
    if case.computes(x, scores, reference.head_mean(scores)):
        kept = moved(index, case.num_tokens)[:, case.cell.P :]
        weights = reference.head_mean(scores).double()[..., None]
        terms = (weights * x[:, case.cell.P :].double()).masked_fill(kept, 0)
        sums(tokens[:, -1].contiguous(), terms, 1, accumulation(x, scores))
    if case.public:
        grad = case.floats(*tokens.shape).detach()
        grad_x, grad_scores = case.gradients(grad, x, scores)
        fuse_gradients(case, grad_x, grad_scores, grad, x, scores, index)


def check_gather_topk_fuse_backward(case: Case) -> None:
    cell = case.cell
    x, scores, index = case.floats(cell.B, case.num_tokens, cell.C), case.scores(), case.index()
    grad = case.floats(cell.B, case.num_rows + 1, cell.C)
    got = case.call(grad, x, scores, index)
    if got is not None and case.computes(grad, x, scores, reference.head_mean(scores)):
        grad_x, grad_scores = got
        fuse_gradients(case, grad_x, grad_scores, grad, x, scores, index)


def fuse_gradients(
    case: Case,
    grad_x: Tensor,
    grad_scores: Tensor,
    grad: Tensor,
    x: Tensor,
    scores: Tensor,
    index: Tensor,
) -> None:
    def compare(want: Tensor) -> None:
        kept = moved(index, x.shape[1])
        # A kept row is moved: the payload of its NaN too.
        same_bits(grad_x.masked_fill(~kept, 0), want.masked_fill(~kept, 0))
        if case.computes(want):
            same_numbers(grad_x, want)

    any_of(
        compare,
        (
            reference.gather_topk_fuse_backward(grad[:, [*c, -1]], x, scores, index[:, c])[0]
            for c in case.columns
        ),
    )
    num_patches = scores.shape[-1]
    kept = moved(index, x.shape[1])[:, x.shape[1] - num_patches :]
    terms = x[:, x.shape[1] - num_patches :].double() * grad[:, -1:].double()
    terms = terms.masked_fill(kept, 0)
    kept = kept[..., 0]
    if scores.dim() == 3:
        terms = (terms / scores.shape[1])[:, None].expand(-1, scores.shape[1], -1, -1)
        kept = kept[:, None].expand(scores.shape)
    assert grad_scores.dtype == scores.dtype and grad_scores.shape == scores.shape
    sums(grad_scores, terms, -1, accumulation(x, scores))
    assert bool((grad_scores[kept] == 0).all())


def check_gather_rows(case: Case) -> None:
    cell = case.cell
    x, index = case.floats(cell.B, case.num_tokens, cell.C), case.index()
    got = case.call(x, index)
    if got is None:
        return
    same_rows(case, got[0], x, index)
    if case.public and cell.rows != "repeated":
        grad = case.floats(*got[0].shape).detach()
        (grad_x,) = case.gradients(grad, x)
        same_bits(grad_x, reference.gather_rows_backward(grad, index, case.num_tokens))


def check_gather_rows_backward(case: Case) -> None:
    cell = case.cell
    grad, index = case.floats(cell.B, case.num_rows, cell.C), case.index()
    got = case.call(grad, index, case.num_tokens)
    if got is not None:
        any_of(
            functools.partial(same_bits, got[0]),
            (
                reference.gather_rows_backward(grad[:, c], index[:, c], case.num_tokens)
                for c in case.columns
            ),
        )


def check_scatter_back(case: Case, with_update: bool = False) -> None:
    cell = case.cell
    x, index = case.floats(cell.B, case.num_tokens, cell.C), case.index()
    tokens = case.floats(cell.B, case.num_rows, cell.C)
    update = case.floats(cell.B, cell.C) if with_update else None
    got = case.call(x, tokens, index, update=update)
    if got is None:
        return
    named = moved(index, case.num_tokens)

    def compare(want: Tensor) -> None:
        if update is None:
            return same_bits(got[0], want)
        same_bits(got[0].masked_fill(~named, 0), want.masked_fill(~named, 0))
        if case.computes(x, update):
            same_numbers(got[0], want)

    any_of(
        compare,
        (reference.scatter_back(x, tokens[:, c], index[:, c], update=update) for c in case.columns),
    )
    if case.public:
        grad = case.floats(*x.shape).detach()
        inputs = (x, tokens) if update is None else (x, tokens, update)
        scatter_gradients(case, case.gradients(grad, *inputs), grad, index)


def check_scatter_back_backward(case: Case, with_update: bool = False) -> None:
    cell = case.cell
    grad, index = case.floats(cell.B, case.num_tokens, cell.C), case.index()
    got = case.call(grad, index, with_update)
    if got is None:
        return
    assert len(got) == 3 and (with_update or got[2].shape == (0,))
    sums_too = with_update and case.computes(grad)
    scatter_gradients(case, got if sums_too else got[:2], grad, index)


def scatter_gradients(case: Case, got: tuple[Tensor, ...], grad: Tensor, index: Tensor) -> None:
    # Which of two equal entries is left out makes no difference to what was replaced.
    want = reference.scatter_back_backward(grad, index[:, case.columns[0]], False)[0]
    same_bits(got[0], want)
    if case.backend.name == "npu-model" and case.cell.rows == "repeated":
        # Of two entries that name a row the later one has its gradient, as in the forward.
        every = range(case.num_rows)
        earlier = min(gone for c in case.columns for gone in set(every) - set(c))
        loses = torch.tensor([column == earlier for column in every])
        same_rows(case, got[1], grad, index.masked_fill(loses, -1))
        assert not got[1][:, earlier].any()
    else:
        same_rows(case, got[1], grad, index)
    if len(got) == 3:
        assert got[2].dtype == grad.dtype
        sums(got[2], want.double(), 1, accumulation(grad))


def check_match_higher(case: Case) -> None:
    cell = case.cell
    heads = (cell.H,) if cell.H else ()
    features = case.floats(cell.B, *heads, case.num_tokens, cell.C)
    ranks = case.ranks(cell.B, cell.n)
    got = case.call(features, ranks, num_prefix_tokens=cell.P)
    if got is None:
        return
    (cosines,), features = got, features.detach()
    assert cosines.dtype == torch.float32 and cosines.shape == (cell.B, cell.n)
    mean = features.double().mean(1) if heads else features.double()
    # What has squares that vanish in float32 has no direction.
    plain = (mean.isfinite().all(-1) & ~(mean.norm(dim=-1) < 1e-15)).all(-1)
    check_higher(cosines[plain], features[plain], ranks[plain], cell.P)


def check_match_kept(case: Case) -> None:
    cell = case.cell
    heads = (cell.H,) if cell.H else ()
    features, index = case.floats(cell.B, *heads, case.num_tokens, cell.C), case.index()
    got = case.call(features, index, num_prefix_tokens=cell.P)
    if got is None:
        return
    (owner,), features = got, features.detach()
    assert owner.dtype == torch.int64 and owner.shape == (cell.B, case.num_tokens)
    kept, last = moved(index, case.num_tokens)[..., 0], max(cell.P, case.num_rows - 1)
    assert bool(((owner >= cell.P) & (owner <= last) | kept).all())
    if cell.rows in OUT_OF_RANGE or cell.rows == "repeated":
        return
    mean = features.double().mean(1) if heads else features.double()
    nan = mean.isnan().any(-1) & ~kept
    assert bool((owner[nan] == cell.P).all())
    # What has squares that vanish in float32 has no direction.
    plain = (mean.isfinite().all(-1) & ~(mean.norm(dim=-1) < 1e-15)).all(-1)
    check_match(owner[plain], features[plain], index[plain], cell.P)


def grouped(values: Tensor, owner: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """(B, M, N, C) in float64: the values of each owner, else 0; and how many, (B, M, 1)."""
    mine = owner[:, None] == torch.arange(num_rows, device=owner.device)[:, None]
    terms = values.double()[:, None].expand(-1, num_rows, -1, -1)
    return terms.masked_fill(~mine[..., None], 0), mine.sum(-1, keepdim=True)


def check_merge_rows(case: Case, with_sizes: bool = False) -> None:
    cell = case.cell
    x, (owner, num_rows, good) = case.floats(cell.B, case.num_tokens, cell.C), case.owners()
    sizes = case.sizes(cell.B, case.num_tokens) if with_sizes else None
    got = case.call(x, owner, num_rows, sizes=sizes)
    if got is None:
        return
    (tokens, merged), own = got, x.detach()
    good_sizes = sizes if sizes is None else sizes[:, good]
    want, total = reference.merge_rows(own[:, good], owner[:, good], num_rows, sizes=good_sizes)
    same_bits(merged, total)
    weighted = own[:, good].double() * (1 if sizes is None else good_sizes.double()[..., None])
    terms, counts = grouped(weighted, owner[:, good], num_rows)
    assert tokens.dtype == x.dtype and bool(tokens.isnan().where(counts == 0, True).all())
    several = counts > 1
    terms = terms / total.double().where(counts[..., 0] > 0, 1)[..., None, None]
    alone = counts == 1
    same_bits(tokens.masked_fill(~alone, 0), want.masked_fill(~alone, 0))
    terms = terms.masked_fill(~several[..., None], 0)
    sums(tokens.masked_fill(~several, 0), terms, 2, accumulation(x))
    if case.public:
        grad = case.floats(*tokens.shape).detach()
        (grad_x,) = case.gradients(grad, x)
        same_numbers(grad_x, reference.merge_rows_backward(grad, owner, sizes, merged))


def check_merge_rows_backward(case: Case, with_sizes: bool = False) -> None:
    cell = case.cell
    owner, num_rows, good = case.owners()
    grad, merged = case.floats(cell.B, num_rows, cell.C), case.sizes(cell.B, num_rows)
    sizes = case.sizes(cell.B, case.num_tokens) if with_sizes else None
    got = case.call(grad, owner, sizes, merged)
    if got is None:
        return
    want = torch.zeros_like(got[0])
    good_sizes = sizes if sizes is None else sizes[:, good]
    want[:, good] = reference.merge_rows_backward(grad, owner[:, good], good_sizes, merged)
    same_numbers(got[0], want)


def check_restore_rows(case: Case) -> None:
    cell = case.cell
    x, (owner, num_rows, good) = case.floats(cell.B, case.num_tokens, cell.C), case.owners()
    before, after = (case.floats(cell.B, num_rows, cell.C) for _ in range(2))
    got = case.call(x, before, after, owner)
    if got is None:
        return
    want = x.detach().clone(memory_format=torch.contiguous_format)
    want[:, good] = reference.restore_rows(x[:, good], before, after, owner[:, good])
    same_numbers(got[0], want)
    moves = torch.ones(cell.B, case.num_tokens, 1, dtype=torch.bool, device=x.device)
    moves[:, good] = reference._is_alone(owner[:, good], num_rows)
    same_bits(got[0].masked_fill(~moves, 0), want.masked_fill(~moves, 0))
    if case.public:
        grad = case.floats(*x.shape).detach()
        gradients = case.gradients(grad, x, before, after)
        restored_gradients(gradients, grad, owner, num_rows, good)


def check_restore_rows_backward(case: Case) -> None:
    cell = case.cell
    grad, (owner, num_rows, good) = case.floats(cell.B, case.num_tokens, cell.C), case.owners()
    got = case.call(grad, owner, num_rows)
    if got is not None:
        restored_gradients(got, grad, owner, num_rows, good)


def restored_gradients(
    got: tuple[Tensor, ...], grad: Tensor, owner: Tensor, num_rows: int, good: list[int]
) -> None:
    want = grad.clone(memory_format=torch.contiguous_format)
    want[:, good], _, want_after = reference.restore_rows_backward(
        grad[:, good], owner[:, good], num_rows
    )
    grad_x, grad_before, grad_after = got
    same_bits(grad_x, want)
    terms, counts = grouped(grad[:, good], owner[:, good], num_rows)
    alone = counts == 1
    same_bits(grad_after.masked_fill(~alone, 0), want_after.masked_fill(~alone, 0))
    terms = terms.masked_fill(alone[..., None], 0)
    sums(grad_after.masked_fill(alone, 0), terms, 2, accumulation(grad))
    sums(grad_before, -terms, 2, accumulation(grad))


def accumulation(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


# Each operator's check; those with an update are cells of their own.
CHECKS: dict[str, Callable[[Case], None]] = {
    "cls_scores": check_cls_scores_cell,
    "gather_topk": check_gather_topk,
    "gather_topk_fuse": check_gather_topk_fuse,
    "gather_topk_fuse_backward": check_gather_topk_fuse_backward,
    "gather_rows": check_gather_rows,
    "gather_rows_backward": check_gather_rows_backward,
    "scatter_back": check_scatter_back,
    "scatter_back+update": functools.partial(check_scatter_back, with_update=True),
    "scatter_back_backward": check_scatter_back_backward,
    "scatter_back_backward+update": functools.partial(
        check_scatter_back_backward, with_update=True
    ),
    "match_higher": check_match_higher,
    "match_kept": check_match_kept,
    "merge_rows": check_merge_rows,
    "merge_rows+sizes": functools.partial(check_merge_rows, with_sizes=True),
    "merge_rows_backward": check_merge_rows_backward,
    "merge_rows_backward+sizes": functools.partial(check_merge_rows_backward, with_sizes=True),
    "restore_rows": check_restore_rows,
    "restore_rows_backward": check_restore_rows_backward,
}
PUBLIC = tuple(name for name in skipvit_kernels.ops.__all__ if name in CHECKS)


def operators(backend: Backend) -> tuple[str, ...]:
    return tuple(name for name in CHECKS if base(name) not in backend.left_out)


def takes_scores(operator: str) -> bool:
    return "topk" in operator


def takes_index(operator: str) -> bool:
    return operator not in ("cls_scores", "gather_topk", "gather_topk_fuse", "match_higher")


def takes_owner(operator: str) -> bool:
    return base(operator) in MERGING - COMPARING


def refuses_repeated(cell: Cell) -> bool:
    """Where a row would be written twice, or an owner has none."""
    if takes_owner(cell.operator):
        return base(cell.operator) == "merge_rows" and cell.P + cell.K > 1
    return cell.operator != "gather_rows"


def only_moves(operator: str) -> bool:
    return (
        base(operator) not in MERGING
        and operator != "cls_scores"
        and "fuse" not in operator
        and "backward+" not in operator
    )


# --------------------------------------------------------------------------- bad arguments


def check_arguments(case: Case) -> None:
    """A call with one or two arguments that do not fit, if it fits at all.

    Of a public function only a ValueError or TypeError may come, and it names an argument; a
    launcher may raise what it likes, as long as it does.
    """
    rng = random.Random(str(case.cell))
    batch, prefix, patches, channels, heads = (rng.randint(1, 4) for _ in range(5))
    num_tokens, keep = prefix + patches, rng.randint(0, patches)
    x, scores = torch.randn(batch, num_tokens, channels), torch.rand(batch, heads, patches)
    index = torch.arange(prefix + keep).expand(batch, -1)
    rows = torch.randn(batch, prefix + keep + 1, channels)
    owner = (torch.arange(num_tokens) % (prefix + keep)).expand(batch, -1)
    sizes = torch.ones(batch, num_tokens)
    selecting = {"x": x, "scores": scores, "num_keep": keep, "num_prefix_tokens": prefix}
    valid_calls: dict[str, dict[str, Any]] = {
        "cls_scores": {
            "q": torch.randn(batch, heads, channels),
            "k": torch.randn(batch, heads, num_tokens, channels),
            "num_prefix_tokens": prefix,
        },
        "gather_topk": selecting,
        "gather_topk_fuse": selecting,
        "gather_rows": {"x": x, "index": index},
        "scatter_back": {
            "x": x, "tokens": rows[:, 1:], "index": index, "update": torch.randn(batch, channels),
        },
        "gather_topk_fuse_backward": {"grad": rows, "x": x, "scores": scores, "index": index},
        "gather_rows_backward": {"grad": rows[:, 1:], "index": index, "num_tokens": num_tokens},
        "scatter_back_backward": {"grad": x, "index": index, "has_update": rng.random() < 0.5},
        "match_higher": {
            "features": x, "ranks": torch.rand(batch, patches), "num_prefix_tokens": prefix,
        },
        "match_kept": {"features": x, "index": index, "num_prefix_tokens": prefix},
        "merge_rows": {"x": x, "owner": owner, "num_rows": prefix + keep, "sizes": sizes},
        "restore_rows": {"x": x, "before": rows[:, 1:], "after": rows[:, 1:], "owner": owner},
        "merge_rows_backward": {
            "grad": rows[:, 1:], "owner": owner, "sizes": sizes,
            "merged_sizes": torch.ones(batch, prefix + keep),
        },
        "restore_rows_backward": {"grad": x, "owner": owner, "num_rows": prefix + keep},
    }  # fmt: skip
    operator = rng.choice(PUBLIC if case.public else tuple(valid_calls))
    arguments = dict(valid_calls[operator])
    for name in rng.sample(tuple(arguments), rng.randint(1, 2)):
        value = arguments[name]
        arguments[name] = misfit(value, rng) if isinstance(value, Tensor) else rng.choice(NO_COUNTS)
    module = skipvit_kernels if case.public else case.backend.require()
    call = getattr(module, operator)
    try:
        call(**arguments)
    except Exception as error:
        if case.public:
            said = f"{operator}({describe(arguments)}): {type(error).__name__}: {error}"
            assert isinstance(error, (ValueError, TypeError)), said
            assert str(error).split()[0] in inspect.signature(call).parameters, said


NO_COUNTS = (-1, 5, 2**31, 2**40, 2**63 - 1, 2**63, -(2**63), 10**30, 0.5, 3.0, math.nan, "3", None)
OTHER_DTYPES = (torch.float16, torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64)


def misfit(tensor: Tensor, rng: random.Random) -> Tensor:
    d = rng.randrange(tensor.dim())
    return rng.choice(
        [
            lambda: tensor.select(d, 0),
            lambda: tensor.unsqueeze(d),
            lambda: tensor.narrow(d, 0, 0),
            lambda: tensor.narrow(d, 0, max(0, tensor.shape[d] - 1)),
            lambda: torch.cat([tensor, tensor], d),
            lambda: tensor.transpose(0, d),
            lambda: tensor.flatten(),
            lambda: tensor.sum(),
            lambda: tensor.to(rng.choice(OTHER_DTYPES)),
            lambda: tensor.to("meta"),
        ]
    )()


def describe(arguments: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={tuple(v.shape)} {v.dtype} {v.device}" if isinstance(v, Tensor) else f"{name}={v}"
        for name, v in arguments.items()
    )


# ------------------------------------------------------------------------------- the cells


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def drawn(cell: Cell, backend: Backend, rng: random.Random) -> Cell:
    """The cell with all that is not its shape drawn at random."""
    operator = base(cell.operator)
    return dataclasses.replace(
        cell,
        scores_dtype=dtype_name(rng.choice(backend.dtypes)),
        layout=rng.choice(("contiguous", "mixed", "mixed", "mixed")),
        values=rng.choice(("random", "bits" if only_moves(cell.operator) else "special")),
        scores=rng.choice(SCORES),
        rows=rng.choice(("kept", "shuffled")),
        route="public"
        if backend.name == "cpu" and operator in PUBLIC and rng.random() < 0.4
        else "launcher",
    )


def shapes(backend: Backend) -> Iterator[Cell]:
    """Every combination of small and empty dimensions, of every operator and dtype.

    Where a cell is dear or the time is short, some of each combination of empty dimensions.
    """
    rng = random.Random(0)
    by_emptiness: dict[object, list[Cell]] = {}
    grid = itertools.product(
        operators(backend), backend.dtypes, (0, 1, 3), (0, 1, 5), (0, 1, 2, 17)
    )
    for operator, dtype, batch, prefix, n in grid:
        # Channels that the backend does not have must be refused: of these, 1 and 3.
        channels = sorted({0, 1, 3, backend.channels(1, dtype), 64})
        keeps = sorted({0, 1, n // 2, n} & set(range(n + 1)))
        keeps = keeps if takes_index(operator) or takes_scores(operator) else (0,)
        heads = {"cls_scores": (1, 3), "match_higher": (0, 3), "match_kept": (0, 3)}.get(
            operator, (0,)
        )
        heads = (0, 1, 3) if takes_scores(operator) else heads
        for c, k, h in itertools.product(channels, keeps, heads):
            cell = Cell(operator, dtype_name(dtype), B=batch, P=prefix, n=n, C=c, K=k, H=h)
            by_emptiness.setdefault(emptiness(cell), []).append(drawn(cell, backend, rng))
    for found in by_emptiness.values():
        count = {"triton": 1, "npu-model": 10}.get(backend.name, len(found))
        yield from rng.sample(found, min(count, len(found)))


def emptiness(cell: Cell) -> object:
    empty = tuple(size == 0 for size in (cell.B, cell.P, cell.n, cell.C, cell.K, cell.n - cell.K))
    return cell.operator, cell.H, empty


def layouts(backend: Backend) -> Iterator[Cell]:
    """Rows around the width of a vector, in every layout."""
    every = itertools.product(
        operators(backend), backend.dtypes, CHANNELS, (*LAYOUTS, *EXPANDED, "mixed")
    )
    for operator, dtype, channels, layout in every:
        yield Cell(
            operator, dtype_name(dtype), C=channels, H=2 * takes_scores(operator), layout=layout
        )


def values(backend: Backend) -> Iterator[Cell]:
    """Scores and tokens of every kind and every pair of dtypes."""
    every = itertools.product(
        filter(takes_scores, CHECKS), backend.dtypes, backend.dtypes, (0, 1, 3), SCORES
    )
    for operator, dtype, scores_dtype, heads, scores in every:
        cell = Cell(operator, dtype_name(dtype), dtype_name(scores_dtype), n=20, K=9, H=heads)
        numbers = "bits" if only_moves(operator) else "special"
        yield dataclasses.replace(cell, scores=scores, values=numbers)
    for operator, dtype in itertools.product(operators(backend), backend.dtypes):
        numbers = "bits" if only_moves(operator) else "special"
        for channels in (16, 48):
            yield Cell(operator, dtype_name(dtype), C=channels, values=numbers, seed=channels)


def indices(backend: Backend) -> Iterator[Cell]:
    """Every kind of wrong entry, for every operator that takes an index."""
    kinds = ("shuffled", "repeated", *OUT_OF_RANGE)
    for operator, dtype, rows, layout, seed in itertools.product(
        filter(takes_index, operators(backend)),
        backend.dtypes,
        kinds,
        ("contiguous", "offset"),
        range(3),
    ):
        cell = Cell(operator, dtype_name(dtype), rows=rows, layout=layout, seed=seed)
        yield cell
        if backend.name == "cpu" and base(operator) in PUBLIC:
            yield dataclasses.replace(cell, route="public")


def random_cells(backend: Backend) -> Iterator[Cell]:
    """Everything drawn; SKIPVIT_SWEEP_SEED draws others."""
    start = int(os.environ.get("SKIPVIT_SWEEP_SEED", "0")) * 1_000_000
    largest = 40 if backend.name == "cpu" else 20
    for seed in itertools.count(start):
        rng = random.Random(seed)
        operator = rng.choice(operators(backend))
        n = rng.choice((0, 1, rng.randint(0, largest), rng.randint(0, largest)))
        channels = rng.choice((rng.choice(CHANNELS), rng.randint(0, largest)))
        dtype = rng.choice(backend.dtypes)
        if rng.random() < 0.9:
            channels = backend.channels(channels, dtype)
        cell = Cell(
            operator,
            dtype_name(dtype),
            B=rng.randint(0, 4),
            P=rng.choice((0, 1, rng.randint(0, 5))),
            n=n,
            C=channels,
            K=rng.choice((0, n, rng.randint(0, n))),
            H=rng.randint(1 if operator == "cls_scores" else 0, 4),
            threads=rng.choice((1, 1, 3)),
            seed=seed,
        )
        cell = drawn(cell, backend, rng)
        if cell.B and cell.P + cell.K >= 2 and rng.random() < 0.1:
            cell = dataclasses.replace(cell, rows=rng.choice(("repeated", *OUT_OF_RANGE)))
        yield cell


def arguments(backend: Backend) -> Iterator[Cell]:
    for seed in range(1000):
        yield Cell("arguments", route="public" if seed % 2 else "launcher", seed=seed)


def served(cell: Cell, backend: Backend) -> bool:
    """False for the cells that a backend is known not to serve, each for a reason of its own."""
    if cell.operator == "cls_scores" and cell.C == 0 and backend.row_bytes == 1:
        return cell.route == "public"  # where it is refused; of a launcher nothing is said
    if cell.operator == "match_kept" and cell.K == 0 < cell.n and not backend.checks_index:
        return False  # likewise
    if backend.name == "triton" and INTERPRETING:
        # The interpreter loses bfloat16's subnormal numbers, and reads its bits as float64's.
        dtypes = {cell.dtype, cell.scores_dtype} if takes_scores(cell.operator) else {cell.dtype}
        moves = only_moves(cell.operator) and "+update" not in cell.operator
        special = not moves and cell.values != "random"
        special |= takes_scores(cell.operator) and cell.scores in ("subnormal", "denormal")
        return "bfloat16" not in dtypes or not (special or "float64" in dtypes)
    return True


# The parts, each with the most cells that a backend runs of it: about 0.5 ms each in C++ and on the
# model of the NPU, 10 to 130 in the interpreter.
PARTS: dict[str, tuple[Callable[[Backend], Iterator[Cell]], dict[str, int]]] = {
    "shapes": (shapes, {}),
    "layouts": (layouts, {"triton": 150}),
    "values": (values, {"triton": 80}),
    "indices": (indices, {"triton": 300}),
    "random": (random_cells, {"cpu": 10_000, "triton": 200, "npu-model": 3_000}),
    "arguments": (arguments, {"triton": 0, "npu-model": 0}),
}


def cells(part: str, backend: Backend) -> list[Cell]:
    every, limits = PARTS[part]
    listed = (cell for cell in every(backend) if served(cell, backend))
    limit = limits.get(backend.name)
    if part == "random":
        return list(itertools.islice(listed, limit))
    found = list(listed)
    return found if limit is None else random.Random(part).sample(found, min(limit, len(found)))


# ----------------------------------------------------------------------------------- child


def run(cell: Cell, backend: Backend, launch: Callable[..., Any] | None = None) -> None:
    """Raises AssertionError where the backend, or `launch` in its place, breaks the contract."""
    torch.set_num_threads(cell.threads)
    operator = base(cell.operator)
    check = CHECKS.get(cell.operator, check_arguments)
    if launch is None and operator in CHECKS:
        public = cell.route == "public"
        launch = getattr(skipvit_kernels, operator) if public else backend.launcher(operator)
    with torch.no_grad():
        check(Case(cell, backend, launch))


def main() -> None:
    backend = BACKENDS[sys.argv[1]]
    backend.require()
    torch.use_deterministic_algorithms(True)  # a fresh tensor is NaN until it is written
    if len(sys.argv) > 2:
        for name in sys.argv[2:]:
            run(Cell.named(name), backend)
        return
    # Whatever else is printed must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        signal.alarm(SECONDS_PER_CELL)
        failure = None
        try:
            run(Cell.named(line), backend)
        except Exception as error:
            # The comparison and the line of it: an assertion has often nothing else to say.
            lines = [frame.line for frame in traceback.extract_tb(error.__traceback__)[-2:]]
            failure = f"{type(error).__name__}: {error} [{' > '.join(map(str, lines))}]"
        signal.alarm(0)
        launched = [operator for _, operator in launches.elements()]
        launches.clear()
        answers.write(json.dumps([failure, launched]) + "\n")


if __name__ == "__main__":
    main()
