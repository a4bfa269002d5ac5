"""The built library and the build: stable symbols, the same bits on every CPU, fallbacks."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from skipvit_kernels.backends import cpu

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
REQUIRED = "cpu" in os.environ.get("SKIPVIT_REQUIRE", "").split(",")

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")


@pytest.fixture
def library():
    """Path of the built _C."""
    reason = cpu.unavailable_reason()
    if reason:
        (pytest.fail if REQUIRED else pytest.skip)(reason)
    return Path(cpu._C.__file__)


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


# ------------------------------------------------------------------------------- the library


@needs_nm
def test_only_stable_symbols(library):
    """No C++ symbol of torch: only then one build runs on every torch from 2.11 on."""
    symbols = subprocess.check_output(["nm", "-DC", "--undefined-only", library], text=True)
    assert "aoti_torch_library_init_impl" in symbols
    assert not re.search(r"\b(c10|at|torch)::", symbols)


def test_no_run_path(library):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    dynamic = subprocess.check_output(["readelf", "-d", library], text=True)
    assert "libtorch_cpu" in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_no_folder_of_who_built_it(library):
    """torch's assertions carry the paths of its headers."""
    torch = Path(find_spec("torch").origin).parent
    data = library.read_bytes()
    assert b"torch/csrc/stable/" in data  # relative, so that this can fail
    for folder in (ROOT, torch, Path.home()):
        assert f"{folder}/".encode() not in data


@needs_nm
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_core_is_free_of_torch_and_of_weak_symbols(tmp_path):
    """The core compiles with nothing but the standard headers, and exports its table alone.

    A weak symbol of an AVX-512 object could be the copy that the linker keeps for every machine.
    """
    target = tmp_path / "kernels.o"
    flags = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-psabi", "-DSKIPVIT_ISA=test"]
    subprocess.check_call([COMPILER, *flags, "-c", CSRC / "kernels.cpp", "-o", target])
    lines = subprocess.check_output(["nm", "-C", "--defined-only", target], text=True).splitlines()
    kinds = {kind for _, kind, _ in (line.split(maxsplit=2) for line in lines)}
    assert not kinds & set("WwVvu"), "weak symbols"
    exported = [line for line in lines if line.split()[1].isupper() and " t " not in line]
    assert [line.split()[-1] for line in exported] == ["skipvit::test::kernels"]


