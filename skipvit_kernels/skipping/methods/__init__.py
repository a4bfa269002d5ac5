"""What becomes of the patches that leave: one file a method, found by being here."""

import importlib
import pkgutil

from skipvit_kernels.skipping.methods.base import METHODS as METHODS
from skipvit_kernels.skipping.methods.base import Candidates as Candidates
from skipvit_kernels.skipping.methods.base import Method as Method
from skipvit_kernels.skipping.methods.base import Reduced as Reduced
from skipvit_kernels.skipping.methods.base import make as make

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
