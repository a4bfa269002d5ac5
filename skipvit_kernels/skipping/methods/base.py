"""The seam between a run of blocks and what becomes of the patches that leave it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

# Every method by its name: a subclass of Method that has one is entered when it is defined.
METHODS: dict[str, type[Method]] = {}


class Candidates(NamedTuple):
    """What a drop chooses from.

    Attributes:
        x: (B, N, C) tokens after the attention's residual.
        alike: (B, N, C) by what two tokens are alike.
        scores: (B, n), or (B, H, n) to be averaged over the heads.
        num_keep: K, the patches that stay.
        num_prefix_tokens: P, the leading tokens that always do.
        sizes: (B, N) float32, the patches that each token stands for; None: one each.
    """

    x: Tensor
    alike: Tensor
    scores: Tensor
    num_keep: int
    num_prefix_tokens: int
    sizes: Tensor | None


class Reduced(NamedTuple):
    """What a drop leaves.

    Attributes:
        tokens: (B, M, C) that go on: prefix tokens, kept patches in their order, and any that the
            method adds behind them.
        kept: (B, P + K) int64, the rows of x that the first of `tokens` were.
        sizes: (B, M) float32, the patches that each of them stands for; None: what `seen` had.
        owner: (B, N) int64, the place among `tokens` of the one that each row of x went into; None:
            rows that were not kept went into none.
        memo: what `restore` needs beside them.
    """

    tokens: Tensor
    kept: Tensor
    sizes: Tensor | None = None
    owner: Tensor | None = None
    memo: Any = None


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to leave and to come back; a new one is a subclass in a file of this folder.

    Attributes:
        update: what happens to a token that returns, one of the method's `updates`.
    """

    name: ClassVar[str]
    # In the notation: a word after "+", in the place of the layer, for a method that never rejoins;
    # or an option behind the colon; neither for the default.
    ending: ClassVar[str | None] = None
    option: ClassVar[str | None] = None
    updates: ClassVar[tuple[str, ...]] = ("none",)
    # Whether scores weigh tokens: they must be attention weights then, and get a gradient.
    weighs: ClassVar[bool] = False
    # Whether tokens stand for several patches behind it, and attention is told so.
    sizes: ClassVar[bool] = False

    update: str = "none"

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "name"):
            METHODS[cls.name] = cls

    def reduce(self, seen: Candidates) -> Reduced:
        """Take the tokens out that go on."""
        raise NotImplementedError

    def restore(self, x: Tensor, left: Reduced, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
        """(B, N, C): put `tokens` (B, M, C), what `left.tokens` have become, back into x."""
        raise NotImplementedError

    def spread(self, x: Tensor, left: Reduced, tokens: Tensor) -> Tensor:
        """(B, N, C): each row as the token that it went into, where tokens stand for several.

        An average over it weighs by size, and so does a head's attention.
        """
        raise NotImplementedError

    def num_left(self, num_patches: int, num_keep: int) -> int:
        """Tokens that go on beside the prefix tokens."""
        return num_keep


def make(name: str, update: str, argument: str, rejoin: int | str | bool | None) -> Method:
    """The method as configured.

    Args:
        name: of the method.
        update: of what returns.
        argument: what the caller calls `rejoin`, for the messages.
        rejoin: the layer, or whether the tokens return; None and False where they do not.

    Raises:
        ValueError: on a name or an update that does not exist, or that contradicts `rejoin`.
    """
    if name not in METHODS:
        raise ValueError(f"method must be {_either(METHODS)}, got {name!r}")
    method = METHODS[name]
    if update not in (every := dict.fromkeys(u for m in METHODS.values() for u in m.updates)):
        raise ValueError(f"rejoin_update must be {_either(every)}, got {update!r}")
    rejoins = rejoin is not None and rejoin is not False
    if rejoins and method.ending is not None:
        absent = False if rejoin is True else None
        raise ValueError(
            f'{argument} must be {absent} with method "{name}": {method.ending} tokens never '
            f"rejoin, got {rejoin}"
        )
    if update != "none" and not rejoins:
        raise ValueError(f'rejoin_update="{update}" needs a {argument}, got {rejoin}')
    if update not in method.updates:
        raise ValueError(
            f'rejoin_update must be {_either(method.updates)} with method "{name}", got {update!r}'
        )
    return method(update)


def _either(names: Iterable[str]) -> str:
    return " or ".join(f'"{name}"' for name in names)
