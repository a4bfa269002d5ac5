"""Whole models on a GPU, bfloat16: the routing overhead in training, and batch 1 under CUDA graphs.

    pytest benchmarks/test_models_gpu.py -s

The figures to reach (docs/triton.md): at most 2 % of routing overhead in a training step of batch
256, and at batch 1 under CUDA graphs never slower than the unpatched model under CUDA graphs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch

import skipvit_kernels as sk
from skipvit_kernels import measure

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA or ROCm GPU", allow_module_level=True)
timm = pytest.importorskip("timm")

# 5 and 10 twelfths of the depth.
MODELS = {
    "vit_small_patch16_224": "6(55%)+11",
    "vit_base_patch16_224": "6(55%)+11",
    "vit_large_patch16_224": "11(55%)+21",
}


def autocast(call: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            call()

    return run


def models(name: str) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    model = timm.create_model(name).cuda()
    patched = sk.patch(timm.create_model(name).cuda(), MODELS[name])
    patched.load_state_dict(model.state_dict())
    return {"unpatched": model, "sliced": measure.sliced(model, MODELS[name]), "patched": patched}


@pytest.mark.parametrize("name", MODELS)
def test_training_step(name: str) -> None:
    images = torch.randn(256, 3, 224, 224, device="cuda")
    labels = torch.zeros(256, dtype=torch.int64, device="cuda")
    calls = {
        key: autocast(measure.training_step(model.train(), images, labels))
        for key, model in models(name).items()
    }
    times = measure.interleave(calls, rounds=20, warmup=5, device="cuda")
    overhead = times.paired_ratio("patched", "sliced") - 1
    print(
        f"\n{name} {MODELS[name]} training, batch 256: "
        + ", ".join(f"{key} {1000 * times.best(key):.2f} ms" for key in calls)
        + f"; overhead {overhead:+.2%} (at most 2 %),"
        f" speed-up {times.paired_ratio('unpatched', 'patched'):.3f}"
    )
    assert overhead <= 0.02


@pytest.mark.parametrize("name", MODELS)
def test_batch_1_under_cuda_graphs(name: str) -> None:
    image = torch.randn(1, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    graphs = {}
    with torch.inference_mode():
        for key, model in models(name).items():
            model = model.eval().to(torch.bfloat16)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    model(image)
            torch.cuda.current_stream().wait_stream(stream)
            graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[key]):
                model(image)

    def replays(graph: torch.cuda.CUDAGraph) -> Callable[[], None]:
        def run() -> None:
            for _ in range(20):
                graph.replay()

        return run

    times = measure.interleave(
        {key: replays(graph) for key, graph in graphs.items()}, rounds=50, warmup=5, device="cuda"
    )
    medians = {key: statistics.median(times.seconds[key]) / 20 for key in graphs}
    print(
        f"\n{name} {MODELS[name]} forward, batch 1, CUDA graphs: "
        + ", ".join(f"{key} {1e6 * seconds:.1f} us" for key, seconds in medians.items())
    )
    assert medians["patched"] <= medians["unpatched"]
