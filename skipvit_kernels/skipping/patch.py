"""patch: make a model skip tokens, in place, and take it back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from skipvit_kernels.skipping import cls_only, families
from skipvit_kernels.skipping.config import SkipConfig, Tokens, num_kept
from skipvit_kernels.skipping.families import Family, Inside, check_hooks
from skipvit_kernels.skipping.run import Drop, check_blocks
from skipvit_kernels.skipping.sequence import (
    SkipLooped,
    SkipModuleList,
    Skipping,
    SkipRecord,
    SkipSequential,
    Tapped,
)

_TAP = "forward_intermediates"
_SKIPPING: dict[type, type] = {nn.Sequential: SkipSequential, nn.ModuleList: SkipModuleList}


def patch(
    model: nn.Module,
    config: SkipConfig | str,
    *,
    warmup_epochs: int | None = None,
    cls_only_last_block: bool | None = None,
    tokens: Iterable[int] | None = None,
) -> nn.Module:
    """Make a vision transformer skip tokens, in training and evaluation.

    In place, on the model's own modules: state dict keys, parameters, optimizers and checkpoints
    stay those of the unpatched model. Patch before torch.compile, DDP and the like wrap it.

    Args:
        model: of a known family (`skipping/families`): 322 names of timm 1.0.31, from DeiT to
            DINOv3, SigLIP2, NaFlex and BEiT; docs/families.md has them all.
        config: where and how much, as a `SkipConfig` or its notation, e.g. "6(55%)+11"; "" drops
            nothing.
        warmup_epochs: epochs without dropping, counted by `set_epoch`; default the config's.
        cls_only_last_block: compute of the last block only what the head reads: the same logits and
            gradients up to rounding, for less (`SkipConfig`); default the config's. The model then
            gives logits only: forward_features, which gives every token, raises RuntimeError.
        tokens: for each layer that drops, how many patches stay, at any size of the images, in the
            place of the ratios and their schedule (EViT's `tokens` at evaluation): prefix tokens
            are not counted, nor is the layer's own fused token; an earlier one is.

    Returns:
        The model itself.

    Raises:
        ValueError: where the model or one of its blocks cannot skip, naming it and the reason
            (an unknown class or part, a forward of its own, hooks that would not fire),
            where the configuration does not fit its depth, `tokens` has not one number a drop, or
            `cls_only_last_block` meets a head that reads other tokens (average pooling). The model
            is then as it was.
    """
    if isinstance(config, str):
        config = SkipConfig.parse(config)
    if warmup_epochs is not None:
        config = dataclasses.replace(config, warmup_epochs=warmup_epochs)
    if cls_only_last_block is not None:
        config = dataclasses.replace(config, cls_only_last_block=cls_only_last_block)
    if tokens is not None:
        counts = tuple(map(Tokens, tokens))
        if len(counts) != len(config.drop_at):
            raise ValueError(
                f"tokens must have a number for each of the layers {config.drop_at}, "
                f"got {len(counts)}"
            )
        config = dataclasses.replace(config.at(), drop_ratio=counts)
    family, blocks_family = check(model, config)
    if config.cls_only_last_block:
        cls_only.make_cls_only(model)
    blocks: Any = family.blocks(model)
    scorer, prefix = config.scorer or family.scorer(model), family.num_prefix_tokens(model)
    method, rejoins = config.make_method(), config.rejoin_at is not None
    # A head that reads patches reads merged ones as often as they count.
    spread = method.sizes and not rejoins and family.reads_more(model) is not None
    head = family.latent(model) if scorer == "latent" else None
    trunk = family.trunk(model)
    taps = [name for name, module in trunk._modules.items() if module is blocks]
    if taps and hasattr(trunk, _TAP):
        vars(trunk)[_TAP] = Tapped(trunk, taps[0])
    blocks.__class__ = SkipLooped if family.looped else _SKIPPING[type(blocks)]
    blocks.family = blocks_family
    blocks.config = config
    blocks.drops = {
        layer: Drop(ratio, prefix, scorer, config.match, method, rejoins, spread, head)
        for layer, ratio in zip(config.drop_at, config.drop_ratio, strict=True)
    }
    blocks.num_prefix_tokens = prefix
    blocks.num_head_tokens = family.num_head_tokens(model)
    _begin(blocks, 0)
    blocks.recorder = blocks.keep = None
    for layer in (*config.drop_at, *([len(blocks)] if config.cls_only_last_block else [])):
        blocks[layer - 1].register_forward_pre_hook(_DirectCall(blocks, layer))
    return model


def check(model: nn.Module, config: SkipConfig) -> tuple[type[Family], type[Family]]:
    """The family of a model that `config` fits, and that of the blocks that do not just run.

    Raises:
        ValueError: as `patch`.
    """
    if is_patched(model):
        raise ValueError(
            "model must not be patched already, got one patched with "
            f"{_patched(model, 'patch')[0].config}: call unpatch first"
        )
    family = families.of(model)
    if reason := family.supports(model, config):
        raise ValueError(reason)
    blocks: Any = family.blocks(model)
    if type(blocks) not in _SKIPPING:
        raise ValueError(
            f"model.blocks must be an nn.Sequential or nn.ModuleList, got {type(blocks).__name__}"
        )
    config.check_depth(len(blocks))
    blocks_family = family
    for layer in config.drop_at[:1]:
        run = list(blocks)[layer - 1 : config.last_skipping(len(blocks))]
        blocks_family = check_blocks(run)
    for layer in config.drop_at:
        block = blocks[layer - 1]
        check_hooks(f"layer {layer}", block, blocks_family.passed_by(block))
    if config.cls_only_last_block:
        last = check_blocks([blocks[-1]])
        if reason := family.reads_more(model) or last.needs_whole(blocks[-1]):
            raise ValueError(reason)
        if config.drop_at and last is not blocks_family:
            raise ValueError(
                f"the last block must be of the family {blocks_family.__name__}, as those that "
                f"skip, got {last.__name__}"
            )
        blocks_family = last
        check_hooks(f"layer {len(blocks)}", blocks[-1], last.passed_by(blocks[-1]))
    return family, blocks_family


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`: exactly the model it was. Returns it.

    Raises:
        ValueError: where the model is not patched.
    """
    for blocks in _patched(model, "unpatch"):
        for module in model.modules():
            cls_only.undo(module)
            if isinstance(vars(module).get(_TAP), Tapped):
                delattr(module, _TAP)
        for block in blocks._modules.values():
            hooks = block._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _DirectCall)]:
                del hooks[key]
        for name in Skipping.__annotations__:
            delattr(blocks, name)
        blocks.__class__ = type(blocks).__bases__[1]
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether the model, or one that it wraps (DDP, compiled, an EMA's copy), is patched."""
    return any(isinstance(module, Skipping) for module in model.modules())


def set_epoch(model: nn.Module, epoch: float) -> None:
    """Tell the model which epoch begins: no dropping in the first `warmup_epochs` of them.

    Call it at the start of every epoch and after a resume; also on a wrapper (DDP, compiled) and,
    separately, on an EMA's copy. With `ramp_epochs` before every step, as `epoch + step / steps`:
    another number of tokens each few steps, which a compiled model compiles anew for. Training and
    evaluation then both drop what it says.

    Args:
        epoch: counted from 0.

    Raises:
        ValueError: where the model is not patched, or `epoch` is no number >= 0.
    """
    patched = _patched(model, "set_epoch")
    if not isinstance(epoch, (int, float)) or not epoch >= 0:
        raise ValueError(f"epoch must be a number >= 0, got {epoch!r}")
    for blocks in patched:
        _begin(blocks, epoch)


def _begin(blocks: Any, epoch: float) -> None:
    """Have the blocks drop what their configuration says of that point of the training."""
    ratios = blocks.config.at(epoch).drop_ratio
    blocks.dropping = bool(ratios) or not blocks.drops
    if ratios:
        drops = zip(blocks.drops.items(), ratios, strict=True)
        blocks.drops = {
            layer: dataclasses.replace(drop, drop_ratio=ratio) for (layer, drop), ratio in drops
        }


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


@contextlib.contextmanager
def keep_patches(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Never drop the patches of a mask in the forwards inside the context.

        with sk.keep_patches(model, mask):    # (B, n) bool, True: stays
            model(images)

    They stay whatever their scores; the others are chosen among as before. Of nested contexts the
    innermost holds.

    Args:
        model: patched.
        mask: (B, n) bool, the patches of each image, on the model's device.

    Raises:
        ValueError: where the model is not patched, or the mask has another dtype or shape, or keeps
            more patches of an image than a drop leaves.
    """
    patched = _patched(model, "keep_patches")
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(
            f"mask must be a bool tensor of shape (B, n), got {mask.dtype} {tuple(mask.shape)}"
        )
    asked = int(mask.sum(dim=1).max()) if mask.numel() else 0
    for blocks in patched:
        left, leaves = mask.shape[1], []
        for layer, drop in blocks.drops.items():
            leaves.append((num_kept(left, drop.drop_ratio), layer))
            left = drop.method.num_left(left, leaves[-1][0])
        num_keep, layer = min(leaves, default=(asked, 0))
        if asked > num_keep:
            raise ValueError(
                f"mask must keep at most {num_keep} patches of an image, what layer {layer} leaves "
                f"under {blocks.config}, got {asked}: a smaller mask, or a smaller drop_ratio"
            )
    outer = [blocks.keep for blocks in patched]
    for blocks in patched:
        blocks.keep = mask
    try:
        yield
    finally:
        for blocks, keep in zip(patched, outer, strict=True):
            blocks.keep = keep


class _DirectCall(Inside):
    """Refuse a block that drops, or a CLS-only last one, outside the patched `model.blocks`.

    Attention masks make timm loop over the blocks themselves: they would run without skipping, and
    nobody would notice.
    """

    def __init__(self, blocks: Skipping, layer: int) -> None:
        self.blocks, self.layer = blocks, layer

    def __call__(self, block: nn.Module, args: Any) -> None:
        config = self.blocks.config
        drops = self.layer in config.drop_at
        if self.blocks.dropping or not drops:
            does = "drops tokens" if drops else "computes only what the head reads"
            raise RuntimeError(
                f"layer {self.layer} {does} ({config}) and can only run inside the patched "
                "model.blocks: attn_mask, is_causal and calls of single blocks need "
                "unpatch(model) first"
            )


def _patched(model: nn.Module, caller: str) -> list[Any]:
    found = [module for module in model.modules() if isinstance(module, Skipping)]
    if not found:
        raise ValueError(
            f"{caller} needs a patched model, got a {type(model).__name__} that is not patched"
        )
    return found
