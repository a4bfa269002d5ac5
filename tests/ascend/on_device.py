"""pytest -p ascend.on_device: the shared operator suite on a real NPU, as backend `npu`."""

import dataclasses

import torch_npu  # type: ignore[import-not-found] # noqa: F401
from backend_matrix import BACKENDS

BACKENDS["npu"] = dataclasses.replace(
    BACKENDS["npu-model"], name="npu", module="skipvit_kernels.backends.npu", device="npu:0"
)
