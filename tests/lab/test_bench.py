"""skipvit bench and skipvit advise: what they compute from times, keep, refuse and write."""

import builtins
import copy
import csv
import itertools
import json
import sys
import time
from pathlib import Path

import pytest
import timm
import torch

import skipvit_kernels as sk
from skipvit_kernels import cli, lab
from skipvit_kernels.lab import advise as advising
from skipvit_kernels.lab import bench, clock, machine, report
from skipvit_kernels.lab.advise import advise
from skipvit_kernels.lab.bench import Job, Measurement, TooLittleMemory
from skipvit_kernels.skipping import floor
from skipvit_kernels.skipping.presets import usual

CONFIGS = ("6(55%)+11", ":cls", "6(45%)+fused:cls")


def job(**options):
    """DeiT-tiny at 64 px: 16 patches, 50 ms a training step."""
    return Job(**{**dict(model="deit_tiny_patch16_224", configs=CONFIGS, batch_size=2,
                         training=True, image_size=64, rounds=2, warmup=1), **options})  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    torch.set_num_threads(1)
    found: list[Measurement] = []
    for training in (False, True):
        bench.run(job(training=training), found)
    return found


def test_the_figures_follow_from_the_times(rows):
    assert [row.config for row in rows] == 2 * [
        *("unpatched", *CONFIGS, "sliced 6(55%)+11", "sliced 6(45%)+fused:cls"),
    ]
    model = timm.create_model("deit_tiny_patch16_224", img_size=64)
    by_config = {row.config: row for row in rows[6:]}
    base, floor = by_config["unpatched"], by_config["sliced 6(55%)+11"]
    row = by_config["6(55%)+11"]
    assert row.images_per_second == 2 / min(row.seconds)
    assert row.speedup == min(base.seconds) / min(row.seconds)
    assert row.floor_speedup == floor.speedup and floor.overhead is None
    assert row.overhead == pytest.approx(min(row.seconds) / min(floor.seconds) - 1)
    ratios = [ours / theirs for ours, theirs in zip(row.seconds, floor.seconds, strict=True)]
    assert row.paired_overhead == pytest.approx(sum(ratios) / 2 - 1)  # the median of two
    assert row.ideal_speedup == floor.ideal_speedup == sk.ideal_speedup(model, "6(55%)+11")
    assert row.memory_saved == base.peak_memory - row.peak_memory
    fewer = sk.activations(model) - sk.activations(model, "6(55%)+11")
    assert row.activations_saved == 4 * 2 * fewer
    assert by_config[":cls"].overhead is None and base.ideal_speedup == 1
    assert {row.job.mode for row in rows} == {"forward", "training step"}
    ran = row.record()
    assert [ran[name] for name in ("batch_size", "image_size", "device", "dtype")] == [
        *(2, 64, "cpu", "float32"),
    ]


def test_training_memory_falls_by_the_activations_of_the_skipped_tokens():
    """ViT-S at 224 and batch 8: what the project promises, by the allocator's exact count.

    In smaller batches weights' gradients, which grow as activations go, are a part of the peak.
    """
    model = timm.create_model("vit_small_patch16_224", depth=6).train()
    images, labels = torch.randn(8, 3, 224, 224), torch.zeros(8, dtype=torch.int64)
    steps = {
        config: clock.training_step(sk.patch(floor.twin(model), config), images, labels)
        for config in ("", "3(55%)+6", "3(55%)+6:cls", "3(45%)+fused")
    }
    peaks = {config: clock.peak_memory(step) for config, step in steps.items()}
    for config in list(steps)[1:]:
        fewer = 4 * 8 * (sk.activations(model) - sk.activations(model, config))
        assert peaks[""] - peaks[config] >= fewer, config


