"""The table that the operator benchmarks print."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("cases", "chains", "devices"):  # by these names they are another project's too
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", BENCHMARKS / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Results(None)


def test_times_are_the_shortest_and_ratios_the_medians_of_single_turns(results):
    info = {"operator": "op", "shape": "B1", "dtype": "float32", "threads": 1, "bytes": 3e3}
    turns = {
        "copy": [2e-6, 9e-6, 3e-6],
        "naive": [9e-6, 3e-6, 9e-6],
        "best_a": [6e-6, 9e-6, 5e-6],
        "ours": [2e-6, 3e-6, 1e-6],
    }
    for turn in range(3):
        for provider, seconds in turns.items():
            last = info | {"provider": provider}
            results.add("op B1", last, seconds[turn])
    assert last["speedup"] == pytest.approx(5) and last["share_of_copy"] == pytest.approx(3)
    (row,) = results.rows()
    times = {name: row[f"{name}_us"] for name in ("ours", "naive", "best", "copy")}
    assert times == {"ours": 1.0, "naive": 3.0, "best": 5.0, "copy": 2.0}
    assert (row["best"], row["GB_s"]) == ("a", 3.0)
    assert row["speedup"] == 3.0  # the median of 6 / 2, 3 / 3 and 5 / 1
    assert row["share_of_copy"] == 3.0  # of 2 / 2, 9 / 3 and 3 / 1
