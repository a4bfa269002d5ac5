"""What `cls_only_last_block` makes of a model: for its logits only."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from skipvit_kernels.skipping import families


class ClsOnly:
    """A model whose last block computes the rows that its head reads, and no others.

    The model's forward goes through forward_features, whose other callers expect every token. They
    are refused: a slice without patches would give an empty map, or a mean that is NaN.
    """

    family: type[families.Family]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if reason := self.family.reads_more(self):  # reset_classifier may have changed it
            raise ValueError(reason)
        return self.forward_head(super().forward_features(x, *args, **kwargs))  # type: ignore[misc]

    def forward_features(self, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError(
            "forward_features gives every token, and cls_only_last_block computes the last block's "
            "CLS row only: call the model itself, or patch it without cls_only_last_block"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by the model's own class: the one made here has no name to be found by."""
        state: Any = super().__reduce_ex__(protocol)
        return (_new, (type(self).__bases__[1],), *state[2:])


@functools.cache
def _cls_only(kind: Any) -> Any:
    family = families.of_class(kind)
    return type(f"ClsOnly{kind.__name__}", (ClsOnly, kind), {"family": family})


def _new(kind: Any) -> Any:
    cls = _cls_only(kind)
    return cls.__new__(cls)


def make_cls_only(model: Any) -> None:
    """Turn a model into its CLS-only class, in place; `undo` turns it back."""
    model.__class__ = _cls_only(type(model))  # type: ignore[arg-type]


def undo(model: nn.Module) -> None:
    """Give the model, where it is CLS-only, its own class back."""
    if isinstance(model, ClsOnly):
        model.__class__ = type(model).__bases__[1]
