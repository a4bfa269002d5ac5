"""skipvit demo, on few images and a narrow model."""

import builtins
import copy
import csv
import sys

import matplotlib.image
import pytest
import torch
from torch.utils.data import TensorDataset

import skipvit_kernels as sk
from skipvit_kernels import cli, lab
from skipvit_kernels.lab import clock, demo


@pytest.fixture(autouse=True)
def one_thread():
    """More of them wait for each other on a busy machine, many times as long as they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    train, test = demo.digits()
    few = TensorDataset(*train[:96]), TensorDataset(*test[:100])
    monkeypatch.setattr(demo, "digits", lambda: few)
    monkeypatch.setattr(demo, "WIDTH", 16)
    monkeypatch.setattr(demo, "ROUNDS", 2)


def test_demo_writes_what_it_measured(small, tmp_path, capsys):
    out = tmp_path / "new" / "results"
    assert cli.main(["demo", "--epochs", "1", "--out", str(out), "--seed", "3"]) == 0
    assert {path.name for path in out.iterdir()} == {"results.csv", "results.png", "skipped.png"}

    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["config"] for row in rows] == ["unpatched", *demo.CONFIGS]
    assert [row["tokens"] for row in rows] == [
        *("65x12", "65x5, 30x5, 65x2", "65x5, 38x7", "65x5, 30x6, 65x1"),
    ]
    unpatched, *skipping = rows
    assert (unpatched["speedup"], unpatched["ideal_speedup"]) == ("1", "1")
    assert unpatched["overhead"] == unpatched["paired_overhead"] == ""
    model = demo.build_model(0)
    for row in skipping:
        ideal = sk.ideal_speedup(model, row["config"])
        assert float(row["ideal_speedup"]) == pytest.approx(ideal, rel=1e-4)
        speed = float(row["images_per_second"]) / float(unpatched["images_per_second"])
        assert float(row["speedup"]) == pytest.approx(speed, rel=1e-3)
        assert 0.3 < float(row["paired_speedup"]) < 3
        assert float(row["paired_overhead"]) > -0.7
        assert int(row["peak_memory"]) < int(unpatched["peak_memory"])
    for row in rows:
        assert (100 * float(row["accuracy"])) == pytest.approx(round(100 * float(row["accuracy"])))
        assert 0 <= float(row["accuracy"]) <= 1

    for name in ("results.png", "skipped.png"):
        height, width, _ = matplotlib.image.imread(out / name).shape
        assert width == 1800 and 500 < height < 1000
    printed = capsys.readouterr().out
    for whole in ("6(55%)+11", "6(45%)+fused", "65x5, 38x7", "overhead", "top-1"):
        assert whole in printed
    assert max(map(len, printed.splitlines())) <= 80 + len(str(out))


def test_overhead_is_over_the_sliced_floor_and_noise_is_named(small, tmp_path, monkeypatch, capsys):
    seconds = {
        "unpatched": [4.0, 8.0, 8.0], "6(55%)+11": [3.0, 6.0, 4.0], "6(45%)+fused": [2.0, 2.0, 2.0],
        "6(55%)+12:merge": [3.0, 6.0, 4.0], "sliced 6(55%)+12:merge": [2.0, 4.0, 4.0],
        "sliced 6(55%)+11": [2.0, 4.0, 4.0], "sliced 6(45%)+fused": [2.0, 4.0, 2.5],
    }  # fmt: skip
    models = []

    def known(steps, times, *, rounds, **options):
        assert steps.keys() == seconds.keys() and rounds == 2
        before = copy.deepcopy(models[0].state_dict())
        for step in steps.values():
            step()
        for name, value in models[0].state_dict().items():
            assert torch.equal(value, before[name]), name
        rows = zip(*seconds.values(), strict=True)
        times.rounds.extend(dict(zip(seconds, row, strict=True)) for row in rows)

    measure = demo._measure
    monkeypatch.setattr(demo, "_measure", lambda model: models.append(model) or measure(model))
    monkeypatch.setattr(clock, "interleave", known)
    demo.run(epochs=1, out=tmp_path, seed=0)
    assert models[0].training and not sk.is_patched(models[0])
    assert "model's steps took 2.0 times the shortest" in " ".join(capsys.readouterr().out.split())
    with (tmp_path / "results.csv").open(newline="") as file:
        unpatched, skip, fused, merged = csv.DictReader(file)
    assert (unpatched["images_per_second"], unpatched["paired_overhead"]) == ("8", "")
    assert (skip["paired_speedup"], skip["speedup"]) == ("1.3333", "1.3333")
    assert (skip["paired_overhead"], skip["overhead"]) == ("0.5", "0.5")
    assert (merged["paired_overhead"], merged["overhead"]) == ("0.5", "0.5")
    assert (fused["paired_overhead"], fused["overhead"]) == ("-0.2", "0")


def test_the_same_seed_gives_the_same_start():
    first, again, other = (demo.build_model(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pos_embed"], other["pos_embed"])


def test_skipped_patches_are_marked_and_merged_ones_have_their_mean(small, monkeypatch):
    test = demo.digits()[1]
    images, labels = test.tensors
    records = {}
    for config in ("6(55%)+11", "6(55%)+12:merge"):
        model = sk.patch(demo.build_model(0).eval(), config)
        records[config] = demo._record(model, images)
    grid = demo._skip_picture(test, records).axes
    assert len(grid) == 24
    for column, label in enumerate(range(8)):
        at = int((labels == label).nonzero()[0])
        grey = (1 - images[at, 0]).flatten() / 2
        skipped, merged = (
            torch.as_tensor(grid[row * 8 + column].images[0].get_array()).flatten(0, 1)
            for row in (1, 2)
        )
        kept = records["6(55%)+11"].kept()[at, 1:]
        torch.testing.assert_close(skipped[kept], grey[kept, None].expand(-1, 3))
        assert (skipped[~kept, 0] > skipped[~kept, 2] + 0.3).all() and kept.sum() == 29
        owner = records["6(55%)+12:merge"].owner()[at, 1:]
        for place in owner.unique():
            mean = grey[owner == place].mean().expand(3)
            torch.testing.assert_close(merged[owner == place].mean(0), mean)


@pytest.mark.parametrize("arguments, said", [
    (["--epochs", "0"], "epochs must be at least 1, got 0"),
    (["--threads", "-2"], "threads must be at least 1, got -2"),
    (["--seed", "-1"], "seed must be at least 0, got -1"),
    (["--out", __file__], f"out must be a folder that can be written, got {__file__}"),
    (["--out", f"{__file__}/below"], "out must be a folder that can be written"),
])  # fmt: skip
def test_bad_values_are_refused_before_any_work(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(demo, "digits", lambda: pytest.fail("it ran"))
    assert cli.main(["demo", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("package", ["timm", "sklearn", "matplotlib", "rich"])
def test_a_missing_extra_is_named_in_one_line(package, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "skipvit_kernels.lab.demo")
    monkeypatch.delattr(lab, "demo")
    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["demo"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert package in line and 'pip install "skipvit_kernels[demo]"' in line


def test_nothing_is_left_behind_by_ctrl_c(small, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_measure", interrupted)
    assert cli.main(["demo", "--epochs", "1", "--out", str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_old_results_stay_whole_when_writing_fails(small, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no picture")

    (tmp_path / "results.csv").write_text("old")
    monkeypatch.setattr(demo, "_skip_picture", broken)
    with pytest.raises(RuntimeError, match="no picture"):
        demo.run(epochs=1, out=tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    assert (tmp_path / "results.csv").read_text() == "old"
