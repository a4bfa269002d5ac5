"""Whole models: unpatched, sliced and patched, measured in turn.

    pytest benchmarks/test_models.py --benchmark-only

Every ratio comes from interleaved rounds of one process, first of the shortest calls and then, in
brackets, as the median over the rounds. What pytest-benchmark prints itself is the patched model
alone. Set by the environment, with these defaults:

    SKIPVIT_BENCH_MODEL=vit_small_patch16_224    a timm VisionTransformer
    SKIPVIT_BENCH_CONFIG=6(55%)+11
    SKIPVIT_BENCH_BATCH=8                        images
    SKIPVIT_BENCH_DEVICE=cpu
    SKIPVIT_BENCH_ROUNDS=10
    SKIPVIT_BENCH_THREADS=                       of the CPU; torch's choice
"""

import os

import pytest
import timm
import torch

import skipvit_kernels as sk
from skipvit_kernels import info, measure


def setting(name, default):
    return os.environ.get(f"SKIPVIT_BENCH_{name}", "") or default


MODEL = setting("MODEL", "vit_small_patch16_224")
CONFIG = setting("CONFIG", "6(55%)+11")
BATCH = int(setting("BATCH", "8"))
DEVICE = setting("DEVICE", "cpu")
ROUNDS = int(setting("ROUNDS", "10"))
THREADS = int(setting("THREADS", "0"))


@pytest.fixture(scope="module")
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS or before)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def report(request, threads):
    """Lines to print when all of this file has run."""
    lines = []
    yield lines
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        terminal.write_line("")
        terminal.section(f"{MODEL}, {CONFIG}, batch {BATCH}, {DEVICE}, {threads} CPU threads")
        for line in lines:
            terminal.write_line(line)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    model = timm.create_model(MODEL).to(DEVICE)
    patched = sk.patch(timm.create_model(MODEL).to(DEVICE), CONFIG)
    patched.load_state_dict(model.state_dict())
    return {"unpatched": model, "sliced": measure.sliced(model, CONFIG), "patched": patched}


@pytest.fixture(scope="module", autouse=True)
def compiled_kernels():
    """A number of the plain PyTorch behind the kernels would pass for one of the kernels."""
    key = {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1"}[torch.device(DEVICE).type]
    missing = {kernel.reason for kernel in info.kernels() if kernel.key == key and kernel.reason}
    assert not missing, f"the kernels of {DEVICE} do not run: {missing}"


@pytest.mark.parametrize("mode", ["forward", "training step"])
def test_model(benchmark, models, report, threads, mode):
    config = models["unpatched"].pretrained_cfg
    images = torch.randn(BATCH, *config["input_size"], device=DEVICE)
    labels = torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)
    if mode == "forward":
        calls = {name: measure.forward_step(m.eval(), images) for name, m in models.items()}
    else:
        calls = {
            name: measure.training_step(m.train(), images, labels) for name, m in models.items()
        }
    times = measure.interleave(calls, rounds=ROUNDS, device=DEVICE)
    peaks = {name: measure.peak_memory(call, device=DEVICE) for name, call in calls.items()}
    overhead = times.ratio("patched", "sliced") - 1
    paired_overhead = times.paired_ratio("patched", "sliced") - 1
    speedup = times.ratio("unpatched", "patched")
    paired_speedup = times.paired_ratio("unpatched", "patched")
    ideal = sk.ideal_speedup(models["unpatched"], CONFIG)

    benchmark.extra_info.update(
        model=MODEL, config=CONFIG, mode=mode, batch=BATCH, device=DEVICE, threads=threads,
        load=os.getloadavg()[0],
        seconds=times.seconds, cpu_seconds=times.cpu_seconds, peak_memory=peaks,
        routing_overhead=overhead, paired_routing_overhead=paired_overhead,
        speedup=speedup, paired_speedup=paired_speedup, ideal_speedup=ideal,
    )  # fmt: skip
    if not report:
        report.append(
            f"{'':14}{'unpatched':>12}{'sliced':>12}{'patched':>12}"
            f"{'overhead':>20}{'speed-up':>18}{'ideal':>8}  peak memory, MiB"
        )
    report.append(
        f"{mode:14}"
        + "".join(f"{1000 * times.best(name):9.1f} ms" for name in models)
        + f"{overhead:+10.2%} ({paired_overhead:+.2%})"
        + f"{speedup:10.3f} ({paired_speedup:.3f}){ideal:8.3f}  "
        + " / ".join(f"{peaks[name] / 2**20:.0f}" for name in models)
    )
    benchmark.pedantic(calls["patched"], rounds=3)
