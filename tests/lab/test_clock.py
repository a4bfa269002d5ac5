"""Interleaved timing and peak memory."""

import gc
import itertools
import time

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import skipvit_kernels as sk
from skipvit_kernels.lab import clock
from skipvit_kernels.skipping.floor import sliced, twin


@pytest.fixture(autouse=True)
def one_thread():
    """More of them wait for each other on a busy machine, many times as long as they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model():
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=4, num_classes=10, embed_dim=32, depth=12, num_heads=2
    )


def test_training_step_reaches_every_weight_and_holds_no_gradients():
    model, grads = torch.nn.Linear(4, 3), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: grads.append(p.grad.abs().sum()))
    clock.training_step(model, torch.randn(8, 4), torch.randint(3, (8,)))()
    assert len(grads) == 2 and min(grads) > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("bfloat16", [False, True])
def test_steps_run_under_autocast_and_inference_records_nothing(bfloat16):
    model, seen = torch.nn.Linear(4, 3), []
    model.register_forward_hook(lambda _, args, out: seen.append((out.dtype, out.requires_grad)))
    images, labels = torch.randn(8, 4), torch.randint(3, (8,))
    clock.forward_step(model, images, bfloat16=bfloat16)()
    clock.training_step(model, images, labels, bfloat16=bfloat16)()
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    assert seen == [(dtype, False), (dtype, True)]


def test_interleave_takes_turns_without_garbage_collection():
    turns = []
    calls = {name: lambda name=name: turns.append((name, gc.isenabled())) for name in "AB"}
    times = clock.Times([])
    clock.interleave(calls, times, rounds=3, warmup=1)
    assert turns == [("A", False), ("B", False)] * 4
    assert gc.isenabled()
    assert [list(seconds) for seconds in times.rounds] == [["A", "B"]] * 3


def test_interleave_times_each_call_and_keeps_whole_rounds():
    slow, times = itertools.cycle([0.0, 0.05]), clock.Times([])
    calls = {"A": lambda: None, "B": lambda: time.sleep(next(slow))}
    turns = itertools.count(1)

    def on_call():
        if next(turns) == 6:  # in the third round
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clock.interleave(calls, times, rounds=9, warmup=0, on_call=on_call)
    assert len(times.rounds) == 2 and max(times.of("A")) < 0.05 <= times.of("B")[1]


def test_interleave_turns_garbage_collection_on_again_after_an_error():
    with pytest.raises(ZeroDivisionError):
        clock.interleave({"A": lambda: 1 / 0}, clock.Times([]), rounds=1, warmup=0)
    assert gc.isenabled()


def test_the_time_on_a_device_is_between_its_own_events(monkeypatch):
    """Begun after all that it was handed before; here a pretended one, with 5 ms between events."""
    done, clocks = [], itertools.count(0, 5)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")
            self.at = next(clocks)

        def elapsed_time(self, end):
            assert done[-1] == "synchronize"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    times, calls = clock.Times([]), {"A": lambda: done.append("call")}
    clock.interleave(calls, times, rounds=1, warmup=0, device="cuda")
    assert done == ["synchronize", "record", "call", "record", "synchronize"]
    assert times.rounds == [{"A": 0.005}]


def test_ratios():
    times = clock.Times([{"A": 2.0, "B": 4.0}, {"A": 9.0, "B": 3.0}, {"A": 6.0, "B": 3.0}])
    assert times.best("A") == 2
    assert times.ratio("A", "B") == pytest.approx(2 / 3)
    assert times.paired_ratio("A", "B") == 2  # of 0.5, 3 and 2


def test_peak_memory_is_of_what_is_held_at_once():
    def call():
        a = torch.empty(1000)
        b = torch.empty(2000)  # 12,000 bytes together: the peak
        del a
        c = torch.empty(500)
        del b, c
        torch.empty(2800)

    outside = torch.empty(10**6)
    assert clock.peak_memory(call) == 12_000
    assert clock.peak_memory(lambda: outside.add_(1)) < 1000


def test_peak_memory_of_a_training_step_follows_the_tokens():
    images, labels = torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)
    plain = make_model()
    steps = [
        clock.training_step(model, images, labels)
        for model in (plain, sliced(plain, "6(55%)+11"), sliced(plain, "2(55%)"))
    ]
    some, fewer, least = (clock.peak_memory(step) for step in steps)
    assert clock.peak_memory(steps[0]) == some
    assert least < 0.7 * some < fewer < 0.9 * some


@pytest.mark.parametrize("config", ["6(55%)+11", "4,7(30%,30%)+10:mean", "6(45%)+fused", ":cls"])
def test_an_inference_holds_no_more_than_the_unpatched_model(config):
    """Keys and scores go before the blocks behind them run, tokens of a run before the next one."""
    model = VisionTransformer(
        img_size=64, patch_size=4, num_classes=10, embed_dim=64, depth=12, num_heads=2
    ).eval()
    images = torch.randn(4, 3, 64, 64)
    plain, patched = (
        clock.forward_step(each, images) for each in (model, sk.patch(twin(model), config))
    )
    plain(), patched()
    assert clock.peak_memory(patched) <= clock.peak_memory(plain)
