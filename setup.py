# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled kernels; everything else is in pyproject.toml.

SKIPVIT_BUILD_CPP=auto   build the C++ kernels, or warn and install without them (default)
                  0      do not build them
                  1      build them, and fail if that fails
SKIPVIT_BUILD_ASCEND=1   build the Ascend kernels too, and fail if that fails (needs CANN and
                         torch_npu; SOC_VERSION names the chip, default Ascend910A;
                         SKIPVIT_REDUCE_FLOAT=1: see docs/ascend.md)
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD_CPP = os.environ.get("SKIPVIT_BUILD_CPP", "auto")
if BUILD_CPP not in ("auto", "0", "1"):
    raise SystemExit(f"SKIPVIT_BUILD_CPP must be auto, 0 or 1, got {BUILD_CPP!r}")
BUILD_ASCEND = os.environ.get("SKIPVIT_BUILD_ASCEND", "0")
if BUILD_ASCEND not in ("0", "1"):
    raise SystemExit(f"SKIPVIT_BUILD_ASCEND must be 0 or 1, got {BUILD_ASCEND!r}")

C = Extension("skipvit_kernels._C", [], optional=BUILD_CPP == "auto")
ASCEND = Extension("skipvit_kernels._ascend", [])


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # No Python module: torch.ops.load_library reads it.
        if fullname.endswith("_ascend"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        try:
            self.run_cmake(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            if not ext.optional:
                raise
            print(
                f"\n*** skipvit_kernels: the C++ kernels were not built ({error}).\n"
                "*** The package works without them, in plain PyTorch and slower on CPU.\n"
                "*** SKIPVIT_BUILD_CPP=1 makes this an error, SKIPVIT_BUILD_CPP=0 skips the try.\n",
                file=sys.stderr,
            )

    def run_cmake(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name
        source = ROOT / "ascend_ops" if ext is ASCEND else ROOT
        # cmake and ninja from pip lie beside the interpreter, which need not be on PATH.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        env = {**os.environ, "PATH": path}
        # CANN's kernel library is built by nested builds, known to work from Makefiles only.
        generator = "Unix Makefiles" if ext is ASCEND else "Ninja"
        configure = [
            *("cmake", "-G", generator, "-S", str(source), "-B", str(build)),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSKIPVIT_VERSION={self.distribution.get_version()}",
        ]
        if ext is ASCEND:
            # Both always: CMake remembers what an earlier build was given.
            options = {"SOC_VERSION": "Ascend910A", "SKIPVIT_REDUCE_FLOAT": "0"}
            configure += [f"-D{name}={env.get(name, value)}" for name, value in options.items()]
        subprocess.run(configure, check=True, env=env)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=env)


setup(
    ext_modules=[C] * (BUILD_CPP != "0") + [ASCEND] * (BUILD_ASCEND == "1"),
    cmdclass={"build_ext": CMakeBuild},
)
