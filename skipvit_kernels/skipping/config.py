"""SkipConfig: where tokens leave, how many, and where they come back, in the paper's notation."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from skipvit_kernels.skipping import methods
from skipvit_kernels.skipping.methods import METHODS, Method

_NOTATION = re.compile(
    r"(?P<layers>\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\((?P<ratios>[^()]*)\)"
    r"(?:\+(?P<rejoin>\w+))?"
)
# Who says which patches stay, and whether the scores are attention weights: only these may weigh
# tokens.
SCORERS = {
    **dict.fromkeys(("cls", "mean", "latent"), True),
    **dict.fromkeys(("norm", "similar", "marginal", "random"), False),
}
# By what two patches are alike.
MATCHES = ("tokens", "keys")
END = "end"
_EXAMPLES = '"6(55%)+11", "6(55%)+11:mean", "4,7(30%,30%)+10", "6(45%)+fused" or "6(55%)"'


@dataclasses.dataclass(frozen=True)
class Patches:
    """A number of patches that leave, in the place of a ratio: "13p" in the notation."""

    count: int

    def __str__(self) -> str:
        return f"{self.count}p"


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A number of patches that stay, an earlier fused token among them: "139t" in the notation."""

    count: int

    def __str__(self) -> str:
        return f"{self.count}t"


Amount = Fraction | Patches | Tokens
Ratio = Amount | float | int | str


class BlockTokens(NamedTuple):
    """Tokens that one block works on, prefix tokens included."""

    attention: int
    mlp: int


