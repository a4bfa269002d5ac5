"""Every cell of docs/ways.md: a family run in a way, with each method; passed, or refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from skipping.ways import matrix
from skipping.ways.matrix import FAMILIES, METHODS, WAYS

# Of these a run of the tests takes one method a family; SKIPVIT_WAYS=all takes all.
SAMPLED = ("compile", "export", "ONNX")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What both of two processes found that trained together."""
    folder = tmp_path_factory.mktemp("two")
    tests = Path(matrix.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    command = [sys.executable, "-m", "skipping.ways.two_processes"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), errors[0][-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_cell(way, family, request):
    if way == "ONNX":
        pytest.importorskip("onnxruntime", reason="lacks onnxruntime")
        pytest.importorskip("onnxscript", reason="lacks onnxscript")
    everything = way not in SAMPLED or os.environ.get("SKIPVIT_WAYS") == "all"
    sample = matrix.sampled(way, family) if matrix.cell(way, family)[:4] == "pass" else "skip"
    for method in METHODS:
        refused = matrix.refusal(way, family, method)
        if refused:
            with pytest.raises((ValueError, RuntimeError), match=re.escape(refused.message)):
                WAYS[way](family, method) if refused.way else matrix.build(family, method)
        elif way in ("DDP", "FSDP2"):
            for found in request.getfixturevalue("two_processes"):
                # Of float64, whose steps are 2e-16, after sums over images and processes.
                assert found[f"{way}/{family}/{method}"] < 1e-12
        elif everything or method == sample:
            WAYS[way](family, method)


def test_the_page_is_the_matrix():
    """`PYTHONPATH=tests python -m skipping.ways.matrix` writes it anew."""
    _, written, _ = matrix.parts()
    assert written == matrix.page()


def test_all_methods_meet_every_way():
    for way in SAMPLED:
        met = {matrix.sampled(way, family) for family in FAMILIES}
        assert met == set(METHODS), way
