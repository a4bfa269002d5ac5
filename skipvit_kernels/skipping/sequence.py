"""The blocks of a patched model: the same modules under the same names, run with skipping."""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.families import Context, Family
from skipvit_kernels.skipping.run import Drop, Layer, Run, run_layers


class Skipping(nn.Module):
    """What `patch` makes of the module that holds a model's blocks, by changing its class in place.

    So parameters, state dict, hooks and the identity of every module stay as they are. Nothing that
    a forward computes is kept.
    """

    family: type[Family]  # of the blocks
    config: SkipConfig
    drops: dict[int, Drop]  # by layer
    num_head_tokens: int
    dropping: bool
    recorder: list[SkipRecord] | None
    skip: Callable[..., Tensor]  # what a layer that drops does: `skip_run`, or the floor's

    def runs(self) -> tuple[list[Layer], list[Layer]]:
        """The layers before the rejoin, and those from it on."""
        layers = [Layer(self.family, block) for block in self._modules.values()]
        if self.config.cls_only_last_block:
            layers[-1] = layers[-1]._replace(num_rows=self.num_head_tokens)
        for at, drop in self.drops.items() if self.dropping else ():
            layers[at - 1] = layers[at - 1]._replace(drop=drop)
        end = len(layers) if self.config.rejoin_at is None else self.config.rejoin_at - 1
        return layers[:end], layers[end:]

    def execute(self, x: Tensor, layers: Run, contexts: list[Context]) -> Tensor:
        """`run_layers`, recorded where somebody does."""
        drops: list[tuple[Tensor, int]] = []
        if self.recorder is not None and self.dropping:
            contexts = [c._replace(record=lambda *drop: drops.append(drop)) for c in contexts]
        num_tokens = x.shape[1]
        x = run_layers(x, layers, contexts, self.skip)
        if drops and self.recorder is not None:
            self.recorder.append(SkipRecord.compose(self.config, drops, num_tokens))
        return x


class SkipSequential(Skipping, nn.Sequential):
    """Blocks that the model calls as one."""

    def forward(self, x: Tensor) -> Tensor:
        head, tail = self.runs()
        # In one call: between two the tokens of the first would be held through the second.
        return self.execute(x, [head, *tail], [Context()])

    def children(self) -> Iterator[nn.Module]:
        """Modules to run in turn: timm's gradient checkpointing runs the children one by one."""
        for layers in self.runs():
            special = first_special(layers)
            yield from (layer.block for layer in layers[:special])
            if special < len(layers):
                yield _Part(layers[special:], self.skip)

    def __getitem__(self, idx: Any) -> Any:
        if isinstance(idx, slice):
            return nn.Sequential(
                OrderedDict(itertools.islice(self._modules.items(), *idx.indices(len(self))))
            )
        return super().__getitem__(idx)


class SkipModuleList(Skipping, nn.ModuleList):
    """Blocks that the model calls itself, one by one, each with arguments of its own.

    A run is executed in the turn of its last layer, when what all its blocks are given is known; in
    the turns before that one the tokens pass.
    """

    def __iter__(self) -> Iterator[Any]:
        for layers in self.runs():
            special = first_special(layers)
            yield from (layer.block for layer in layers[:special])
            run = layers[special:]
            given: list[dict[str, Any]] = [{} for _ in run]
            yield from (_Turn(self, run, given, at) for at in range(len(run)))

    def __getitem__(self, idx: Any) -> Any:
        blocks = list(self._modules.values())[idx]
        return nn.ModuleList(blocks) if isinstance(idx, slice) else blocks


class SkipLooped(Skipping, nn.Sequential):
    """Blocks in an nn.Sequential that the model calls itself, one by one, nevertheless."""

    __iter__ = SkipModuleList.__iter__
    __getitem__ = SkipModuleList.__getitem__


def first_special(layers: list[Layer]) -> int:
    """The place of the first layer that does not just run its block; their number if all do."""
    special = (at for at, (_, _, drop, rows, _) in enumerate(layers) if drop or rows is not None)
    return next(special, len(layers))


class _Part(nn.Module):
    """Layers of a patched model as one module, for as long as a step takes."""

    def __init__(self, layers: list[Layer], skip: Callable[..., Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layer.block for layer in layers)
        self.layers, self.skip = layers, skip

    def forward(self, x: Tensor) -> Tensor:
        return run_layers(x, self.layers, [Context()], self.skip)


class _Turn:
    """One layer of a run, as the model that calls its blocks itself sees it."""

    def __init__(
        self, blocks: Skipping, run: list[Layer], given: list[dict[str, Any]], at: int
    ) -> None:
        self.blocks, self.run, self.given, self.at = blocks, run, given, at

    def __call__(self, x: Tensor, *positional: Any, **arguments: Any) -> Tensor:
        given = self.given
        names = self.blocks.family.positional
        given[self.at] = dict(zip(names, positional, strict=False)) | arguments
        if self.at < len(self.run) - 1:
            return x
        first = given[0]
        shared = all(value is first[name] for each in given for name, value in each.items())
        contexts = [Context(each) for each in (given[:1] if shared else given)]
        run = [layer._replace(context=0 if shared else at) for at, layer in enumerate(self.run)]
        return self.blocks.execute(x, run, contexts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run[self.at].block, name)


@dataclasses.dataclass(frozen=True)
class SkipRecord:
    """What one forward kept.

    Attributes:
        config: the configuration that it ran under.
        indices: one (B, P + K) int64 tensor per drop: the token positions, in the numbering of the
            full sequence, that the layers after it worked on; -1 is a fused token.
        num_tokens: N of the full sequence, prefix tokens included.
    """

    config: SkipConfig
    indices: tuple[Tensor, ...]
    num_tokens: int

    @classmethod
    def compose(
        cls, config: SkipConfig, drops: list[tuple[Tensor, int]], num_tokens: int
    ) -> SkipRecord:
        """From each drop's index among the tokens before it, and the number of tokens behind it."""
        composed: list[Tensor] = []
        before: Tensor | None = None
        for index, num_left in drops:
            if before is not None:
                index = before.gather(1, index)
            composed.append(index)
            before = torch.nn.functional.pad(index, (0, num_left - index.shape[1]), value=-1)
        return cls(config, tuple(composed), num_tokens)

    def kept(self, drop: int = -1) -> Tensor:
        """(B, N) bool: the tokens that were kept in the given drop; default the last."""
        index = self.indices[drop]
        kept = torch.zeros(len(index), self.num_tokens + 1, dtype=torch.bool, device=index.device)
        return kept.scatter(1, index % (self.num_tokens + 1), True)[:, :-1]
