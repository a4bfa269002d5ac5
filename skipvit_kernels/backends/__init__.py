"""The kernels of each device, registered under the schemas of `skipvit_kernels.ops`.

A module of `BACKENDS` has `unavailable_reason()`, None where its kernels run, and its launchers
under the operators' names, callable on tensors directly, without autograd and with the signatures
of `skipvit_kernels.ops`. Importing one never fails.
"""

from types import ModuleType
from typing import NamedTuple

from skipvit_kernels.backends import cpu as cpu
from skipvit_kernels.backends import npu as npu
from skipvit_kernels.backends import triton as triton


class Backend(NamedTuple):
    """Kernels in one language, for the devices of one dispatch key."""

    key: str  # torch's dispatch key
    device: str  # what torch calls its devices
    language: str
    module: ModuleType


BACKENDS = (
    Backend("CPU", "cpu", "C++", cpu),
    Backend("CUDA", "cuda", "Triton", triton),  # NVIDIA and AMD
    Backend("PrivateUse1", "npu", "AscendC", npu),
)