ALL_OPERATORS = """
import hashlib, sys, types
import torch

# The operators alone: the rest of the package needs timm.
package = types.ModuleType("skipvit_kernels")
package.__path__ = ["skipvit_kernels"]
sys.modules["skipvit_kernels"] = package
from skipvit_kernels.backends import cpu

print(cpu.build_info()["isa"])
torch.manual_seed(0)
every = torch.arange(2**16).to(torch.int16)  # all numbers of 16 bits, subnormals and NaN too
for dtype, special in [
    (torch.float32, False),
    (torch.float16, False),
    (torch.bfloat16, False),
    (torch.float64, False),
    (torch.float16, True),
    (torch.bfloat16, True),
]:
    x = torch.randn(3, 198, 83).to(dtype)
    if special:
        x.view(-1)[: 3 * 2**14] = every.view(dtype)[torch.randperm(2**16)[: 3 * 2**14]]
    scores = torch.rand(3, 2, 196).round(decimals=2).to(dtype)
    update = torch.randn(3, 83).to(dtype)
    q, k = torch.randn(3, 2, 40).to(dtype), torch.randn(3, 198, 2, 40).to(dtype).transpose(1, 2)
    tokens, index = cpu.gather_topk(x, scores, 89, num_prefix_tokens=2)
    fused, _ = cpu.gather_topk_fuse(x, scores, 89, num_prefix_tokens=2)
    owner = cpu.match_kept(x, index, num_prefix_tokens=2)
    sizes = torch.rand(3, 198) + 0.5
    merged, merged_sizes = cpu.merge_rows(x, owner, 91, sizes=sizes)
    results = {
        "cls_scores": [cpu.cls_scores(q, k), cpu.cls_scores(q, k.contiguous())],
        "gather_topk": [tokens, index],
        "gather_topk_fuse": [fused],
        "gather_topk_fuse_backward": cpu.gather_topk_fuse_backward(fused, x, scores, index),
        "gather_rows": [cpu.gather_rows(x, index)],
        "gather_rows_backward": [cpu.gather_rows_backward(tokens, index, 198)],
        "scatter_back": [cpu.scatter_back(x, -tokens, index, update=update)],
        "scatter_back_backward": cpu.scatter_back_backward(x, index, True),
        "match_higher": [
            cpu.match_higher(x, scores[:, 0].float(), num_prefix_tokens=2),
            cpu.match_higher(k, scores[:, 0].float(), num_prefix_tokens=2),
        ],
        "match_kept": [owner, cpu.match_kept(k, index, num_prefix_tokens=2)],
        "merge_rows": [merged, merged_sizes],
        "merge_rows_backward": [cpu.merge_rows_backward(tokens, owner, sizes, merged_sizes)],
        "restore_rows": [cpu.restore_rows(x, tokens, -merged, owner)],
        "restore_rows_backward": cpu.restore_rows_backward(x, owner, 91),
    }
    for name, tensors in results.items():
        for tensor in tensors:
            if special and dtype == torch.float16:  # a NaN's sign: that of either operand
                tensor = tensor.where(tensor == tensor, 1)
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            print(name, dtype, hashlib.sha256(data).hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits(library):
    """Row moves and sums alike: the sums have one order, and no multiplication becomes an FMA."""
    isas = cpu.build_info()["compiled_isas"].split(",")
    assert isas[0] == "baseline"
    outputs = {}
    for isa in isas:
        done = run(ALL_OPERATORS, SKIPVIT_CPU_ISA=isa)
        if "this CPU does not have it" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        first, *outputs[isa] = done.stdout.splitlines()
        assert first == isa
    for isa, lines in outputs.items():
        assert lines == outputs["baseline"], isa


def test_the_number_of_threads_does_not_change_the_bits(library):
    outputs = [run(ALL_OPERATORS, OMP_NUM_THREADS=threads).stdout for threads in ("1", "2", "5")]
    assert outputs[0] and outputs[0] == outputs[1] == outputs[2]


def test_unknown_instruction_set_is_refused(library):
    done = run(
        "from skipvit_kernels.backends import cpu; print(cpu.unavailable_reason())",
        SKIPVIT_CPU_ISA="avx10",
    )
    assert done.returncode == 0, done.stderr
    assert "SKIPVIT_CPU_ISA must be one of baseline" in done.stdout and "avx10" in done.stdout


# ------------------------------------------------------------------------------- without it


def test_import_without_the_library():
    """The package works in plain PyTorch, says so, and its CPU launchers refuse."""
    done = run(
        """
import sys, warnings
sys.modules["skipvit_kernels._C"] = None
import torch
import skipvit_kernels as sk
from skipvit_kernels import reference
from skipvit_kernels.backends import cpu

x, scores = torch.randn(2, 9, 4), torch.rand(2, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    tokens, index = sk.gather_topk(x, scores, 3)
assert "plain PyTorch" in str(caught[0].message), caught
assert torch.equal(tokens, reference.gather_topk(x, scores, 3)[0])
try:
    cpu.gather_topk(x, scores, 3)
except RuntimeError as error:
    print(error)
print(cpu.unavailable_reason())
"""
    )
    assert done.returncode == 0, done.stderr
    refusal, reason = done.stdout.splitlines()[-2:]
    assert "skipvit_kernels._C" in reason
    assert reason in refusal and refusal.startswith("no CPU kernel")


# ------------------------------------------------------------------------------- the build


@pytest.fixture
def sources(tmp_path):
    """What the build reads, and nothing that was built before."""
    target = tmp_path / "sources"
    target.mkdir()
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    (target / "README.md").touch()
    shutil.copytree(CSRC, target / "csrc")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "skipvit_kernels", target / "skipvit_kernels", ignore=ignored)
    return target


def build(sources, **env):
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build"],
        cwd=sources,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_build_without_cpp(sources):
    done = build(sources, SKIPVIT_BUILD_CPP="0")
    assert done.returncode == 0, done.stderr
    assert list(sources.glob("build/lib*/skipvit_kernels/reference.py"))
    assert not list(sources.rglob("*.so"))
    assert not list(sources.glob("build/lib*/csrc")), "no C++ sources in a wheel"


def test_failed_build_warns_or_stops(sources):
    broken = {"CXX": "/nonexistent/c++"}
    done = build(sources, SKIPVIT_BUILD_CPP="auto", **broken)
    assert done.returncode == 0, done.stderr
    assert "the C++ kernels were not built" in done.stderr
    assert list(sources.glob("build/lib*/skipvit_kernels/reference.py"))
    assert build(sources, SKIPVIT_BUILD_CPP="1", **broken).returncode != 0
    assert build(sources, SKIPVIT_BUILD_CPP="yes").returncode != 0
