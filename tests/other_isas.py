"""Prints the instruction sets that this machine can run but `skipvit_kernels` does not choose."""

import subprocess
import sys

from skipvit_kernels.backends import cpu

info = cpu.build_info()
load = "import skipvit_kernels.backends.cpu as cpu; cpu.build_info()"
for isa in info["compiled_isas"].split(","):
    if isa != info["isa"]:
        done = subprocess.run(
            [sys.executable, "-c", load], env={"SKIPVIT_CPU_ISA": isa}, capture_output=True
        )
        if done.returncode == 0:
            print(isa)