@dataclasses.dataclass(frozen=True)
class SkipConfig:
    """Which blocks drop patches, how many, and where the skipped ones rejoin (SkipViT, Table 1).

    Layers count from 1, as in the paper. A drop happens between the attention and the MLP of its
    layer; its ratio is of the patches present there, and ceil(kept share) of them stay.

    Attributes:
        drop_at: layers that drop, ascending. Empty: nothing is dropped.
        drop_ratio: share of the patches dropped in each, in [0, 1]; held as exact fractions, a
            float is read as the decimal that it prints as. Or their number: `Patches(13)`, "13p";
            or that of those that stay, whatever the size of the image: `Tokens(139)`, "139t".
        rejoin_at: the first layer that sees all tokens again; "end": they come back after the last,
            for a head that reads every position; None: they never do.
        method: "skip" (SkipViT); "fuse": EViT's one token that sums up the dropped ones; "merge":
            each is merged into the kept patch most like it, and back again at the rejoin.
        rejoin_update: "none": tokens return as they left (the paper); "mean": each is moved by the
            mean movement of its image's kept patches over the skipped blocks.
        scorer: who says which patches stay. "cls": CLS, by its attention (the paper); "mean": the
            mean of the patches' queries, by its; "latent": the query of a head that pools by one;
            "norm": the norms of their keys; "similar": minus the largest cosine with a patch of odd
            position, which itself stays (at most half may leave); "marginal": CLS, less for a patch
            like another that it looks at more, more for one that stands for several; "random":
            chance, from torch's generator, for control. None: what suits the model, CLS where it
            has one.
        match: for method "merge", and for the scorers "similar" and "marginal", by what two patches
            are alike: their "tokens" after the attention, or their "keys" in it, those of all heads
            in a row: their mean, as ToMe has it, changes the logits of DeiT-tiny more (a KL
            divergence of 0.070 instead of 0.052 with 13 patches merged in each of 11 layers).
        warmup_epochs: epochs without dropping (the paper used 15); see `set_epoch`.
        ramp_epochs: epochs after them in which the shares rise along EViT's cosine, each layer's to
            its own (EViT: 100 of 300, behind 10 of warm-up); with every step, as `set_epoch` tells.
        ramp_stairs: they rise with the epochs, in so many stairs, instead.
        cls_only_last_block: compute of the last block only what a head that reads CLS needs: keys
            and values of all tokens, but one query, one projection row, one MLP row. Lossless, so
            also on during the warm-up, and useful without any drop.

    Raises:
        ValueError: on values outside these ranges, lists of unequal length, a rejoin before a drop.
    """

    drop_at: tuple[int, ...] = ()
    drop_ratio: tuple[Amount, ...] = ()
    rejoin_at: int | str | None = None
    method: str = "skip"
    rejoin_update: str = "none"
    scorer: str | None = None
    match: str = "tokens"
    warmup_epochs: int = 0
    ramp_epochs: int = 0
    ramp_stairs: int | None = None
    cls_only_last_block: bool = False

    def __post_init__(self) -> None:
        layers, ratios = self.drop_at, self.drop_ratio
        as_given = layers if isinstance(layers, Iterable) else (layers,)
        object.__setattr__(self, "drop_at", tuple(as_given))
        ratios = (ratios,) if isinstance(ratios, Ratio) else tuple(ratios)
        object.__setattr__(self, "drop_ratio", tuple(map(as_ratio, ratios)))
        if len(self.drop_at) != len(self.drop_ratio):
            raise ValueError(
                "drop_at and drop_ratio must have the same length, "
                f"got {len(self.drop_at)} layers and {len(self.drop_ratio)} ratios"
            )
        for layer in (*self.drop_at, *([] if self.rejoin_at in (None, END) else [self.rejoin_at])):
            if not isinstance(layer, int) or layer < 1:
                raise ValueError(f"layers must be integers counted from 1, got {layer!r}")
        if any(b <= a for a, b in itertools.pairwise(self.drop_at)):
            raise ValueError(f"drop_at must ascend, got {self.drop_at}")
        method = self.make_method()
        check_scorer(self.scorer, weighs=method.weighs)
        shares = [ratio for ratio in self.drop_ratio if isinstance(ratio, Fraction)]
        if self.scorer == "similar" and max(shares, default=0) > Fraction(1, 2):
            raise ValueError(
                'drop_ratio must be at most 50% with scorer "similar": patches of odd position '
                f"stay, got {_format_ratio(max(shares))}"
            )
        check_match(self.match, self.method, self.scorer)
        for name in ("warmup_epochs", "ramp_epochs"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
        stairs = self.ramp_stairs
        if stairs is not None and (
            not isinstance(stairs, int) or min(stairs, self.ramp_epochs) < 1
        ):
            raise ValueError(
                "ramp_stairs must be an integer >= 1, and None without ramp_epochs, "
                f"got {stairs!r} in {self.ramp_epochs} epochs"
            )
        if self.ramp_epochs and any(isinstance(ratio, Tokens) for ratio in self.drop_ratio):
            raise ValueError(
                "ramp_epochs must be 0 with a fixed number of tokens, "
                f"got {self.ramp_epochs} and {', '.join(map(str, self.drop_ratio))}"
            )
        if not isinstance(self.cls_only_last_block, bool):
            raise ValueError(
                f"cls_only_last_block must be True or False, got {self.cls_only_last_block!r}"
            )
        if not self.drop_at and METHODS[self.method].ending is not None:
            raise ValueError(f'method must be "skip" where nothing drops, got "{self.method}"')
        if self.rejoin_at is not None and not self.drop_at:
            raise ValueError(f"rejoin_at must be None where nothing drops, got {self.rejoin_at}")
        if self.cls_only_last_block and self.rejoin_at == END:
            raise ValueError(
                'rejoin_at must be a layer or None with cls_only_last_block, got "end": behind the '
                "last layer there is then only the CLS row"
            )
        if isinstance(self.rejoin_at, int) and self.rejoin_at <= self.drop_at[-1]:
            raise ValueError(
                f"rejoin_at must come after the last drop, in layer {self.drop_at[-1]}, "
                f"got {self.rejoin_at}"
            )

    def make_method(self) -> Method:
        """What becomes of the patches that leave, as an object."""
        return methods.make(self.method, self.rejoin_update, "rejoin_at", self.rejoin_at)

    def last_skipping(self, depth: int) -> int:
        """The last layer that works on fewer tokens; everything comes back behind it, or nothing.

        Of a model of `depth` blocks, which it is where the rejoin is at the end or never.
        """
        return self.rejoin_at - 1 if isinstance(self.rejoin_at, int) else depth

    def at(self, epoch: float = math.inf) -> SkipConfig:
        """What is dropped at a point of the training; default what the schedule leads to.

        Args:
            epoch: counted from 0, with the part of it that is over: step / steps of an epoch.

        Returns:
            A configuration without warm-up and ramp; one without drops where nothing is dropped.
        """
        into = epoch - self.warmup_epochs
        share = Fraction(int(into >= 0))
        if 0 <= into < self.ramp_epochs:
            over = into if self.ramp_stairs is None else math.floor(into) + 0.5
            # A millionth of 1,024 patches moves no count that is not within 0.001 of the next.
            steps = self.ramp_stairs or 1_000_000
            risen = (1 - math.cos(math.pi * over / self.ramp_epochs)) / 2
            share = Fraction(round(steps * risen), steps)
        if not share:
            return SkipConfig(cls_only_last_block=self.cls_only_last_block)
        ratios = self.drop_ratio
        if share < 1:
            ratios = tuple(
                share * ratio
                if isinstance(ratio, Fraction)
                else Patches(round(share * ratio.count))
                for ratio in ratios
            )
        return dataclasses.replace(
            self, drop_ratio=ratios, warmup_epochs=0, ramp_epochs=0, ramp_stairs=None
        )

    def check_depth(self, depth: int) -> None:
        """Raise ValueError where a layer lies beyond a model of `depth` blocks."""
        for name, layer in (
            ("drop_at", max(self.drop_at, default=0)),
            ("rejoin_at", self.rejoin_at),
        ):
            if isinstance(layer, int) and layer > depth:
                raise ValueError(f"{name} must be at most {depth}, the model's depth, got {layer}")
        if self.cls_only_last_block and depth in self.drop_at:
            raise ValueError(
                f"drop_at must be below {depth}, the last layer, with cls_only_last_block: "
                f"only the CLS row leaves it; got {self.drop_at}"
            )

    @classmethod
    def parse(cls, text: str, *, warmup_epochs: int | None = None) -> SkipConfig:
        """Read the notation; `SkipConfig.parse(str(config)) == config` for every config.

        "6(55%)+11" drops 55 % of the patches in layer 6 and rejoins them before layer 11;
        "4,7(30%,30%)+10" drops 30 % of what is there in layer 4 and again in layer 7;
        "6(45%)+fused" is EViT's fused token; "6(55%)" drops for good; "" drops nothing. Options
        follow a colon: "6(55%)+11:mean" for the mean update, ":score=random" for a scorer, ":cls"
        for the CLS-only last block, ":warmup=15", ":mean,score=norm,cls,warmup=15". EViT as it is
        trained is "4,7,10(30%,30%,30%)+fused:warmup=10,ramp=100"; "ramp=100/4" is in four stairs.
        A ratio that no decimal holds is a fraction, "6(1/3)+11".

        Raises:
            ValueError: on anything else, naming the part and what it should be.
        """
        fields: dict[str, Any] = {}
        core, colon, options = text.replace(" ", "").partition(":")
        if core:
            match = _NOTATION.fullmatch(core)
            if match is None:
                raise ValueError(f"config must read like {_EXAMPLES}, got {text!r}")
            ranges = [_parse_layers(part, text) for part in match["layers"].split(",")]
            ratios = [_parse_ratio(part, text) for part in match["ratios"].split(",")]
            if len(ratios) == len(ranges):
                ratios = [ratio for r, ratio in zip(ranges, ratios, strict=True) for _ in r]
            fields["drop_at"] = tuple(itertools.chain(*ranges))
            fields["drop_ratio"] = tuple(ratios)
            rejoin = match["rejoin"] or ""
            endings = {method.ending: name for name, method in METHODS.items() if method.ending}
            if rejoin.isdecimal():
                fields["rejoin_at"] = int(rejoin)
            elif rejoin == END:
                fields["rejoin_at"] = END
            elif rejoin in endings:
                fields["method"] = endings[rejoin]
            elif rejoin:
                known = " or ".join(f'"{ending}"' for ending in (END, *endings))
                raise ValueError(f"rejoin must be a layer or {known}, got {rejoin!r} in {text!r}")
        named = {method.option: name for name, method in METHODS.items() if method.option}
        updates = {update for method in METHODS.values() for update in method.updates} - {"none"}
        for option in options.split(",") if colon else ():
            name, _, value = option.partition("=")
            if option in updates:
                fields["rejoin_update"] = option
            elif option in named:
                fields["method"] = named[option]
            elif option == "cls":
                fields["cls_only_last_block"] = True
            elif name == "score" and value:
                fields["scorer"] = value
            elif name == "match" and value:
                fields["match"] = value
            elif name == "warmup" and value.isdecimal():
                fields["warmup_epochs"] = int(value)
            elif name == "ramp" and (ramp := re.fullmatch(r"(\d+)(?:/(\d+))?", value)):
                fields["ramp_epochs"] = int(ramp[1])
                fields["ramp_stairs"] = int(ramp[2]) if ramp[2] else None
            else:
                known = ", ".join(f'"{word}"' for word in (*sorted(updates), *named, "cls"))
                raise ValueError(
                    f'options must be {known}, "score=random", "match=keys", "warmup=15" or '
                    f'"ramp=100", got {option!r} in {text!r}'
                )
        if warmup_epochs is not None:
            fields["warmup_epochs"] = warmup_epochs
        return cls(**fields)

    def __str__(self) -> str:
        text = ""
        if self.drop_at:
            ranges = list(_ranges(self.drop_at, self.drop_ratio))
            layers = ",".join(layers for layers, _ in ranges)
            text = f"{layers}({','.join(_format_ratio(ratio) for _, ratio in ranges)})"
        method = METHODS[self.method]
        ending = method.ending if self.rejoin_at is None else self.rejoin_at
        text += "" if ending is None else f"+{ending}"
        stairs = "" if self.ramp_stairs is None else f"/{self.ramp_stairs}"
        options = [
            *([method.option] if method.option else []),
            *([self.rejoin_update] if self.rejoin_update != "none" else []),
            *([f"score={self.scorer}"] if self.scorer else []),
            *([f"match={self.match}"] if self.match != "tokens" else []),
            *(["cls"] if self.cls_only_last_block else []),
            *([f"warmup={self.warmup_epochs}"] if self.warmup_epochs else []),
            *([f"ramp={self.ramp_epochs}{stairs}"] if self.ramp_epochs else []),
        ]
        return f"{text}:{','.join(options)}" if options else text

    def token_counts(
        self, depth: int, num_patches: int, num_prefix_tokens: int = 1, num_head_tokens: int = 1
    ) -> list[BlockTokens]:
        """Tokens per block, prefix tokens included: seen by its attention, and by its MLP.

        With `cls_only_last_block` the last block's MLP, and the queries and the projection of its
        attention, work on the `num_head_tokens` that the head reads (2 in a distilled DeiT).

        Raises:
            ValueError: where a layer lies beyond `depth`.
        """
        self.check_depth(depth)
        method = self.make_method()
        ratio_at = dict(zip(self.drop_at, self.drop_ratio, strict=True))
        counts = []
        patches = num_patches
        for layer in range(1, depth + 1):
            if layer == self.rejoin_at:
                patches = num_patches
            attention = patches
            if layer in ratio_at:
                patches = method.num_left(patches, num_kept(patches, ratio_at[layer]))
            counts.append(BlockTokens(num_prefix_tokens + attention, num_prefix_tokens + patches))
        if self.cls_only_last_block:
            counts[-1] = counts[-1]._replace(mlp=num_head_tokens)
        return counts


def check_scorer(scorer: str | None, *, weighs: bool) -> None:
    """Raise ValueError on a name that is none; with `weighs` on scores that cannot weigh tokens."""
    if scorer is None:
        return
    if scorer not in SCORERS:
        known = ", ".join(f'"{name}"' for name in SCORERS)
        raise ValueError(f"scorer must be one of {known}, got {scorer!r}")
    if weighs and not SCORERS[scorer]:
        known = " or ".join(f'"{name}"' for name, weights in SCORERS.items() if weights)
        raise ValueError(
            f"scorer must be {known}, attention weights, where scores weigh tokens, got {scorer!r}"
        )


def check_match(match: str, method: str, scorer: str | None) -> None:
    """Raise ValueError on a name that is none, or where nothing is matched."""
    if match not in MATCHES:
        raise ValueError(f'match must be "tokens" or "keys", got {match!r}')
    if match != "tokens" and method != "merge" and scorer not in ("similar", "marginal"):
        raise ValueError(
            'match must be "tokens", the default, where nothing is matched (method "merge", '
            f'scorer "similar" or "marginal"), got {match!r}'
        )


def num_kept(num_patches: int, drop_ratio: Amount) -> int:
    """ceil((1 - drop_ratio) * num_patches) on integers: keeping 45 % of 196 is 89.

    In floats ceil(0.55 * 100) is 56. Raises ValueError where more patches are to leave, or to
    stay, than are there.
    """
    if not isinstance(drop_ratio, Fraction):
        if drop_ratio.count > num_patches:
            raise ValueError(
                f"drop_ratio must be at most the {num_patches} patches that are there, "
                f"got {drop_ratio}"
            )
        stay = isinstance(drop_ratio, Tokens)
        return drop_ratio.count if stay else num_patches - drop_ratio.count
    kept, whole = drop_ratio.denominator - drop_ratio.numerator, drop_ratio.denominator
    return (kept * num_patches + whole - 1) // whole


def as_ratio(value: Ratio) -> Amount:
    """A share in [0, 1] as an exact fraction, 0.55 is 11/20; or a number of patches."""
    if isinstance(value, (Patches, Tokens)):
        return value
    if number := _parse_number(str(value)):
        return number
    try:
        ratio = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"drop_ratio must be a number in [0, 1], got {value!r}") from None
    if not 0 <= ratio <= 1:
        raise ValueError(f"drop_ratio must be in [0, 1] (0 % to 100 %), got {value}")
    return ratio


