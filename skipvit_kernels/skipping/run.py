"""A run of transformer blocks in which the patches that do not matter are skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvit_kernels.skipping import families, methods, scorers
from skipvit_kernels.skipping.config import (
    Amount,
    Ratio,
    as_ratio,
    check_match,
    check_scorer,
    num_kept,
)
from skipvit_kernels.skipping.families import Attended, Context, Family, as_called
from skipvit_kernels.skipping.methods import Candidates, Method, Reduced


@dataclasses.dataclass(frozen=True)
class Drop:
    """What a layer drops: how much, who stays, what becomes of the others.

    Attributes:
        rejoin: whether what was dropped comes back at the end of the run.
        spread: whether a token comes back as each of the patches that it stands for, instead.
        head: the model's final norm and pool, where their latent query says who stays.
    """

    drop_ratio: Amount
    num_prefix_tokens: int
    scorer: str
    match: str
    method: Method
    rejoin: bool
    spread: bool = False
    head: tuple[Any, Any] | None = None

    def num_keep(self, num_tokens: int) -> int:
        return num_kept(num_tokens - self.num_prefix_tokens, self.drop_ratio)

    def reduce(self, family: type[Family], attended: Attended, context: Context) -> Reduced:
        """Take the tokens out that go on, of a block after its attention."""
        prefix, num_keep = self.num_prefix_tokens, self.num_keep(attended.x.shape[1])
        keys = self.match == "keys"
        alike = attended.k.transpose(1, 2).flatten(2) if keys else attended.x
        if self.method.sizes and attended.valid is not None:
            raise ValueError(
                'method must not be "merge" for images with padding, which would be merged too'
            )
        scores = scorers.score(
            self.scorer,
            family,
            attended,
            alike,
            num_keep,
            prefix,
            sizes=context.sizes,
            trained=self.method.weighs,
            head=self.head,
        )
        if context.keep is not None:
            # NaN ranks above every number; what was NaN ranks below those that must stay.
            keep = context.keep[:, prefix:]
            keep = keep if scores.dim() == 2 else keep[:, None]
            scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf).masked_fill(
                keep, torch.nan
            )
        seen = Candidates(attended.x, alike, scores, num_keep, prefix, context.sizes)
        left = self.method.reduce(seen)
        if context.record is not None:
            context.record(left, scores)
        return left

    def restore(self, x: Tensor, left: Reduced, tokens: Tensor) -> Tensor:
        """x (B, N, C), with what the tokens that went on have become put back."""
        if self.spread:
            return self.method.spread(x, left, tokens)
        return self.method.restore(x, left, tokens, self.num_prefix_tokens)


class Layer(NamedTuple):
    """A block, and what it does beside attending and feeding.

    Attributes:
        drop: what it drops; the layers behind it work on what is left.
        ends: how many drops end behind it: what they took out comes back, the last one's first.
        num_rows: of a last block of which only the first rows are wanted, how many.
        context: the place in the run's contexts of what this block is given beside the tokens.
    """

    family: type[Family]
    block: Any
    drop: Drop | None = None
    ends: int = 0
    num_rows: int | None = None
    context: int = 0

    @property
    def special(self) -> bool:
        """Whether it does more, or less, than its block."""
        return self.drop is not None or self.num_rows is not None


class Stage(NamedTuple):
    """A drop that has not ended: what its end puts back, and the contexts before it."""

    layer: Layer
    drop: Drop
    x: Tensor
    left: Reduced
    contexts: list[Context]

    def restore(self, tokens: Tensor) -> Tensor:
        return self.drop.restore(self.x, self.left, tokens)

    def show(self, tokens: Tensor) -> Tensor:
        """As `restore`, for those who look on while the run goes on."""
        prefix = self.drop.num_prefix_tokens
        return self.drop.method.restore(self.x, self.left, tokens, prefix)

    def narrow(self, context: Context) -> Context:
        """A context of the tokens before the drop, for those behind it."""
        prefix, sizes = self.drop.num_prefix_tokens, self.left.sizes
        if sizes is not None:
            context = context._replace(sizes=None)
        inner = self.layer.family.narrow(context, self.left.kept, prefix)
        if context.keep is not None:
            added = self.left.tokens.shape[1] - self.left.kept.shape[1]
            keep = context.keep.gather(1, self.left.kept)
            inner = inner._replace(keep=F.pad(keep, (0, added), value=False))
        return inner if sizes is None else inner._replace(sizes=sizes)


def run_layers(x: Tensor, layers: Iterable[Layer], contexts: list[Context]) -> Tensor:
    """Layers one after the other: (B, N, C) in; (B, N, C) out, or what is left where none ends.

    Args:
        x: (B, N, C) tokens.
        layers: the run.
        contexts: what blocks are given beside the tokens.
    """
    stages: list[Stage] = []
    for layer in layers:
        x, contexts = run_layer(x, layer, contexts, stages)
    return x


def run_layer(
    x: Tensor,
    layer: Layer,
    contexts: list[Context],
    stages: list[Stage],
    *,
    keep_all: bool = False,
) -> tuple[Tensor, list[Context]]:
    """One layer, and the contexts of the next; drops that will end are kept in `stages`.

    Those too that never will, with `keep_all`.
    """
    family, block, context = layer.family, layer.block, contexts[layer.context]
    if layer.drop is not None:
        x, stage = _drop(x, layer, layer.drop, contexts)
        contexts = [stage.narrow(context) for context in contexts]
        if layer.drop.rejoin or layer.drop.spread or keep_all:
            stages.append(stage)
    elif (num_rows := layer.num_rows) is not None:

        def forward(x: Tensor) -> Tensor:
            return family.feed(block, family.attend_rows(block, x, context, num_rows))

        x = as_called(block, forward, x)
    else:
        x = family.call(block, x, context)
    for _ in range(layer.ends):
        stage = stages.pop()
        x, contexts = stage.restore(x), stage.contexts
    return x, contexts


def _drop(x: Tensor, layer: Layer, drop: Drop, contexts: list[Context]) -> tuple[Tensor, Stage]:
    stages: list[Stage] = []

    def forward(x: Tensor) -> Tensor:
        # Keys and scores end with this call: they would be held through the run.
        stages.append(_reduce(x, layer, drop, contexts))
        return layer.family.feed(layer.block, stages[0].left.tokens)

    return as_called(layer.block, forward, x), stages[0]


def _reduce(x: Tensor, layer: Layer, drop: Drop, contexts: list[Context]) -> Stage:
    context = contexts[layer.context]
    attended = layer.family.attend(layer.block, x, context)
    left = drop.reduce(layer.family, attended, context)
    return Stage(layer, drop, attended.x, left, contexts)


class SkipBlock(nn.Module):
    """Run transformer blocks on the patches that CLS looks at, and pass the others by.

    The first block attends to all tokens; between its attention and its MLP the patches with the
    lowest CLS attention leave; the other blocks see the kept ones, and the end of the run puts the
    skipped ones back at their own positions (SkipViT, arXiv 2401.15293). A pure function of the
    tokens: (B, N, C) in, (B, N, C) out, or (B, P + K, C) without a rejoin (one more token with
    method "fuse"). A SkipBlock among `blocks` drops again, for two-stage skipping.

    Args:
        blocks: of one known family, whose own parts are called (timm ViT `Block`s); the ones after
            the first may be SkipBlocks. They are given what the SkipBlock is called with beside
            the tokens, for the tokens that they see.
        drop_ratio: share of the patches to skip, in [0, 1]; ceil(kept share) of them stay; or
            their number, "13p"; or the number of those that stay, "139t".
        num_prefix_tokens: P, the leading tokens that are never dropped; the first is CLS.
        method: "skip", "fuse" for EViT's token that sums up the dropped ones, or "merge".
        rejoin: put the skipped patches back at the end. Not with method "fuse".
        rejoin_update: "none": they return as they left; "mean": moved by the mean movement of their
            image's kept patches.
        scorer: who says which patches stay, as in `SkipConfig`; default "cls", or "mean" where
            there are no prefix tokens.
        match: by what two patches are alike, as in `SkipConfig`.

    Raises:
        ValueError: on a block that is not known, or settings that contradict each other.
    """

    drop: Drop

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        drop_ratio: Ratio,
        *,
        num_prefix_tokens: int = 1,
        method: str = "skip",
        rejoin: bool = True,
        rejoin_update: str = "none",
        scorer: str | None = None,
        match: str = "tokens",
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.family = check_blocks(self.blocks)
        scorer = scorer or ("cls" if num_prefix_tokens else "mean")
        if num_prefix_tokens < (least := int(scorer in ("cls", "marginal"))):
            raise ValueError(
                f'num_prefix_tokens must be at least {least} with scorer "{scorer}", '
                f"got {num_prefix_tokens}"
            )
        chosen = methods.make(method, rejoin_update, "rejoin", rejoin)
        check_scorer(scorer, weighs=chosen.weighs)
        check_match(match, method, scorer)
        if scorer == "latent":
            raise ValueError(
                'scorer must not be "latent" in a SkipBlock, which has no head: patch the model'
            )
        open_ended = any(isinstance(b, SkipBlock) and not b.drop.rejoin for b in self.blocks)
        if rejoin and open_ended:
            raise ValueError(
                "rejoin must be False around a SkipBlock that does not rejoin, got True: what it "
                "drops does not come back"
            )
        ratio = as_ratio(drop_ratio)
        self.drop = Drop(ratio, num_prefix_tokens, scorer, match, chosen, rejoin)

    def layers(self) -> list[Layer]:
        """The run, read off the modules at every call: a replica's are its own."""
        first, *others = self.blocks
        layers = [Layer(self.family, first, self.drop)]
        for block in others:
            if isinstance(block, SkipBlock):
                layers += block.layers()
            else:
                layers.append(Layer(self.family, block))
        layers[-1] = layers[-1]._replace(ends=layers[-1].ends + self.drop.rejoin)
        return layers

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        return run_layers(x, self.layers(), [Context(arguments)])

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self.drop).items())


def check_blocks(blocks: Iterable[Any]) -> type[Family]:
    """The family of the blocks of a run.

    Raises:
        ValueError: where there are none, or one is not known or of another family, naming it.
    """
    blocks = list(blocks)
    if not blocks:
        raise ValueError("blocks must hold at least one block, got none")
    family = families.of_block(blocks[0], "block 0 of the run")
    for position, block in enumerate(blocks):
        what = f"block {position} of the run"
        other = family
        if isinstance(block, SkipBlock) and position > 0:
            other = block.family
        else:
            other = families.of_block(block, what)
            other.check_block(block, what)
        if other is not family:
            raise ValueError(
                f"{what} must be of the family {family.__name__}, got {other.__name__}"
            )
    return family
