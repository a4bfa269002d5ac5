"""patch: make a timm VisionTransformer skip tokens, in place; and everything to do with it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from skipvit_kernels.skipping.config import SkipConfig
from skipvit_kernels.skipping.run import (
    ClsBlock,
    SkipBlock,
    check_blocks,
    check_cls_block,
    cls_run,
    skip_run,
)


class SkipSequential(nn.Sequential):
    """`model.blocks` of a patched model: the same blocks under the same names, run with skipping.

    `patch` turns the model's own nn.Sequential into this by its class, so that parameters, state
    dict, hooks and the identity of every module stay as they are. Nothing that a forward computes
    is kept.
    """

    config: SkipConfig
    num_prefix_tokens: int
    num_head_tokens: int
    dropping: bool
    recorder: list[SkipRecord] | None

    def forward(self, x: Tensor) -> Tensor:
        recorder = self.recorder if self.dropping else None
        indices: list[Tensor] = []
        record = None if recorder is None else indices.append
        num_tokens = x.shape[1]
        for stage in self._stages(
            functools.partial(functools.partial, skip_run, record=record),
            functools.partial(functools.partial, cls_run),
        ):
            x = stage(x)
        if recorder is not None:
            recorder.append(SkipRecord.compose(self.config, indices, num_tokens))
        return x

    def _stages(
        self,
        make_run: Callable[..., Callable[[Tensor], Tensor]],
        make_last: Callable[..., Callable[[Tensor], Tensor]],
    ) -> list[Any]:
        """The blocks, each run from a drop to the rejoin folded into one `make_run(blocks=...)`.

        A later drop's run lies inside an earlier one's, so the last is folded first. A CLS-only
        last block is `make_last(block=...)`, inside a run that never rejoins.
        """
        stages: list[Any] = list(self._modules.values())
        config = self.config
        if config.cls_only_last_block:
            stages[-1] = make_last(block=stages[-1], num_rows=self.num_head_tokens)
        if not self.dropping:
            return stages
        end = len(stages) if config.rejoin_at is None else config.rejoin_at - 1
        run, rest = stages[:end], stages[end:]
        for layer, ratio in zip(reversed(config.drop_at), reversed(config.drop_ratio), strict=True):
            run[layer - 1 :] = [
                make_run(
                    blocks=run[layer - 1 :],
                    drop_ratio=ratio,
                    num_prefix_tokens=self.num_prefix_tokens,
                    method=config.method,
                    rejoin=config.rejoin_at is not None,
                    rejoin_update=config.rejoin_update,
                )
            ]
        return run + rest

    def children(self) -> Iterator[nn.Module]:
        """The stages as modules: timm's gradient checkpointing runs the children one by one."""
        yield from self._stages(SkipBlock, ClsBlock)

    def __getitem__(self, idx: Any) -> Any:
        if isinstance(idx, slice):
            return nn.Sequential(
                OrderedDict(itertools.islice(self._modules.items(), *idx.indices(len(self))))
            )
        return super().__getitem__(idx)


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
    def compose(cls, config: SkipConfig, indices: list[Tensor], num_tokens: int) -> SkipRecord:
        """From the index of each drop among the tokens that the drop before it left."""
        composed: list[Tensor] = []
        for index in indices:
            if composed:
                before = composed[-1]
                if config.method == "fuse":
                    before = torch.cat([before, before.new_full((len(before), 1), -1)], dim=1)
                index = before.gather(1, index)
            composed.append(index)
        return cls(config, tuple(composed), num_tokens)

    def kept(self, drop: int = -1) -> Tensor:
        """(B, N) bool: the tokens that were kept in the given drop; default the last."""
        index = self.indices[drop]
        kept = torch.zeros(len(index), self.num_tokens + 1, dtype=torch.bool, device=index.device)
        return kept.scatter(1, index % (self.num_tokens + 1), True)[:, :-1]


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