def _parse_layers(part: str, text: str) -> range:
    """The layers of "4" or "4-7"."""
    first, _, last = part.partition("-")
    layers = range(int(first), int(last or first) + 1)
    if not layers:
        raise ValueError(f"a range of layers must ascend, got {part} in {text!r}")
    return layers


def _ranges(layers: tuple[int, ...], ratios: tuple[Amount, ...]) -> Iterator[tuple[str, Amount]]:
    """The layers of the notation and their ratio: three in a row or more as a range."""
    places = enumerate(zip(layers, ratios, strict=True))
    for (_, ratio), group in itertools.groupby(places, lambda it: (it[1][0] - it[0], it[1][1])):
        run = [layer for _, (layer, _) in group]
        for name in [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run):
            yield name, ratio


def _parse_number(part: str) -> Patches | Tokens | None:
    """Patches that leave, "13p", or that stay, "139t"; None for anything else."""
    if not re.fullmatch(r"\d+[pt]", part):
        return None
    return (Patches if part.endswith("p") else Tokens)(int(part[:-1]))


def _parse_ratio(part: str, text: str) -> Amount:
    if number := _parse_number(part):
        return number
    try:
        ratio = Fraction(part.removesuffix("%")) / (100 if part.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f'ratios must read like "55%", "13p" or "139t", got {part!r} in {text!r}'
        ) from None
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratios must lie between 0% and 100%, got {part} in {text!r}")
    return ratio


def _format_ratio(ratio: Amount) -> str:
    """As a percentage where a decimal holds it exactly, else as a fraction; or the number."""
    if not isinstance(ratio, Fraction):
        return str(ratio)
    denominator = ratio.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    if denominator != 1:
        return f"{ratio.numerator}/{ratio.denominator}"
    percent, digits = ratio * 100, 0
    while percent.denominator != 1:
        percent, digits = percent * 10, digits + 1
    whole = str(percent.numerator)
    if digits:
        whole = whole.zfill(digits + 1)
        whole = f"{whole[:-digits]}.{whole[-digits:]}"
    return f"{whole}%"