def test_what_the_autograd_graph_holds_is_what_is_counted():
    """Every tensor that the blocks save, once each, but for weights and some numbers a row."""
    model = timm.create_model("deit_tiny_patch16_224", depth=3).train()
    for config in ("", "1(55%)+3", ":cls"):
        twin = sk.patch(floor.twin(model), config)
        tokens = torch.randn(2, 197, 192, requires_grad=True)
        held = {tokens.data_ptr(): tokens.numel()}
        weights = {p.data_ptr() for p in model.parameters()}

        def pack(tensor, held=held, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights and tensor.is_floating_point():
                held[storage.data_ptr()] = storage.nbytes() // 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = twin.blocks(tokens)
        counted = 2 * sk.activations(model, config)
        # Means and deviations of the norms, log-sums of the attention: 7 numbers a token and block.
        assert counted <= sum(held.values()) <= 1.01 * counted, (config, output.shape)


def test_a_given_model_is_used_and_left_as_it_is():
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=4).train()
    state, names = copy.deepcopy(model.state_dict()), dir(model)
    found: list[Measurement] = []
    calls: list[int] = []
    small = job(model="mine", configs=("2(50%)+4:cls",), control=True)
    bench.run(small, found, model=model, on_call=lambda: calls.append(1))
    assert [row.config for row in found] == [
        *("unpatched", "unpatched again", "2(50%)+4:cls", "sliced 2(50%)+4:cls"),
    ]
    assert len(calls) == small.num_calls == 4 * (2 + 1) + 2 * 2
    assert not sk.is_patched(model) and dir(model) == names
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("training", [False, True])
def test_each_variant_runs_as_the_job_says(training, monkeypatch):
    """In its mode and precision, compiled, and dropping whatever the notation's warm-up."""
    ran, compiled = [], []

    def step(variant, images, labels=None, *, bfloat16):
        dropping = getattr(variant.blocks, "dropping", False)
        ran.append((dropping, variant.training, len(images), bfloat16))
        return lambda: None

    monkeypatch.setattr(clock, "training_step" if training else "forward_step", step)
    monkeypatch.setattr(torch, "compile", lambda variant: compiled.append(variant) or variant)
    found: list[Measurement] = []
    bench.run(job(configs=("6(55%)+11:warmup=15",), training=training, bfloat16=True,
                  compiled=True, memory=False, check=False), found)  # fmt: skip
    assert ran == [(dropping, training, 2, True) for dropping in (False, True, True)]
    assert len(compiled) == 3
    assert {(row.job.dtype, row.job.compiled) for row in found} == {("bfloat16", True)}
    model = timm.create_model("deit_tiny_patch16_224", img_size=64)
    fewer = sk.activations(model) - sk.activations(model, "6(55%)+11")
    assert found[1].activations_saved == (2 * 2 * fewer if training else None)


def test_block_seconds_are_the_shortest_of_each(monkeypatch):
    count, dropping = itertools.count(), []

    def seconds(variant, blocks, images):
        assert blocks is variant.blocks
        dropping.append(getattr(variant.blocks, "dropping", False))
        call = next(count)
        return [call, 10 - call]

    monkeypatch.setattr(clock, "layer_seconds", seconds)
    best = bench.block_seconds(job(configs=("6(55%)+11:warmup=15",)), rounds=2, warmup=1)
    assert best == {"unpatched": [2, 6], "6(55%)+11:warmup=15": [3, 5]}
    assert dropping == [False, True] * 3


@pytest.mark.parametrize("training", [False, True])
def test_memory_is_refused_from_the_byte_on_that_is_missing(training, monkeypatch):
    """Activations and gradients of a training step, the largest block's of an inference."""
    model = timm.create_model("deit_tiny_patch16_224", img_size=64)
    needed = 4 * 2 * sk.activations(model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    needed = needed + 4 * weights if training else needed // 12
    monkeypatch.setattr(machine, "free_memory", lambda device: needed)
    bench.check_memory(job(training=training), model)
    monkeypatch.setattr(machine, "free_memory", lambda device: needed - 1)
    with pytest.raises(TooLittleMemory, match=r"deit_tiny_patch16_224, .* needs about"):
        bench.check_memory(job(training=training), model)


def test_an_interrupted_run_keeps_the_finished_rounds():
    found: list[Measurement] = []
    calls: list[int] = []

    def interrupt():
        calls.append(1)
        if len(calls) == 6 * 3 + 2:  # warm-up, two rounds, two calls of the third
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(job(rounds=9), found, on_call=interrupt)
    assert [len(row.seconds) for row in found] == [2] * 6
    assert found[1].peak_memory is None and found[1].memory_saved is None
    assert "6(55%)+11" in [report.cells(row, brackets=True)[0] for row in found]


def test_what_fails_its_check_is_not_timed(monkeypatch):
    model = timm.create_model("deit_tiny_patch16_224", img_size=64)
    model.blocks[5].attn.forward = lambda x, attn_mask=None, is_causal=False: 2 * x
    found: list[Measurement] = []
    with pytest.raises(RuntimeError, match=r"with 6\(0%\)\+11 must agree with the unpatched"):
        bench.run(job(), found, model=model)
    assert not found


def test_a_job_that_does_not_fit_is_left_out_and_the_rest_goes_on(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine, "free_memory", lambda device: 30 * 2**20)
    jobs = [job(batch_size=10_000, training=False), job(configs=(":cls",), training=False)]
    rows = report.run_jobs(jobs, report=tmp_path / "out", command="skipvit bench ...")
    assert [row.config for row in rows] == ["unpatched", ":cls"]
    printed = capsys.readouterr().out
    assert "batch 10000, 64 px, float32, cpu needs about" in " ".join(printed.split())
    assert "batch 10000" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(TooLittleMemory, match="GiB are free"):
        bench.run(job(batch_size=100), [])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), MemoryError(),
              RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)  # fmt: skip