def patch(
    model: nn.Module,
    config: SkipConfig | str,
    *,
    warmup_epochs: int | None = None,
    cls_only_last_block: bool | None = None,
) -> nn.Module:
    """Make a timm VisionTransformer skip tokens, in training and evaluation.

    In place, on the model's own modules: state dict keys, parameters, optimizers and checkpoints
    stay those of the unpatched model. Patch before torch.compile, DDP and the like wrap it.

    Args:
        model: a timm VisionTransformer with a CLS token: ViT, DeiT (distilled too), DeiT-III, with
            LayerScale, q/k norm, gates, DropPath, registers.
        config: where and how much, as a `SkipConfig` or its notation, e.g. "6(55%)+11"; "" drops
            nothing.
        warmup_epochs: epochs without dropping, counted by `set_epoch`; default the config's.
        cls_only_last_block: compute of the last block only what the head reads: the same logits and
            gradients up to rounding, for less (`SkipConfig`); default the config's. The model then
            gives logits only: forward_features, which gives every token, raises RuntimeError.

    Returns:
        The model itself.

    Raises:
        ValueError: where the model or one of its blocks cannot skip, naming it and the reason,
            where the configuration does not fit its depth, or where `cls_only_last_block` meets a
            head that reads other tokens (average pooling). The model is then as it was.
    """
    if isinstance(config, str):
        config = SkipConfig.parse(config)
    if warmup_epochs is not None:
        config = dataclasses.replace(config, warmup_epochs=warmup_epochs)
    if cls_only_last_block is not None:
        config = dataclasses.replace(config, cls_only_last_block=cls_only_last_block)
    _check_model(model)
    blocks: Any = model.blocks
    config.check_depth(len(blocks))
    stop = None if config.rejoin_at is None else config.rejoin_at - 1
    for layer in config.drop_at[:1]:
        check_blocks(list(blocks)[layer - 1 : stop])
    if config.cls_only_last_block:
        from skipvit_kernels.skipping.cls_only import make_cls_only

        check_cls_block(blocks[-1])
        make_cls_only(model)

    blocks.__class__ = SkipSequential
    blocks.config = config
    blocks.num_prefix_tokens = model.num_prefix_tokens
    blocks.num_head_tokens = 1 + hasattr(model, "head_dist")
    blocks.dropping = config.warmup_epochs == 0
    blocks.recorder = None
    for layer in config.drop_at:
        blocks[layer - 1].register_forward_pre_hook(_DirectCall(blocks, layer))
    if config.cls_only_last_block:
        blocks[-1].register_forward_pre_hook(_DirectCall(blocks, len(blocks)))
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`: exactly the model it was. Returns it.

    Raises:
        ValueError: where the model is not patched.
    """
    for blocks in _patched(model, "unpatch"):
        if blocks.config.cls_only_last_block:
            from skipvit_kernels.skipping.cls_only import undo

            for module in model.modules():
                undo(module)
        for block in blocks._modules.values():
            hooks = block._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _DirectCall)]:
                del hooks[key]
        for name in SkipSequential.__annotations__:
            delattr(blocks, name)
        blocks.__class__ = nn.Sequential  # type: ignore[assignment]
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether the model, or one that it wraps (DDP, compiled, an EMA's copy), is patched."""
    return any(isinstance(module, SkipSequential) for module in model.modules())


def set_epoch(model: nn.Module, epoch: int) -> None:
    """Tell the model which epoch begins: no dropping in the first `warmup_epochs` of them.

    Call it at the start of every epoch and after a resume; also on a wrapper (DDP, compiled) and,
    separately, on an EMA's copy.

    Args:
        epoch: counted from 0.

    Raises:
        ValueError: where the model is not patched, or `epoch` is negative or no integer.
    """
    patched = _patched(model, "set_epoch")
    if not isinstance(epoch, int) or epoch < 0:
        raise ValueError(f"epoch must be an integer >= 0, got {epoch!r}")
    for blocks in patched:
        blocks.dropping = epoch >= blocks.config.warmup_epochs


@contextlib.contextmanager
def record_skips(model: nn.Module) -> Iterator[list[SkipRecord]]:
    """Collect which tokens the forwards inside the context kept, one `SkipRecord` each.

        with sk.record_skips(model) as records:
            model(images)
        kept = records[0].kept()          # (B, N) bool

    Forwards in warm-up epochs drop nothing and leave no record. Of nested contexts the innermost
    collects.

    Raises:
        ValueError: where the model is not patched, or checkpoints its gradients (its blocks are
            then run one by one, out of sight).
    """
    patched = _patched(model, "record_skips")
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "model must not checkpoint gradients while recording, "
            "got grad_checkpointing=True: call set_grad_checkpointing(False)"
        )
    records: list[SkipRecord] = []
    outer = [blocks.recorder for blocks in patched]
    for blocks in patched:
        blocks.recorder = records
    try:
        yield records
    finally:
        for blocks, recorder in zip(patched, outer, strict=True):
            blocks.recorder = recorder


@torch.no_grad()
def verify(
    model: nn.Module, config: SkipConfig | str, *, images: Tensor | None = None
) -> VerifyReport:
    """Check on this very model that the routing itself changes nothing.

    Runs the model unpatched, and patched with the configuration's drops at a ratio of 0, so that
    scores, selection, gather and rejoin all run while every token is kept. A CLS-only last block
    runs as configured: it alone may change roundings.

    Args:
        model: a timm VisionTransformer, patched or not; left as it is.
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
    _check_model(model)
    if images is None:
        embed: Any = model.patch_embed
        weight = embed.proj.weight
        images = torch.randn(2, weight.shape[1], *embed.img_size).to(weight)
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


class _DirectCall:
    """Refuse a block that drops, or a CLS-only last one, outside the patched `model.blocks`.

    forward_intermediates and attention masks make timm loop over the blocks themselves: they would
    run without skipping, and nobody would notice.
    """

    def __init__(self, blocks: SkipSequential, layer: int) -> None:
        self.blocks, self.layer = blocks, layer

    def __call__(self, block: nn.Module, args: Any) -> None:
        config = self.blocks.config
        drops = self.layer in config.drop_at
        if self.blocks.dropping or not drops:
            does = "drops tokens" if drops else "computes only what the head reads"
            raise RuntimeError(
                f"layer {self.layer} {does} ({config}) and can only run inside the patched "
                "model.blocks: attn_mask, is_causal, forward_intermediates and calls of single "
                "blocks need unpatch(model) first"
            )


def _patched(model: nn.Module, caller: str) -> list[SkipSequential]:
    found = [module for module in model.modules() if isinstance(module, SkipSequential)]
    if not found:
        raise ValueError(
            f"{caller} needs a patched model, got a {type(model).__name__} that is not patched"
        )
    return found


def _check_model(model: nn.Module) -> None:
    """Raise ValueError where the model cannot be patched, naming it and the reason."""
    from timm.models.vision_transformer import VisionTransformer

    name = type(model).__name__
    if is_patched(model):
        raise ValueError(
            "model must not be patched already, got one patched with "
            f"{_patched(model, 'patch')[0].config}: call unpatch first"
        )
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"model must be a timm VisionTransformer, got {name}: its blocks are not known to run "
            "on a subset of the tokens (patch a model before DDP or torch.compile wraps it)"
        )
    if model.cls_token is None:
        raise ValueError(
            f"model must have a CLS token, whose attention scores the patches; got a "
            f"{name} without one (global_pool={model.global_pool!r})"
        )
    if type(model.blocks) is not nn.Sequential:
        raise ValueError(
            f"model.blocks must be an nn.Sequential, got {type(model.blocks).__name__}"
        )
