"""A run of transformer blocks in which the patches that do not matter are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from torch import Tensor, nn

from skipvit_kernels.skipping import families, methods, scorers
from skipvit_kernels.skipping.config import Ratio, as_ratio, check_scorer, num_kept
from skipvit_kernels.skipping.families import Context, Family
from skipvit_kernels.skipping.methods import Candidates, Method, Reduced


class Drop(NamedTuple):
    """What a layer drops: how much, who stays, what becomes of the others.

    Attributes:
        head: the model's final norm and pool, where their latent query says who stays.
    """

    ratio: Fraction
    num_prefix_tokens: int
    scorer: str
    method: Method
    rejoin: bool
    head: tuple[Any, Any] | None = None

    def num_keep(self, num_tokens: int) -> int:
        return num_kept(num_tokens - self.num_prefix_tokens, self.ratio)


class Layer(NamedTuple):
    """A block, and what it does beside attending and feeding.

    Attributes:
        drop: what it drops; everything behind it in the run works on what is left.
        num_rows: of a last block of which only the first rows are wanted, how many.
        context: the place in the run's contexts of what this block is given beside the tokens.
    """

    family: type[Family]
    block: Any
    drop: Drop | None = None
    num_rows: int | None = None
    context: int = 0


# A run: layers, and among them runs of their own, which end before it does.
Run = Sequence[Any]


def run_layers(
    x: Tensor, layers: Run, contexts: list[Context], skip: Callable[..., Tensor] | None = None
) -> Tensor:
    """Layers one after the other: (B, N, C) in; (B, N, C) out, or what an open end leaves of it.

    Args:
        x: (B, N, C) tokens.
        layers: the run; from its first drop to its end it is `skip`'s.
        contexts: what blocks are given beside the tokens.
        skip: what a drop does; default `skip_run`, the other is the floor's.
    """
    skip = skip or skip_run
    for at, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            x = run_layers(x, layer, contexts, skip)
        elif layer.drop is not None:
            return skip(x, layer, layer.drop, layers[at + 1 :], contexts)
        elif layer.num_rows is not None:
            context = contexts[layer.context]
            x = layer.family.attend_rows(layer.block, x, context, layer.num_rows)
            x = layer.family.feed(layer.block, x)
        else:
            x = layer.family.call(layer.block, x, contexts[layer.context])
    return x


def skip_run(x: Tensor, first: Layer, drop: Drop, others: Run, contexts: list[Context]) -> Tensor:
    """A layer that drops, and the others on what it leaves; then, as configured, the rejoin."""
    x, left = _reduce(x, first, drop, contexts[first.context])
    inner = [_narrow(context, first.family, left, drop.num_prefix_tokens) for context in contexts]
    tokens = run_layers(first.family.feed(first.block, left.tokens), others, inner)
    if not drop.rejoin:
        return tokens
    return drop.method.restore(x, left, tokens, drop.num_prefix_tokens)


def _reduce(x: Tensor, layer: Layer, drop: Drop, context: Context) -> tuple[Tensor, Reduced]:
    """x after the layer's attention, and what goes on of it. Keys and scores end with this call."""
    attended = layer.family.attend(layer.block, x, context)
    prefix, method = drop.num_prefix_tokens, drop.method
    scores = scorers.score(
        drop.scorer, layer.family, attended, prefix, trained=method.weighs, head=drop.head
    )
    num_keep = drop.num_keep(x.shape[1])
    left = method.reduce(
        Candidates(attended.x, attended.k, scores, num_keep, prefix, context.sizes)
    )
    if context.record is not None:
        context.record(left.kept, left.tokens.shape[1])
    return attended.x, left


def _narrow(context: Context, family: type[Family], left: Reduced, num_prefix: int) -> Context:
    if left.sizes is None:
        return family.narrow(context, left.kept, num_prefix)
    inner = family.narrow(context._replace(sizes=None), left.kept, num_prefix)
    return inner._replace(sizes=left.sizes)


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
        drop_ratio: share of the patches to skip, in [0, 1]; ceil(kept share) of them stay.
        num_prefix_tokens: P, the leading tokens that are never dropped; the first is CLS.
        method: "skip", or "fuse" for EViT's token that sums up the dropped ones.
        rejoin: put the skipped patches back at the end. Not with method "fuse".
        rejoin_update: "none": they return as they left; "mean": moved by the mean movement of their
            image's kept patches.
        scorer: who says which patches stay, as in `SkipConfig`; default "cls", or "mean" where
            there are no prefix tokens.

    Raises:
        ValueError: on a block that is not known, or settings that contradict each other.
    """

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
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.family = check_blocks(self.blocks)
        scorer = scorer or ("cls" if num_prefix_tokens else "mean")
        if num_prefix_tokens < (least := int(scorer == "cls")):
            raise ValueError(
                f'num_prefix_tokens must be at least {least} with scorer "{scorer}", '
                f"got {num_prefix_tokens}"
            )
        chosen = methods.make(method, rejoin_update, "rejoin", rejoin)
        check_scorer(scorer, weighs=chosen.weighs)
        if scorer == "latent":
            raise ValueError(
                'scorer must not be "latent" in a SkipBlock, which has no head: patch the model'
            )
        self.drop = Drop(as_ratio(drop_ratio), num_prefix_tokens, scorer, chosen, rejoin)

    def layers(self) -> Run:
        """The run, read off the modules at every call: a replica's are its own."""
        first, *others = self.blocks
        return [
            Layer(self.family, first, self.drop),
            *(b.layers() if isinstance(b, SkipBlock) else Layer(self.family, b) for b in others),
        ]

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        return run_layers(x, self.layers(), [Context(arguments)])

    def extra_repr(self) -> str:
        ratio, *others = self.drop._asdict().items()
        return ", ".join(f"{name}={value}" for name, value in (("drop_ratio", ratio[1]), *others))


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
