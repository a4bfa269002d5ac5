"""python -m skipvit_kernels: the same as the command `skipvit`."""

import sys

from skipvit_kernels.cli import main

sys.exit(main())
