"""skipvit info, and the command line that prints it."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import skipvit_kernels as sk
from skipvit_kernels import backends, cli, ops
from skipvit_kernels.lab import info, machine


def run_without(module, code):
    """Run code in a fresh process in which the module cannot be imported; returns its output."""
    block = f"import sys; sys.modules[{module!r}] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_operator_and_key_is_listed_with_a_kernel_or_a_reason():
    found = info.kernels()
    assert [(kernel.operator, kernel.key) for kernel in found] == [
        (operator, key) for operator in ops.OPERATORS for key in ("CPU", "CUDA", "PrivateUse1")
    ]
    for kernel in found:
        assert kernel.reason or kernel.runs != info.FALLBACK


def test_kernels_without_a_device_are_called_idle(monkeypatch):
    monkeypatch.setattr(backends.cpu, "unavailable_reason", lambda: "the CPU is on fire")
    if {kernel.runs for kernel in info.kernels() if kernel.key == "CPU"} != {"C++"}:
        pytest.skip("lacks the C++ kernels")
    assert "CPU: the C++ kernels are idle, because the CPU is on fire" in info.text()


@pytest.mark.skipif(backends.cpu.unavailable_reason() is not None, reason="no C++ kernels here")
def test_no_operator_falls_back_where_the_cpu_kernels_load():
    assert {kernel.runs for kernel in info.kernels() if kernel.key == "CPU"} == {"C++"}
    assert backends.cpu.build_info()["isa"] in machine.versions()["C++ kernels"]


def test_a_missing_library_is_reported():
    code = (
        "from skipvit_kernels.lab import info, machine\n"
        "cpu = [k for k in info.kernels() if k.key == 'CPU']\n"
        "print({k.runs for k in cpu}, *{k.reason for k in cpu}, sep='|')\n"
        "print(info.text())"
    )
    first, *text = run_without("skipvit_kernels._C", code).splitlines()
    assert first.startswith("{'PyTorch'}|")
    reason = first.partition("|")[2]
    assert "skipvit_kernels._C" in reason
    assert f"CPU: plain PyTorch, because {reason}" in text
    assert not any(line.startswith("C++ kernels") for line in text)


def test_sources_that_were_not_built_are_called_so(tmp_path):
    root, checkout, site = Path(__file__).parents[2], tmp_path / "checkout", tmp_path / "site"
    for folder in ("skipvit_kernels", "benchmarks", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(root / folder, checkout / folder, ignore=ignored)
    shutil.copy(root / "setup.py", checkout)
    # The finder of an editable install would give its library to these sources too.
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
    )

    def run(*command):
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = run("skipvit_kernels", "info")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("CPU: "))
    imported = f"the sources in {checkout}/skipvit_kernels, where skipvit_kernels._C was not built"
    build = f"`SKIPVIT_BUILD_CPP=1 pip install --no-build-isolation -e .` in {checkout}"
    assert imported in line and line.endswith(build)

    library = site / "skipvit_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.parent.mkdir()
    library.touch()
    done = run("pytest", "benchmarks/", "--benchmark-only", "-p", "no:cacheprovider")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and not done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("ERROR: no kernels to measure: Python imported") and imported in line
    assert f"an installed copy has it ({library})" in line and line.endswith(build)
    assert "run `pytest` or `skipvit` instead of `python -m`" in line

    (checkout / "setup.py").unlink()  # then it is an installed copy
    assert "installed without its C++ kernels" in run("skipvit_kernels", "info").stdout


@pytest.mark.parametrize("module", ["timm", "rich"])
def test_info_needs_neither_timm_nor_rich(module):
    code = "from skipvit_kernels.cli import main; raise SystemExit(main(['info']))"
    assert "gather_topk_fuse_backward" in run_without(module, code)


def test_text_names_a_single_missing_operator(monkeypatch):
    def found():
        kernels = [info.Kernel(name, "CPU", "C++", None) for name in ops.OPERATORS]
        kernels += [info.Kernel(name, "CUDA", "Triton", None) for name in ops.OPERATORS]
        kernels += [info.Kernel(name, "PrivateUse1", "AscendC", None) for name in ops.OPERATORS]
        first = next(iter(ops.OPERATORS))
        kernels[0] = info.Kernel(first, "CPU", "PyTorch", "of this test")
        return kernels

    monkeypatch.setattr(info, "kernels", found)
    lines = info.text().splitlines()
    first = next(iter(ops.OPERATORS))
    assert f"CPU: plain PyTorch for {first}, because of this test" in lines
    assert lines[1].split() == [first, "PyTorch", "Triton", "AscendC"]


def test_command_line(capsys):
    assert cli.main(["info"]) == 0
    assert info.text() in capsys.readouterr().out
    for arguments, code, said in (
        (["--version"], 0, sk.__version__),
        ([], 2, "required: command"),
        (["dema"], 2, "invalid choice"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        assert left.value.code == code
        out, err = capsys.readouterr()
        assert said in out + err


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "skipvit_kernels", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"skipvit_kernels {sk.__version__}")
