"""L3: the binding against the real torch_npu, on a fake driver, with the model as the chip.

    python -m venv env && env/bin/pip install torch==2.13.0 torch_npu==2.13.0 timm pytest numpy
    env/bin/python tests/ascend/torch_npu_check.py      # further arguments go to pytest

In an environment of its own: without CANN, an installed torch_npu breaks `import torch` for all
else. Builds a driver library (fake_acl.cpp, and an entry point that returns 0 for whatever else
torch_npu links), the model with the kernels' launch functions, and ascend_ops/binding.cpp; then
runs tests/ascend/test_ascend_torch_npu.py with these in front.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "ascend_torch_npu"
# What libtorch_npu.so and its module need of CANN.
LIBRARIES = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
# What torch_npu looks up by name when it first needs it, and cannot do without.
LOOKED_UP = {
    "aclrtDestroyStreamForce",
    "aclrtSetStreamOverflowSwitch",
    "aclSetCompileopt",
    "aclrtCtxGetSysParamOpt",
    "aclrtCtxSetSysParamOpt",
    "aclrtGetSysParamOpt",
    "aclrtSetDeviceSatMode",
    "aclrtSetOpExecuteTimeOut",
    "aclrtSetSysParamOpt",
}
PREFIXES = re.compile(r"^(acl|rt|Msprof|Hccl)\w+$")


def package(name: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(f"{name} is not installed here: see the head of {Path(__file__).name}")
    return Path(next(iter(spec.submodule_search_locations)))


def undefined(library: Path) -> set[str]:
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(library)], check=True,
                             capture_output=True, text=True).stdout  # fmt: skip
    names = (line.split()[-1].partition("@")[0] for line in listing.splitlines() if line.strip())
    return {name for name in names if PREFIXES.match(name)}


def compile_library(target: Path, *arguments: str) -> None:
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-fPIC", "-shared", "-O1", "-o", str(target), *arguments], check=True)


def entry_points(name: str, functions: set[str]) -> str:
    source = BUILD / f"{name}.cpp"
    bodies = "".join(f"int {function}() {{ return 0; }}\n" for function in sorted(functions))
    source.write_text(f'extern "C" {{\n{bodies}}}\n')
    return str(source)


def build() -> None:
    torch, torch_npu = package("torch"), package("torch_npu")
    BUILD.mkdir(parents=True, exist_ok=True)

    model = BUILD / "libskipvit_model.so"
    sources = [ROOT / "tests/ascend/model.cpp", ROOT / "ascend_ops/host/operators.cpp"]
    compile_library(model, "-std=c++17", f"-I{ROOT / 'tests/ascend'}", *map(str, sources))

    driver = ROOT / "tests/ascend/fake_acl.cpp"
    mine = set(re.findall(r"\b((?:acl|rt)\w+)\(", driver.read_text()))
    needed = set().union(*map(undefined, [*torch_npu.glob("lib/*.so"), *torch_npu.glob("_C*.so")]))
    here = f"-Wl,-rpath,{BUILD}"
    linked = entry_points("linked", needed - mine - LOOKED_UP)
    looked_up = entry_points("looked_up", LOOKED_UP)
    compile_library(BUILD / "libascendcl.so", str(driver), linked, looked_up, str(model), here)
    for name in LIBRARIES:
        compile_library(BUILD / f"lib{name}.so", looked_up)

    includes = [ROOT / "ascend_ops", torch_npu / "include", torch / "include",
                torch / "include/torch/csrc/api/include"]  # fmt: skip
    compile_library(
        BUILD / "_ascend.so",
        "-std=c++20",
        "-w",
        *(f"-I{path}" for path in includes),
        str(ROOT / "ascend_ops/binding.cpp"),
        str(ROOT / "ascend_ops/host/operators.cpp"),
        f"-L{torch / 'lib'}",
        f"-L{torch_npu / 'lib'}",
        f"-L{BUILD}",
        *("-ltorch_npu", "-ltorch", "-ltorch_cpu", "-lc10", "-lascendcl", str(model), here),
    )


def main() -> int:
    build()
    environment = {
        **os.environ,
        "SKIPVIT_ASCEND_LIBRARY": str(BUILD / "_ascend.so"),
        "LD_LIBRARY_PATH": os.pathsep.join([str(BUILD), os.environ.get("LD_LIBRARY_PATH", "")]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "TASK_QUEUE_ENABLE": "0",  # so that a built-in operator that fails says so at once
    }
    environment.pop("ASCEND_HOME_PATH", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               str(ROOT / "tests/ascend/test_ascend_torch_npu.py"), *sys.argv[1:]]  # fmt: skip
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
