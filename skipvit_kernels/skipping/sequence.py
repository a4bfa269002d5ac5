"""The blocks of a patched model: the same modules under the same names, run with skipping."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.families import Context, Family
from skipvit_kernels.skipping.methods import METHODS, Reduced
from skipvit_kernels.skipping.run import Drop, Layer, Stage, run_layer, run_layers


class Skipping(nn.Module):
    """What `patch` makes of the module that holds a model's blocks, by changing its class in place.

    So parameters, state dict, hooks and the identity of every module stay as they are. Nothing that
    a forward computes is kept.
    """

    family: type[Family]  # of the blocks
    config: SkipConfig
    drops: dict[int, Drop]  # by layer
    num_prefix_tokens: int
    num_head_tokens: int
    dropping: bool
    recorder: list[SkipRecord] | None
    keep: Tensor | None  # (B, n) bool: patches that must not be dropped

    def layers(self) -> list[Layer]:
        """What the blocks do at present."""
        layers = [Layer(self.family, block) for block in self._modules.values()]
        if self.config.cls_only_last_block:
            layers[-1] = layers[-1]._replace(num_rows=self.num_head_tokens)
        if self.dropping and self.drops:
            for at, drop in self.drops.items():
                layers[at - 1] = layers[at - 1]._replace(drop=drop)
            end = self.config.last_skipping(len(layers)) - 1
            ends = sum(drop.rejoin or drop.spread for drop in self.drops.values())
            layers[end] = layers[end]._replace(ends=ends)
        return layers

    def parts(self) -> Iterator[list[Layer]]:
        """The layers, cut into what runs on its own: single ones, and from a drop to its end."""
        part: list[Layer] = []
        open_drops = 0
        for layer in self.layers():
            part.append(layer)
            open_drops += (layer.drop is not None) - layer.ends
            if not open_drops:
                yield part
                part = []
        if part:
            yield part

    def told(self) -> Callable[[int], Context]:
        """What a forward that begins now tells its blocks beside the tokens, by their number.

        Also when it is recomputed in a backward, outside of `keep_patches`.
        """
        if torch.jit.is_tracing():
            self._refuse_torchscript()
        dropping = self.dropping
        keep, recorder = (self.keep, self.recorder) if dropping else (None, None)
        return functools.partial(_context, self.config, self.num_prefix_tokens, keep, recorder)

    def _refuse_torchscript(self) -> None:
        raise RuntimeError(
            "TorchScript (torch.jit, torch.onnx.export with dynamo=False) cannot hold a patched "
            f"model ({self.config}): use torch.export, or torch.onnx.export with dynamo=True "
            "inside sk.reference_operators()"
        )

    __prepare_scriptable__ = _refuse_torchscript  # what torch.jit.script calls first


def _context(
    config: SkipConfig,
    num_prefix_tokens: int,
    keep: Tensor | None,
    recorder: list[SkipRecord] | None,
    num_tokens: int,
) -> Context:
    if keep is not None:
        if keep.shape[1] != num_tokens - num_prefix_tokens:
            raise ValueError(
                f"mask must have shape (B, {num_tokens - num_prefix_tokens}), the patches of an "
                f"image, got {tuple(keep.shape)}"
            )
        keep = F.pad(keep, (num_prefix_tokens, 0), value=False)
    record = None
    if recorder is not None:
        record = _Recording(config, num_prefix_tokens, recorder, num_tokens)
    return Context(keep=keep, record=record)


class SkipSequential(Skipping, nn.Sequential):
    """Blocks that the model calls as one."""

    def forward(self, x: Tensor) -> Tensor:
        return run_layers(x, self.layers(), [self.told()(x.shape[1])])

    def children(self) -> Iterator[nn.Module]:
        """Modules to run in turn: timm's gradient checkpointing runs the children one by one."""
        for part in self.parts():
            yield _Part(self, part) if part[0].special else part[0].block

    def __getitem__(self, idx: Any) -> Any:
        if isinstance(idx, slice):
            return nn.Sequential(
                OrderedDict(itertools.islice(self._modules.items(), *idx.indices(len(self))))
            )
        return super().__getitem__(idx)


