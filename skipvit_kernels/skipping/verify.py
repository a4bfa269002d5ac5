"""verify: does the routing itself leave a model as it is?"""

from __future__ import annotations

import copy
import dataclasses
from fractions import Fraction

import torch
from torch import Tensor, nn

from skipvit_kernels.skipping import families
from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.patch import is_patched, patch, unpatch


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `verify` compared: the model's output without and with routing that drops nothing.

    Attributes:
        model: the model's class name.
        config: the configuration whose routing ran, with every drop ratio 0.
        identical: whether all bits agree.
        max_difference: largest absolute difference of the outputs.
        tolerance: largest difference accepted: four times the unpatched model's own rounding
            error, measured at another precision; 0 where `identical`.
    """

    model: str
    config: SkipConfig
    identical: bool
    max_difference: float
    tolerance: float


@torch.no_grad()
def verify(
    model: nn.Module, config: SkipConfig | str, *, images: Tensor | None = None
) -> VerifyReport:
    """Check on this very model that the routing itself changes nothing.

    Runs the model unpatched, and patched with the configuration's drops at a ratio of 0, so that
    scores, selection, gather and rejoin all run while every token is kept. A CLS-only last block
    runs as configured: it alone may change roundings.

    Args:
        model: of a known family, patched or not; left as it is.
        config: as for `patch`.
        images: (B, 3, H, W) to compare on; default two of random noise at the model's size.

    Raises:
        ValueError: as `patch`. RuntimeError: where the outputs differ by more than the
            report's `tolerance`.
    """
    if isinstance(config, str):
        config = SkipConfig.parse(config)
    nothing_dropped = dataclasses.replace(
        config, drop_ratio=(Fraction(0),) * len(config.drop_at), warmup_epochs=0
    )
    model = copy.deepcopy(model).eval()
    if is_patched(model):
        unpatch(model)
    family = families.of(model)
    if images is None:
        images = torch.randn(2, *family.image_shape(model)).to(next(model.parameters()))
    plain = model(images)
    routed = patch(model, nothing_dropped)(images)
    difference = (plain - routed).abs().max().item()
    tolerance = 0.0
    if not torch.equal(plain, routed):
        # The unpatched model's rounding error, by running it once more at another precision; that
        # of float64 is as many times smaller than float32's as its steps are.
        double = plain.dtype == torch.float64
        other = torch.float32 if double else torch.float64
        rerun = unpatch(model).to(other)(images.to(other))
        rounding = (plain - rerun).abs().max().item() * (2**-29 if double else 1)
        tolerance = 4 * rounding  # two such errors, and maxima over a few logits that vary
    if not difference <= tolerance:
        raise RuntimeError(
            f"{type(model).__name__} with {nothing_dropped} must agree with the unpatched model "
            f"within {tolerance:.3g}, got a difference of {difference:.3g}"
        )
    return VerifyReport(
        type(model).__name__, nothing_dropped, difference == 0, difference, tolerance
    )
