"""Models with parameters of their own, registered with timm (1.0.31) by importing this package.

import skipvit_kernels.models
model = timm.create_model("stvit_deit_small_patch16_224")
"""

from skipvit_kernels.models.stvit import STViT
from skipvit_kernels.models.stvit_swin import STViTSwin

__all__ = ["STViT", "STViTSwin"]