class SkipModuleList(Skipping, nn.ModuleList):
    """Blocks that the model calls itself, one by one, each with arguments of its own.

    A run is executed in the turn of its last layer, when what all its blocks are given is known; in
    the turns before that one the tokens pass. So a run is one call, that can be recomputed.
    """

    def __iter__(self) -> Iterator[Any]:
        for part in self.parts():
            given: list[dict[str, Any]] = [{} for _ in part]
            told = self.told()
            turns = (_Turn(told, part, given, at) for at in range(len(part)))
            yield from turns if part[0].special else (part[0].block,)

    def __getitem__(self, idx: Any) -> Any:
        blocks = list(self._modules.values())[idx]
        return nn.ModuleList(blocks) if isinstance(idx, slice) else blocks


class SkipLooped(Skipping, nn.Sequential):
    """Blocks in an nn.Sequential that the model calls itself, one by one, nevertheless."""

    __iter__ = SkipModuleList.__iter__
    __getitem__ = SkipModuleList.__getitem__


class _Part(nn.Module):
    """Layers of a patched model as one module, for as long as a step takes."""

    def __init__(self, blocks: Skipping, layers: list[Layer]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layer.block for layer in layers)
        self.layers, self.told = layers, blocks.told()

    def forward(self, x: Tensor) -> Tensor:
        return run_layers(x, self.layers, [self.told(x.shape[1])])


class _Turn:
    """One layer of a run, as the model that calls its blocks itself sees it."""

    def __init__(
        self,
        told: Callable[[int], Context],
        run: list[Layer],
        given: list[dict[str, Any]],
        at: int,
    ) -> None:
        self.told, self.run, self.given, self.at = told, run, given, at

    def __call__(self, x: Tensor, *positional: Any, **arguments: Any) -> Tensor:
        given = self.given
        given[self.at] = _by_name(self.run[self.at], positional, arguments)
        if self.at < len(self.run) - 1:
            return x
        first = given[0]
        shared = all(value is first[name] for each in given for name, value in each.items())
        context = self.told(x.shape[1])
        contexts = [context._replace(arguments=each) for each in (given[:1] if shared else given)]
        run = [layer._replace(context=0 if shared else at) for at, layer in enumerate(self.run)]
        return run_layers(x, run, contexts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run[self.at].block, name)


def _by_name(
    layer: Layer, positional: tuple[Any, ...], arguments: dict[str, Any]
) -> dict[str, Any]:
    """What a model gives a block beside the tokens."""
    return dict(zip(layer.family.positional, positional, strict=False)) | arguments


