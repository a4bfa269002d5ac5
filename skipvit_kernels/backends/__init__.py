"""The kernels of each device, registered under the schemas of `skipvit_kernels.ops`.

Each module has launchers under the operators' names, callable on tensors without autograd, and
`unavailable_reason()`, None where its kernels run. Importing one never fails.
"""

from skipvit_kernels.backends import cpu as cpu
from skipvit_kernels.backends import npu as npu
from skipvit_kernels.backends import triton as triton
