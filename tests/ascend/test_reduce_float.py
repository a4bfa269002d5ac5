"""Does WholeReduceSum of float32 add every lane, in float32? For a build with SKIPVIT_REDUCE_FLOAT.

CANN's page names half alone; on a 910A docs/ascend.md, step 6, asks the chip. The gradient to the
scores of dropped patches is such a sum and nothing else. Terms are whole numbers times a power of
two, so a sum is exact in float32 in any order, and right or wrong bit for bit; half, or one lane
too few, gives another. Elsewhere the test itself is tested, on the CPU model.
"""

import ctypes
import importlib

import pytest
import torch
from ascend import model
from backend_matrix import BACKENDS

PATCHES = 100  # two tiles of rows, the last one short
CHANNELS = [8, 24, 56, 64, 72, 384, 2056]  # lanes of a whole repeat, of a part, folded before


def on_model(reduce_float):
    if model.unavailable_reason() is not None:
        pytest.skip(str(model.unavailable_reason()))
    library = model.load(model.build(reduce_float=reduce_float))

    def launch(grad, x, scores, index):
        args = {"grad": grad, "x": x, "scores": scores, "index": index}
        return model.run("gather_topk_fuse_backward", args, (), 2, library)[1]

    return launch


def on_device():
    backend = BACKENDS["npu"]
    launch = backend.launcher("gather_topk_fuse_backward")
    library = ctypes.CDLL(str(importlib.import_module(backend.module).LIBRARY))
    if not library.skipvit_ascend_reduces_float():
        pytest.fail("this build leaves the sum across lanes to the scalar unit: build it again "
                    "with SKIPVIT_REDUCE_FLOAT=1")  # fmt: skip
    return lambda *tensors: launch(*(tensor.to(backend.device) for tensor in tensors))[1].cpu()


WAYS = {
    "npu-model": lambda: on_model(True),
    "npu-model, scalar unit": lambda: on_model(False),
    **({"npu": on_device} if "npu" in BACKENDS else {}),
}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def sums_of(request):
    """The sums of the rows of (patches, channels)."""
    launch = request.param()

    def sums(rows):
        patches, channels = rows.shape
        x = torch.cat([torch.zeros(1, channels), rows])[None]  # behind a prefix token
        grad = torch.stack([torch.zeros(channels), torch.ones(channels)])[None]
        index = torch.zeros(1, 1, dtype=torch.int64)  # no patch was kept
        return launch(grad, x, torch.zeros(1, patches), index)[0]

    return sums


def right(got, rows):
    want = rows.double().sum(1).float()
    wrong = (got != want).nonzero().flatten().tolist()
    assert not wrong, (
        f"{len(wrong)} of {len(want)} sums of {rows.shape[1]} lanes are wrong; that of row "
        f"{wrong[0]} is {got[wrong[0]].item()!r} and should be {want[wrong[0]].item()!r}"
    )


@pytest.mark.parametrize("channels", CHANNELS)
def test_every_lane_is_in_the_sum(sums_of, channels):
    """One lane of each row is not zero; half would round its number."""
    for first in range(0, channels, PATCHES):
        rows = torch.zeros(min(PATCHES, channels - first), channels)
        lane = torch.arange(len(rows))
        rows[lane, first + lane] = 2.0**20 + 1 + lane
        right(sums_of(rows), rows)


@pytest.mark.parametrize("exponent", [-40, 0, 40], ids="2^{}".format)
@pytest.mark.parametrize("channels", CHANNELS)
def test_the_sum_is_of_float32(sums_of, channels, exponent):
    """Terms of up to 12 bits and of both signs: sums of 2,056 of them have 24."""
    rows = torch.randint(-4095, 4096, (PATCHES, channels)) * 2.0**exponent
    right(sums_of(rows), rows)