def test_memory_that_ends_while_measuring_is_told_apart(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(clock, "interleave", fail)
    with pytest.raises(TooLittleMemory, match="does not fit"):
        bench.run(job(), [])


def test_other_errors_pass(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("something else: an illegal memory access was encountered")

    monkeypatch.setattr(clock, "interleave", fail)
    with pytest.raises(RuntimeError, match="something else"):
        bench.run(job(), [])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(rounds=0), "rounds must be at least 1, got 0"),
        (dict(warmup=-1), "warmup must be at least 0, got -1"),
        (dict(image_size=0), "image_size must be at least 1, got 0"),
        (dict(device="tpu"), 'device must be "cpu" or "cuda", got \'tpu\''),
        (dict(configs=("6(120%)",)), "ratios must lie between 0% and 100%, got 120%"),
        (dict(cuda_graph=True), "cuda_graph needs device cuda and training False"),
    ],
)
def test_jobs_refuse(wrong, message):
    with pytest.raises(ValueError) as caught:
        job(**wrong)
    assert str(caught.value).startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device cuda is not there: torch sees no GPU"):
        job(device="cuda")


def test_unknown_models_are_refused_with_a_guess():
    with pytest.raises(ValueError, match=r"got 'deit_tiny_patch16_22'; did you mean deit_tiny_p"):
        bench.run(job(model="deit_tiny_patch16_22"), [])
    with pytest.raises(ValueError, match=r"model must be a timm VisionTransformer, .* got ResNet"):
        bench.run(job(model="resnet18", image_size=None), [])
    with pytest.raises(ValueError, match="resnet18 cannot be built at 64 px"):
        bench.run(job(model="resnet18"), [])


# ----------------------------------------------------------------------------- measure


def test_twins_share_weights_and_nothing_else():
    model = timm.create_model("deit_tiny_patch16_224", depth=2)
    twin = floor.twin(model)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)
    sk.patch(twin, "1(50%)+2")
    assert not sk.is_patched(model)


def test_resident_peak_counts_what_is_written():
    if clock.resident_peak(lambda: None) is None:
        pytest.skip("needs Linux, glibc and a /proc/self/clear_refs that can be written")
    peak = clock.resident_peak(lambda: torch.ones(2**24).sum())  # 64 MiB
    assert 63 * 2**20 < peak < 80 * 2**20  # the kernel counts in batches of pages


def test_resident_peak_counts_what_an_earlier_call_freed_and_this_one_uses_again():
    def pieces():
        return [torch.ones(2**13) for _ in range(2**11)]  # 64 MiB, so small that the heap keeps it

    if clock.resident_peak(lambda: None) is None:
        pytest.skip("needs Linux, glibc and a /proc/self/clear_refs that can be written")
    *freed, last = pieces()  # the last stays, or the heap would shrink
    del freed
    assert clock.resident_peak(pieces) > 60 * 2**20
    assert last.sum() == 2**13


def test_layer_seconds_tell_the_slow_block():
    model = timm.create_model("deit_tiny_patch16_224", depth=4, img_size=32).eval()
    model.blocks[2].mlp.register_forward_pre_hook(lambda module, args: time.sleep(0.05))
    for config in ("", "2(50%)+4:cls"):
        patched = sk.patch(copy.deepcopy(model), config)
        hooks = [len(module._forward_pre_hooks) for module in patched.modules()]
        seconds = clock.layer_seconds(patched, patched.blocks, torch.randn(1, 3, 32, 32))
        assert len(seconds) == 4 and max(seconds) == seconds[2] > 0.05
        assert [len(module._forward_pre_hooks) for module in patched.modules()] == hooks


# ------------------------------------------------------------------------------ report


