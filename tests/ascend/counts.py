"""What the busiest core of each Ascend kernel does, counted on the CPU model, and an estimate.

    python tests/ascend/counts.py        # prints the table, writes docs/results/ascend_counts.md

DeiT-S: 32 images of 1 + 196 tokens and 384 channels, 6 heads of 64, 89 patches kept, 32 cores. The
model counts; the cycles are guesses (`Cost` in kernel_operator.h), laid out over the pipes in the
order that flags and queues allow. The share is that of the chip's bandwidth that the bytes which
must move would then take. Nothing was measured: no NPU has run these kernels.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]
from ascend import model  # noqa: E402

RESULT = model.REPOSITORY / "docs" / "results" / "ascend_counts.md"
BATCH, PATCHES, CHANNELS, HEADS, WIDTH, KEEP, CORES = 32, 196, 384, 6, 64, 89, 32
BYTES_PER_CYCLE = 32  # of a core: CANN's own cost model of the 910A
DTYPES = torch.float16, torch.float32
SUMMING = "cls_scores", "gather_topk_fuse_backward"  # use the sum across lanes where they may
# The share that each launch must reach; those of SUMMING with the sum across lanes.
FLOORS = {"cls_scores": 0.15}
FLOOR = 0.40


class Row(NamedTuple):
    operator: str
    dtype: str
    launch: int
    launches: int
    count: model.Count

    @property
    def share(self) -> float:
        return self.count.must_move / (CORES * BYTES_PER_CYCLE * self.count.cycles)


def calls(
    dtype: torch.dtype,
) -> dict[str, tuple[dict[str, torch.Tensor | None], tuple[float, ...]]]:
    """Arguments of each operator: scores are a softmax, so they lie as in a model."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, 1 + PATCHES, CHANNELS).to(dtype)
    scores = torch.randn(BATCH, PATCHES).softmax(-1)
    index = torch.cat(
        [torch.zeros(BATCH, 1, dtype=torch.int64), scores.topk(KEEP).indices.sort().values + 1], 1
    )
    tokens = torch.randn(BATCH, 1 + KEEP, CHANNELS).to(dtype)
    fused = torch.randn(BATCH, 2 + KEEP, CHANNELS).to(dtype)
    update = torch.randn(BATCH, CHANNELS).to(dtype)
    q = torch.randn(BATCH, HEADS, WIDTH).to(dtype)
    k = torch.randn(BATCH, 1 + PATCHES, 3, HEADS, WIDTH).to(dtype).permute(2, 0, 3, 1, 4)[1]
    return {
        "cls_scores": ({"q": q, "k": k}, (WIDTH**-0.5, 1)),
        "gather_topk": ({"x": x, "scores": scores}, (KEEP, 1)),
        "gather_topk_fuse": ({"x": x, "scores": scores}, (KEEP, 1)),
        "gather_topk_fuse_backward": (
            {"grad": fused, "x": x, "scores": scores, "index": index},
            (),
        ),
        "gather_rows": ({"x": x, "index": index}, ()),
        "gather_rows_backward": ({"grad": tokens, "index": index}, (1 + PATCHES,)),
        "scatter_back": ({"x": x, "tokens": tokens, "index": index, "update": None}, ()),
        "scatter_back, update": ({"x": x, "tokens": tokens, "index": index, "update": update}, ()),
        "scatter_back_backward": ({"grad": x, "index": index}, (0,)),
        "scatter_back_backward, update": ({"grad": x, "index": index}, (1,)),
    }


def rows(
    reduce_float: bool, factor: float = 1, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> list[Row]:
    library = model.load(model.build(reduce_float=reduce_float))
    model.scale_costs(factor, library)
    found = []
    for dtype in dtypes:
        for operator, (tensors, numbers) in calls(dtype).items():
            if reduce_float and operator not in SUMMING:
                continue
            model.run(operator.split(",")[0], tensors, numbers, CORES, library)
            counts = model.last_counts(library)
            name = str(dtype).removeprefix("torch.")
            found += [Row(operator, name, i, len(counts), c) for i, c in enumerate(counts)]
    return found


HEAD = """# Ascend910A: instructions counted, time estimated

**An estimate. Nothing here was measured, and no NPU has run these kernels.**
`python tests/ascend/counts.py` runs them on the CPU model of a core and writes this page.

DeiT-S: {batch} images, 1 + {patches} tokens, {channels} channels, {heads} heads of {width}, {keep}
patches kept, {cores} cores. Counts are of the busiest core. The cycles lay the costs at the end
over the pipes (scalar, vector, loads, stores) as far as flags, queues and barriers let them
overlap. The share is the bytes that must move (each read once and each written once, by all cores)
at {rate} bytes a cycle and core, over those cycles. The last column doubles every cost but those of
bytes and repeats: the guesses are of the right order of magnitude at best, and that is what it
shows. "Sums across lanes" is a build with SKIPVIT_REDUCE_FLOAT (`ascend_ops/kernels/fold.h`);
without it the scalar unit adds the last eight lanes of each dot product.

| operator | dtype | launch | kernel | instructions | scalar accesses | vector | DMAs | KB \
| cycles | share | at twice the cost |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def table() -> str:
    lines = []
    for reduce_float in (False, True):
        dear = rows(reduce_float, 2)
        for row, twice in zip(rows(reduce_float), dear, strict=True):
            c = row.count
            kernel = f"{c.kernel}, sums across lanes" if reduce_float else c.kernel
            cells = [row.operator, row.dtype, f"{row.launch + 1} of {row.launches}", kernel]
            cells += [c.instructions, c.scalars, c.vectors, c.transfers, f"{c.bytes / 1024:.0f}"]
            cells += [f"{c.cycles:.0f}", f"{row.share:.0%}", f"{twice.share:.0%}"]
            lines.append(f"| {' | '.join(map(str, cells))} |\n")
    return "".join(lines)


def costs() -> str:
    """The guesses, as kernel_operator.h states them."""
    header = (model.ROOT / "tests/ascend/kernel_operator.h").read_text()
    block = header[header.index("struct Cost {") : header.index("inline Cost cost;")]
    found = re.findall(r"double (\w+) = ([\d./ ]+);\s+// (.*)", block)
    return "".join(f"| {name} | {value} | {of} |\n" for name, value, of in found)


def main() -> int:
    text = HEAD.format(
        batch=BATCH, patches=PATCHES, channels=CHANNELS, heads=HEADS, width=WIDTH, keep=KEEP,
        cores=CORES, rate=BYTES_PER_CYCLE,
    )  # fmt: skip
    text += f"{table()}\n| cost | cycles of 1 ns | of |\n|---|---|---|\n{costs()}"
    print(text)
    RESULT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
