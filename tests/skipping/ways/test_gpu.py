"""torch.compile with CUDA graphs, on a machine with a GPU."""

import pytest
import torch
from skipping.ways import matrix
from torch._dynamo.utils import counters

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="lacks a CUDA GPU")


@pytest.mark.parametrize("method", matrix.METHODS)
def test_triton_kernels_under_cuda_graphs(method):
    torch.compiler.reset()
    counters.clear()
    model, images = matrix.build("ViT", method).cuda(), matrix.images().cuda()
    fast = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    want = matrix.gradients(model, images)
    for _ in range(3):  # a warm-up, a recording, a replay
        torch.compiler.cudagraph_mark_step_begin()
        got = [each.clone() for each in matrix.gradients(fast, images)]
    matrix.same(got, want, **matrix.REORDERED)
    assert counters["inductor"]["cudagraph_skips"] == 0
