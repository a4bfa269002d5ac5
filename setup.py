# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ kernels; everything else is in pyproject.toml.

SKIPVIT_BUILD_CPP=auto  build them, or warn and install pure Python (default)
                  0     do not build them
                  1     build them, and fail if that fails
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


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            self.run_cmake(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            if BUILD_CPP == "1":
                raise
            print(
                f"\n*** skipvit_kernels: the C++ kernels were not built ({error}).\n"
                "*** The package works without them, in plain PyTorch and slower on CPU.\n"
                "*** SKIPVIT_BUILD_CPP=1 makes this an error, SKIPVIT_BUILD_CPP=0 skips the try.\n",
                file=sys.stderr,
            )

    def run_cmake(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        # cmake and ninja from pip lie beside the interpreter, which need not be on PATH.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        env = {**os.environ, "PATH": path}
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSKIPVIT_VERSION={self.distribution.get_version()}",
        ]
        subprocess.run(configure, check=True, env=env)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=env)


setup(
    # optional: an editable install copies the library only if there is one.
    ext_modules=(
        []
        if BUILD_CPP == "0"
        else [Extension("skipvit_kernels._C", [], optional=BUILD_CPP == "auto")]
    ),
    cmdclass={"build_ext": CMakeBuild},
)
