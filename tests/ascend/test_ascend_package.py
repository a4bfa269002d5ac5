"""The Ascend part of the package where there is no CANN: imports, messages, the build's refusal."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

from skipvit_kernels.backends import npu

ROOT = Path(__file__).parents[2]


def in_a_fresh_interpreter(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()


def test_importing_the_package_never_imports_torch_npu():
    code = "import sys, skipvit_kernels; print('torch_npu' in sys.modules)"
    assert in_a_fresh_interpreter(code) == "False"


def test_a_torch_npu_without_our_library_changes_nothing():
    code = (
        "import sys, types; sys.modules['torch_npu'] = types.ModuleType('torch_npu')\n"
        "from skipvit_kernels.backends import npu; print(npu.unavailable_reason())"
    )
    if npu.LIBRARY.exists():
        pytest.skip("the Ascend kernels are installed here")
    assert "without its Ascend kernels" in in_a_fresh_interpreter(code)


def test_a_library_that_does_not_load_is_a_reason_and_no_failure(tmp_path, monkeypatch):
    library = tmp_path / "_ascend.so"
    library.write_bytes(b"no library")
    monkeypatch.setattr(npu, "LIBRARY", library)
    assert "import it before" in str(npu.unavailable_reason())
    monkeypatch.setitem(sys.modules, "torch_npu", object())
    npu._load_error.cache_clear()
    assert "_ascend.so does not load: " in str(npu.unavailable_reason())
    npu._load_error.cache_clear()


def test_launchers_say_why_they_do_not_run():
    if npu.unavailable_reason() is None:
        pytest.skip("the Ascend kernels run here")
    with pytest.raises(RuntimeError, match=r"no Ascend kernel: .*docs/ascend.md"):
        npu.gather_rows(torch.randn(1, 2, 8), torch.tensor([[0]]))


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH")
@pytest.mark.parametrize(
    "option, message",
    [
        ("-DASCEND_CANN_PACKAGE_PATH=/nowhere", "need CANN (8.0 or later) to build"),
        ("-DSOC_VERSION=Ascend910B1", "not for Ascend910B1"),
    ],
)
def test_the_build_says_what_it_lacks(option, message, tmp_path):
    command = ["cmake", "-S", str(ROOT / "ascend_ops"), "-B", str(tmp_path), option]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH")
def test_the_cpu_twin_gets_a_library_a_kernel_and_the_host_code_is_optimised(tmp_path):
    """CANN's function of the name makes one file name of all its sources in this mode."""
    cann = tmp_path / "tools/tikcpp/ascendc_kernel_cmake/ascendc.cmake"
    cann.parent.mkdir(parents=True)
    cann.write_text(
        "function(ascendc_library name kind)\n"
        '  message(STATUS "library ${name}: ${ARGN} ${CMAKE_BUILD_TYPE}")\nendfunction()\n'
        "function(ascendc_compile_definitions name)\n"
        '  message(STATUS "${name} with ${ARGN}")\nendfunction()\n'
    )
    command = ["cmake", "-S", str(ROOT / "ascend_ops"), "-B", str(tmp_path / "build")]
    options = [f"-DASCEND_CANN_PACKAGE_PATH={tmp_path}", "-DRUN_MODE=cpu"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    libraries = [line for line in done.stdout.splitlines() if "library skipvit_ascend_" in line]
    kernels = sorted((ROOT / "ascend_ops" / "kernels").glob("*.cpp"))
    assert " with " not in done.stdout
    assert libraries == [
        f"-- library skipvit_ascend_{kernel.stem}: {kernel} Release" for kernel in kernels
    ]
    reducing = [*command, *options, "-DSKIPVIT_REDUCE_FLOAT=1"]
    done = subprocess.run(reducing, capture_output=True, text=True, check=True)
    assert done.stdout.count(" with PRIVATE;SKIPVIT_REDUCE_FLOAT") == len(kernels)


def test_the_build_puts_the_library_where_the_package_looks_for_it(monkeypatch, tmp_path):
    made = {}
    monkeypatch.setattr(setuptools, "setup", made.update)
    monkeypatch.setenv("SKIPVIT_BUILD_ASCEND", "1")
    runpy.run_path(str(ROOT / "setup.py"))
    extensions = made["ext_modules"]
    build = made["cmdclass"]["build_ext"](setuptools.Distribution({"ext_modules": extensions}))
    build.build_lib = str(tmp_path)
    built = Path(build.get_ext_fullpath(extensions[-1].name))
    assert built.relative_to(tmp_path) == npu.LIBRARY.relative_to(ROOT)


def test_the_page_says_what_has_not_been_done():
    page = (ROOT / "docs" / "ascend.md").read_text()
    assert "never compiled with bisheng, never run on an NPU" in page