def test_the_page_has_every_number(rows, tmp_path):
    blocks = {"unpatched": [0.002] * 12, "6(55%)+11": [0.001] * 12}
    page = report.write_page(
        tmp_path, rows, command="skipvit bench", skipped=["too large"], blocks=blocks
    )
    text = page.read_text()
    for part in (
        f"- CPU: {machine.cpu_name()}, 1 threads",
        "    skipvit bench",
        "- too large",
        "`6(45%)+fused:cls`",
        "## deit_tiny_patch16_224, training step, batch 2, 64 px, float32, cpu, 1 threads",
    ):
        assert part in text  # fmt: skip
    saved = next(row for row in rows[6:] if row.config == "6(55%)+11")
    assert f" | {saved.memory_saved / 2**20:.1f} | {saved.activations_saved / 2**20:.1f} |" in text
    for name in ("speedup", "memory", "blocks"):
        assert f"({name}.png)" in text and (tmp_path / f"{name}.png").stat().st_size > 10_000
    loaded = json.loads((tmp_path / "results.json").read_text())
    assert loaded == [row.record() for row in rows] and loaded[7]["seconds"] == rows[7].seconds
    with (tmp_path / "results.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [r["config"] for r in read] == [row.config for row in rows]
    assert float(read[7]["speedup"]) == pytest.approx(rows[7].speedup, rel=1e-4)
    written = Path(__file__).parents[2] / "docs" / "results" / "models_cpu" / "results.csv"
    assert ",".join(read[0]) == written.read_text().splitlines()[0]  # what reads them reads both


SIZES = sk.ViTShape(depth=12, num_patches=16, embed_dim=192)


def known_rows():
    """Unpatched, patched, sliced; no two of the ratios are the same."""
    seconds = {
        "unpatched": [0.24, 0.30, 0.33],
        "6(55%)+11": [0.20, 0.24, 0.22],
        "sliced 6(55%)+11": [0.22, 0.16, 0.21],
    }
    job = Job("deit", ("6(55%)+11",), batch_size=2, training=True, image_size=64)
    peaks = {"unpatched": 40 * 2**20, "6(55%)+11": 30 * 2**20}
    rounds = [
        dict(zip(seconds, calls, strict=True)) for calls in zip(*seconds.values(), strict=True)
    ]
    about = (SIZES, clock.Times(rounds), peaks, {}, 0.0)
    return [bench.measurement(job, name, *about) for name in job.variants]


def test_each_cell_holds_the_figure_of_its_column():
    unpatched, patched, sliced = known_rows()
    assert dict(zip(report.COLUMNS, report.cells(patched, brackets=True), strict=True)) == {
        "setting": "6(55%)+11",
        "images/s": "10.0",
        "speed-up": "1.250 (1.200)",  # the medians of 24 / 20, 30 / 24, 33 / 22,
        "sliced": "1.571 (1.500)",  # of 24 / 22, 30 / 16, 33 / 21
        "ideal": f"{sk.ideal_speedup(SIZES, '6(55%)+11'):.3f}",
        "routing overhead": "+4.8% (+25.0%)",  # and of 20 / 22, 24 / 16, 22 / 21
        "peak memory": "30 MiB",
    }
    assert report.cells(patched, brackets=False)[2::3] == ["1.250", "+4.8%"]
    assert report.cells(unpatched, brackets=True) == [
        *("unpatched", "8.3", "1", "", "1", "", "40 MiB"),
    ]
    assert patched.memory_saved == 10 * 2**20 and sliced.memory_saved is None


def test_the_charts_draw_the_rows():
    rows = known_rows()

    def drawn(figure):
        (axes,) = figure.axes
        marks = [[x for x, _ in marks.get_offsets().tolist()] for marks in axes.collections]
        names = [label.get_text() for label in axes.get_yticklabels()]
        return names, [bar.get_width() for bar in axes.patches], marks

    speed, memory = report.speedup_chart(rows), report.memory_chart(rows)
    ideal = sk.ideal_speedup(SIZES, "6(55%)+11")
    fewer = 4 * 2 * (sk.activations(SIZES) - sk.activations(SIZES, "6(55%)+11")) / 2**20
    assert fewer > 0.5  # MiB, of 40
    assert drawn(speed) == (["6(55%)+11"], [1.25], [[ideal], [0.33 / 0.21]])
    assert drawn(memory) == (["unpatched", "6(55%)+11"], [40, 30], [[40, 40 - fewer]])


def test_charts_need_something_to_draw(rows):
    assert report.memory_chart(rows[:6]) is None  # inference only
    assert report.speedup_chart([]) is None and report.memory_chart([]) is None


# ------------------------------------------------------------------------------ advise


def fake_run(speedups, control=1.0, rounds=8, seconds=0.001):
    """bench.run with given speed-ups by configuration: (patched, sliced)."""

    def run(job, rows, *, model=None, on_call=None):
        speeds = {"unpatched": 1.0, bench.CONTROL: control}
        for config in job.configs:
            patched, floor = speedups.get(config, (1.0, 1.0))
            speeds |= {config: patched, f"sliced {config}": floor}
        times = clock.Times([{name: seconds / speeds[name] for name in job.variants}] * rounds)
        about = (sk.ViTShape.of(model), times, {}, {}, 0.0)
        rows += [bench.measurement(job, name, *about) for name in job.variants]

    return run


@pytest.fixture
def model():
    return timm.create_model("deit_tiny_patch16_224")


def test_advice_when_skipping_pays(model, monkeypatch):
    merge = "6(55%)+12:merge,cls"
    times = {
        **{":cls": (1.07, 1.07), "6(55%)+11:cls": (1.38, 1.39), "6(45%)+fused:cls": (1.3, 1.4)},
        merge: (1.35, 1.36),
    }
    monkeypatch.setattr(bench, "run", fake_run(times, control=1.004))
    advice = advise(model, 8)
    assert advice.recommended == "6(55%)+11:cls" and advice.lossless == ":cls"
    assert advice.untrained == merge
    order = [finding.config for finding in advice.findings]
    assert order[:4] == ["6(55%)+11:cls", merge, "6(45%)+fused:cls", ":cls"]
    marginal = "4,5,8(27%,33%,50%)+12:merge,score=marginal,match=keys,cls"
    assert set(order[4:]) == {"4,7(30%,30%)+10:cls", marginal}
    assert advice.noise == pytest.approx(0.004)
    text = repr(advice)
    assert 'sk.patch(model, "6(55%)+11:cls"). It changes the outputs' in text
    assert f'without training: sk.patch(model, "{merge}")' in text
    assert 'without any loss: sk.patch(model, ":cls")' in text
    assert not sk.is_patched(model)


def test_advice_where_nothing_pays_says_what_limits(model, monkeypatch):
    times = {
        ":cls": (1.01, 1.01),
        "6(55%)+11:cls": (0.98, 1.01),  # the floor is no faster: launch-bound
        "4,7(30%,30%)+10:cls": (0.99, 1.2),  # the floor is: our routing takes it
    }
    monkeypatch.setattr(bench, "run", fake_run(times))
    advice = advise(model, 1, training=False)
    assert advice.recommended is None and advice.lossless is None
    reasons = {finding.config: finding.reason for finding in advice.findings}
    assert "fewer tokens do not make the blocks faster here" in reasons[":cls"]
    assert "fewer tokens do not make the blocks faster here" in reasons["6(55%)+11:cls"]
    assert "the selection takes what the tokens save, +21.2%" in reasons["4,7(30%,30%)+10:cls"]
    assert "Recommended: none" in str(advice)


def test_advice_does_not_trust_noise(model, monkeypatch):
    times = {config: (1.1, 1.1) for config in usual(model)[0]}
    monkeypatch.setattr(bench, "run", fake_run(times, control=0.92))
    advice = advise(model, 8)
    assert advice.recommended is None and advice.noise == pytest.approx(0.08)
    assert "differed from itself by 8%" in str(advice)
    assert "nothing can be told from the noise" in str(advice)


def test_advice_takes_the_largest_batch_that_fits(model, monkeypatch):
    measured = fake_run({})

    def run(job, rows, **options):
        if job.batch_size > 5:
            raise TooLittleMemory(f"batch {job.batch_size} is too much")
        measured(job, rows, **options)

    monkeypatch.setattr(bench, "run", run)
    advice = advise(model, 64)
    assert "batch 4, float32, cpu" in advice.workload
    assert advice.notes == ("Measured at batch 4, not 64: batch 8 is too much.",)


def test_advice_is_of_the_batch_that_the_time_allows(model, monkeypatch):
    """Thirteen variants at a second each, and five rounds of twice that are more than a minute."""
    monkeypatch.setattr(bench, "run", fake_run({}, seconds=1.0))
    advice = advise(model, 8, seconds=60)
    assert ", batch 1, " in advice.workload
    assert "Measured at batch 1, not 8: 2 would take too long." in str(advice)
    monkeypatch.setattr(bench, "run", fake_run({}))
    advice = advise(model, 8, seconds=60)
    assert ", batch 8, " in advice.workload and not advice.notes


def test_advice_for_a_patched_model_leaves_it_patched(model, monkeypatch):
    sk.patch(model, "4(50%)+7", warmup_epochs=2)
    monkeypatch.setattr(bench, "run", fake_run({":cls": (1.07, 1.07)}))
    advice = advise(model, 8)
    assert advice.recommended == advice.untrained == ":cls" and "training:" not in str(advice)
    assert str(model.blocks.config) == "4(50%)+7:warmup=2"


def test_advice_names_arithmetic_that_allows_nothing(model, monkeypatch):
    monkeypatch.setattr(advising, "usual", lambda model: (("11(5%)+12",), []))
    monkeypatch.setattr(bench, "run", fake_run({}))
    assert "the arithmetic allows no more" in advise(model, 8).findings[0].reason


def test_advice_on_this_machine_in_little_time():
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=4).eval()
    advice = advise(model, 2, image_size=96, seconds=6)
    assert {finding.config for finding in advice.findings} == set(usual(model)[0])
    assert "training step, batch " in advice.workload and "96 px" in advice.workload
    assert model.patch_embed.img_size == (64, 64) and not model.training