class Tapped:
    """forward_intermediates of a patched model: what every block gives, in full length.

    Between a drop and its rejoin the tokens are put back for the look as they would be there; the
    blocks go on with the kept ones. timm's own method runs, on the model with other blocks.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        blocks = getattr(self.model, self.name)
        ending = METHODS[blocks.config.method].ending
        if ending is not None and blocks.dropping:
            raise RuntimeError(
                f"forward_intermediates gives every token, and under {blocks.config} {ending} "
                "tokens never rejoin: it needs unpatch(model) first"
            )
        view = copy.copy(self.model)
        state: Any = vars(view)
        del state["forward_intermediates"]
        state["_modules"] = {**state["_modules"], self.name: _taps(blocks)}
        # What is between two blocks is not recomputed.
        state["grad_checkpointing"] = False
        return view.forward_intermediates(*args, **kwargs)


def _taps(blocks: Skipping) -> list[_Tap]:
    run = _TappedRun(blocks)
    return [_Tap(run, layer) for layer in blocks.layers()]


class _TappedRun:
    """The tokens that the blocks work on, while others look at all of them."""

    def __init__(self, blocks: Skipping) -> None:
        self.config, self.told = blocks.config, blocks.told()
        self.context: Context | None = None
        self.stages: list[Stage] = []
        self.tokens: Tensor | None = None
        self.shown: Tensor | None = None

    def step(self, layer: Layer, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """One layer on all tokens x (B, N, C), and all of them behind it."""
        if self.context is None:
            self.context = self.told(x.shape[1])
        context = self.context._replace(arguments=arguments)
        if self.stages and x is not self.shown:
            raise RuntimeError(
                "between a drop and its rejoin a block must be given what the block before it "
                f"gave ({self.config}), got other tokens: this needs unpatch(model) first"
            )
        tokens = x if self.tokens is None or not self.stages else self.tokens
        for stage in self.stages:
            context = stage.narrow(context)
        if layer.num_rows is not None:
            layer = layer._replace(num_rows=tokens.shape[1])
        tokens, _ = run_layer(tokens, layer, [context], self.stages, keep_all=True)
        self.tokens = self.shown = tokens
        for stage in reversed(self.stages):
            self.shown = stage.show(self.shown)
        return self.shown


class _Tap:
    """One layer, as a model sees it that looks at what is between its blocks."""

    def __init__(self, run: _TappedRun, layer: Layer) -> None:
        self.run, self.layer = run, layer

    def __call__(self, x: Tensor, *positional: Any, **arguments: Any) -> Tensor:
        return self.run.step(self.layer, x, _by_name(self.layer, positional, arguments))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer.block, name)


@dataclasses.dataclass(frozen=True)
class SkipRecord:
    """What one forward kept.

    Attributes:
        config: the configuration that it ran under.
        indices: one (B, P + K) int64 tensor per drop: the token positions, in the numbering of the
            full sequence, that the layers after it worked on; -1 is a fused token.
        num_tokens: N of the full sequence, prefix tokens included.
        num_prefix_tokens: P of them.
        owners: one (B, N) int64 tensor per drop of a method that merges: the place, in that drop's
            index, of the token that each of the full sequence went into.
        chosen_by: one (B, N) float32 tensor per drop: see `scores`.
    """

    config: SkipConfig
    indices: tuple[Tensor, ...]
    num_tokens: int
    num_prefix_tokens: int
    owners: tuple[Tensor, ...] = ()
    chosen_by: tuple[Tensor, ...] = ()

    def kept(self, drop: int = -1) -> Tensor:
        """(B, N) bool: the tokens that were kept in the given drop; default the last."""
        index = self.indices[drop]
        kept = torch.zeros(len(index), self.num_tokens + 1, dtype=torch.bool, device=index.device)
        return kept.scatter(1, index % (self.num_tokens + 1), True)[:, :-1]

    def owner(self, drop: int = -1) -> Tensor:
        """(B, N) int64: the position of the token that each was in after the drop.

        Its own for one that was kept; of merged ones that of the kept patch which they went into,
        and -1 for one that passed the layers by.
        """
        if self.owners:
            return self.indices[drop].gather(1, self.owners[drop])
        kept = self.kept(drop)
        return torch.where(kept, torch.arange(self.num_tokens, device=kept.device), -1)

    def scores(self, drop: int = -1) -> Tensor:
        """(B, N) float32: by what the drop chose, the mean over heads; the last by default.

        NaN where nothing was scored: of prefix tokens, of what had left before, and of patches that
        had to stay.
        """
        return self.chosen_by[drop]


class _Recording:
    """One forward's drops, one by one; the last makes them a record."""

    def __init__(
        self, config: SkipConfig, num_prefix: int, records: list[SkipRecord], num_tokens: int
    ) -> None:
        self.config, self.num_prefix, self.records = config, num_prefix, records
        self.num_tokens = num_tokens
        self.indices: list[Tensor] = []
        self.owners: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.before: Tensor | None = None  # positions of the tokens that are there; -1: fused

    def __call__(self, left: Reduced, scores: Tensor) -> None:
        index, owner, before = left.kept, left.owner, self.before
        scores = scores.detach().float()
        scores = scores.mean(dim=1) if scores.dim() == 3 else scores
        if before is None:
            before = torch.arange(self.num_tokens, device=index.device).expand(len(index), -1)
        index = before.gather(1, index)
        self.indices.append(index)
        if owner is not None:
            self.owners.append(owner.gather(1, self.owners[-1]) if self.owners else owner)
        # A fused token has a place behind the others, which is cut off.
        chosen_by = scores.new_full((len(index), self.num_tokens + 1), torch.nan)
        places = before[:, self.num_prefix :] % (self.num_tokens + 1)
        self.scores.append(chosen_by.scatter(1, places, scores)[:, :-1])
        self.before = F.pad(index, (0, left.tokens.shape[1] - index.shape[1]), value=-1)
        if len(self.indices) == len(self.config.drop_at):
            record = SkipRecord(
                self.config,
                tuple(self.indices),
                self.num_tokens,
                self.num_prefix,
                tuple(self.owners),
                tuple(self.scores),
            )
            self.records.append(record)
