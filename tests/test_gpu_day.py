"""tools/gpu_day.py, but for what needs a GPU: what it writes as it goes, and its summary."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"

THREE_TESTS = """
import pytest

def test_good():
    pass

@pytest.mark.parametrize("at", [1, 2])
def test_bad(at):
    assert at == 0, "no zero"

def test_absent():
    pytest.skip("lacks a GPU")
"""


@pytest.fixture
def gpu_day(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_day", TOOLS / "gpu_day.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "OUT", tmp_path)
    return module


def test_a_line_a_test_and_its_summary(gpu_day, tmp_path):
    (tmp_path / "test_three.py").write_text(THREE_TESTS)
    env = {**os.environ, "PYTHONPATH": str(TOOLS), "OUT": str(tmp_path), "TARGET": "test-gpu"}
    options = ["-p", "gpu_day", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", tmp_path]
    subprocess.run([sys.executable, "-m", "pytest", *options, tmp_path], env=env, timeout=300)
    lines = gpu_day.read_lines(tmp_path / "tests.jsonl")
    assert [line["outcome"] for line in lines] == ["passed", "failed", "failed", "skipped"]
    lines[0]["kernels"] = {"select_kernel": 3}
    lines[1]["kernels"] = {"gather_rows_kernel": 9}  # of a test that failed
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"target": "cut sh'
    (tmp_path / "tests.jsonl").write_text(text)
    gpu_day.write_summary(["test-gpu: 3 s"])
    summary = (tmp_path / "summary.md").read_text()
    assert "- test-gpu: 2 failed, 1 passed, 1 skipped" in summary
    assert "- 2 x `test_three.py::test_bad`: AssertionError: no zero" in summary
    assert "- 1 x `test_three.py::test_absent`: lacks a GPU" in summary
    assert "passed: `select_kernel` 3." in summary
    never = summary.split("Never launched: ")[1]
    assert "`gather_rows_kernel`" in never and "`select_kernel`" not in never


def test_ratios_of_operators_and_models(gpu_day, tmp_path):
    header = "operator,shape,dtype,speedup,share_of_copy\n"
    rows = "merge_rows,B1,bfloat16,3.5,0.91\nmerge_rows,B2,bfloat16,,\n"
    (tmp_path / "operators_gpu.csv").write_text(header + rows)
    (tmp_path / "operators_gpu_compiled.csv").write_text(
        header + "merge_rows,B1,bfloat16,1.4,0.9\n"
    )
    shared = dict(model="vit", mode="inference", batch_size=1, compiled=False, cuda_graph=True)
    patched = shared | dict(config="6(55%)+11", paired_speedup=1.25, paired_overhead=0.012)
    models = tmp_path / "models_gpu"
    models.mkdir()
    (models / "results.json").write_text(json.dumps([shared | dict(config="unpatched"), patched]))
    gpu_day.write_summary([])
    summary = (tmp_path / "summary.md").read_text()
    assert "| operator | B1 bfloat16 | B2 bfloat16 |" in summary
    assert "| merge_rows | 3.5 / 1.4 / 91% | - / - / - |" in summary
    assert "- vit, inference, batch 1, cuda_graph: `6(55%)+11` 1.250 (+1.2%)" in summary


def test_a_target_is_cut_off_in_a_background_job_and_an_earlier_run_stays(
    gpu_day, tmp_path, monkeypatch
):
    """A shell starts background jobs with SIGINT ignored."""
    for name, command in {"make": "exec sleep 50", ".venv/bin/python": "echo torch 2"}.items():
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\n{command}\n")
        program.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    monkeypatch.setattr(gpu_day, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_day, "BIN", tmp_path / ".venv" / "bin")
    monkeypatch.setattr(sys, "argv", ["gpu_day.py", "bench-gpu-models"])
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PHASE_S", "1")
    gpu_day.write_summary(["test-gpu: 7 s, exit status 0", "bench-gpu-models: running for 3 s"])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        gpu_day.main()
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    summary = (tmp_path / "summary.md").read_text()
    first, second = [line for line in summary.split("\n") if line.startswith("- ")]
    assert first == "- test-gpu: 7 s, exit status 0"
    seconds = re.fullmatch(r"- bench-gpu-models: (\d+) s, cut off after 1 s", second)[1]
    assert int(seconds) < 40  # and not the 50 that make sleeps
    assert "torch 2" in summary