def test_advice_refuses():
    with pytest.raises(ValueError, match=r"model must be a timm VisionTransformer, .* got Linear"):
        advise(torch.nn.Linear(2, 2))
    model = timm.create_model("deit_tiny_patch16_224", depth=2)
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        advise(model, seconds=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        advise(model, 0)
    with pytest.raises(ValueError, match="seconds must allow one round"):
        advise(model, 1, seconds=0.01)


# -------------------------------------------------------------------------- command line


def test_the_bench_command_writes_its_report(capsys, tmp_path):
    out = tmp_path / "out"
    arguments = ["bench", "deit_tiny_patch16_224", "--image-size", "64", "--batch-size", "2",
                 "--rounds", "1", "--config", "6(55%)+11", "--report", str(out)]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "6(55%)+11" in printed and "training step" in printed
    assert f"    skipvit {' '.join(arguments[:-4])} --config '6(55%)+11'" in (
        (out / "report.md").read_text()
    )


def test_an_interrupted_bench_command_keeps_what_it_has(monkeypatch, capsys, tmp_path):
    run = bench.run

    def interrupted(job, rows, **options):
        if job.training:
            raise KeyboardInterrupt
        run(job, rows, **options)

    monkeypatch.setattr(bench, "run", interrupted)
    arguments = ["bench", "deit_tiny_patch16_224", "--image-size", "64", "--batch-size", "2",
                 "--rounds", "1", "--config", ":cls", "--report", str(tmp_path)]  # fmt: skip
    assert cli.main(arguments) == 130
    assert ":cls" in capsys.readouterr().out
    assert [r["mode"] for r in json.loads((tmp_path / "results.json").read_text())] == [
        *("forward", "forward"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "vit_smal"], "skipvit bench: model must be a timm model's name, got 'vit_smal'"),
        (["bench", "--config", "6(120%)"], "skipvit bench: ratios must lie between"),
        (["bench", "deit_tiny_patch16_224", "--config", "13(20%)"], "skipvit bench: drop_at must"),
        (["bench", "resnet18"], "skipvit bench: model must be a timm VisionTransformer"),
        (["bench", "--report", __file__], "skipvit bench: report must be a folder that can be"),
        (["bench", "--threads", "0"], "skipvit bench: threads must be at least 1, got 0"),
        (["advise", "resnet18"], "skipvit advise: model must be a timm VisionTransformer"),
        (["advise", "deit_tiny_patch16_224", "--seconds", "-1"], "skipvit advise: seconds must be"),
    ],
)
def test_commands_refuse_by_name(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("bench", "matplotlib", "bench"), ("bench", "timm", "bench"), ("advise", "timm", "timm")],
)
def test_a_missing_package_names_the_extra(command, package, extra, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "skipvit_kernels.lab.report")
    monkeypatch.delattr(lab, "report")
    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main([command, "deit_tiny_patch16_224"]) == 1
    assert capsys.readouterr().err == (
        f"skipvit {command} needs {package}, which is not installed: "
        f'pip install "skipvit_kernels[{extra}]"\n'
    )
