"""verify: does the routing itself leave a model as it is, and does it skip what it should?"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from skipvit_kernels.skipping import families
from skipvit_kernels.skipping.config import BlockTokens, SkipConfig
from skipvit_kernels.skipping.patch import is_patched, patch, unpatch


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `verify` compared: the model without routing, and with routing that drops nothing.

    Attributes:
        model: the model's class name.
        config: the configuration whose routing ran, with every drop ratio 0.
        identical: whether all bits agree, of the outputs in evaluation and in training and of every
            gradient.
        max_difference: largest absolute difference of the outputs in evaluation.
        tolerance: largest difference accepted there: four times the unpatched model's own rounding
            error, measured at another precision; 0 where the bits agree.
        train_difference: largest difference in training, of the output or a gradient, relative to
            its norm.
        train_tolerance: the largest accepted for that output or gradient; 0 where the bits agree.
        num_gradients: how many were compared: of the images, and of every trainable parameter.
        token_counts: tokens per block, as measured with the drop ratios configured.
    """

    model: str
    config: SkipConfig
    identical: bool
    max_difference: float
    tolerance: float
    train_difference: float
    train_tolerance: float
    num_gradients: int
    token_counts: tuple[BlockTokens, ...]


def verify(
    model: nn.Module, config: SkipConfig | str, *, images: Tensor | None = None
) -> VerifyReport:
    """Check on this very model that routing changes nothing but which tokens a block works on.

    Runs a copy of the model unpatched, and patched with the configuration's drops at a ratio of 0,
    so that scores, selection, gather and rejoin all run while every token is kept: in evaluation,
    and in training with the same random numbers, forward and backward. A CLS-only last block runs
    as configured: it alone may change roundings. (It draws dropout for fewer rows, so that its
    backward is compared in evaluation. Scorer "random" draws numbers of its own: in training the
    model's own scorer stands in.) Then, with the ratios as they are, the tokens that every block
    works on are counted; and the state dict's keys, and the modules after `unpatch`, must be those
    of the unpatched model.

    The time is that of five forwards and two backwards; where bits differ, of two more steps, one
    of them in float64.

    Args:
        model: of a known family, patched or not; left as it is, as is torch's random state.
        config: as for `patch`.
        images: (B, 3, H, W) to compare on; default two of random noise at the model's size.

    Raises:
        ValueError: as `patch`. RuntimeError: where outputs or gradients differ by more than four
            times the unpatched model's rounding error, where a block works on other tokens than
            `SkipConfig.token_counts` says, or where patching or unpatching leaves other keys or
            modules; it names what differs.
    """
    if isinstance(config, str):
        config = SkipConfig.parse(config)
    config = config.at()
    nothing = dataclasses.replace(config, drop_ratio=(Fraction(0),) * len(config.drop_at))
    drawn = nothing.scorer == "random"
    trained = dataclasses.replace(nothing, scorer=None) if drawn else nothing
    with torch.inference_mode(False), torch.no_grad(), _same_random_numbers(model):
        model = copy.deepcopy(model)
        if is_patched(model):
            unpatch(model)
        if images is None:
            images = torch.randn(2, *families.of(model).image_shape(model))
        images = images.to(next(model.parameters()), copy=True)
        model.eval()
        keys, modules = list(model.state_dict()), _modules(model)

        plain = {_OUTPUT: _output(model(images))}
        routed = {_OUTPUT: _output(patch(model, nothing)(images))}
        if list(model.state_dict()) != keys:
            changed = sorted(set(keys).symmetric_difference(model.state_dict()))
            raise RuntimeError(f"patch must leave the state dict's keys, got changes in {changed}")
        unpatch(model)
        model.train(not config.cls_only_last_block)
        own = _trained(model, images)
        ours = _trained(patch(model, trained), images)
        unpatch(model).eval()

        identical = _same_bits(plain, routed) and _same_bits(own, ours)
        difference, tolerance, in_training = 0.0, 0.0, (0.0, 0.0)
        if not identical:
            rounding = _Rounding(model, images)
            difference = (plain[_OUTPUT] - routed[_OUTPUT]).abs().max().item()
            # Two such errors are compared, and they are maxima over a few logits that vary.
            tolerance = 4 * rounding.of_output
            if not difference <= tolerance:
                raise RuntimeError(
                    f"{type(model).__name__} with {nothing} must agree with the unpatched model "
                    f"within {tolerance:.3g}, got a difference of {difference:.3g}"
                )
            in_training = rounding.check(own, ours, trained)

        counts = _count(patch(model, config), images)
        unpatch(model)
        _check_counts(model, config, counts)
        if (left := _modules(model)) != modules:
            changed = sorted(at for at in {*left, *modules} if left.get(at) != modules.get(at))
            raise RuntimeError(f"unpatch must give back the model's modules, got others: {changed}")
    return VerifyReport(
        type(model).__name__,
        nothing,
        identical,
        difference,
        tolerance,
        *in_training,
        len(own) - 1,
        tuple(counts),
    )


class _Rounding:
    """The unpatched model's rounding errors, by running it once more at another precision.

    float64's are as many times smaller than float32's as its steps are. In evaluation: at another
    precision dropout may draw other masks.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        values = _trained(model, images)
        double = images.dtype == torch.float64
        other, steps = (torch.float32, 2**-29) if double else (torch.float64, 1.0)
        again = _trained(copy.deepcopy(model).to(other), images.to(other))
        apart = {what: value.to(other) - again[what] for what, value in values.items()}
        self.model = type(model).__name__
        self.of_output = apart[_OUTPUT].abs().max().item() * steps
        self.errors = {what: error.norm().item() * steps for what, error in apart.items()}
        self.norms = _norms(values)
        # A tensor of few numbers may have been lucky.
        self.usual = statistics.median(self.errors[what] / self.norms[what] for what in values)

    def check(
        self, own: dict[str, Tensor], ours: dict[str, Tensor], config: SkipConfig
    ) -> tuple[float, float]:
        """The largest difference of what `_trained` gives, relative to its norm, and its bound."""
        largest, norms = (0.0, 0.0), _norms(own)
        dropout = sum(norms.values()) / sum(self.norms.values())
        for what, norm in norms.items():
            apart = (own[what] - ours[what]).norm().item() / norm
            # Where a gradient is 0 but for rounding, its error is as large as it is.
            bound = 4 * max(self.errors[what] * dropout / norm, self.usual)
            largest = max(largest, (apart, bound))
            if not apart <= bound:
                raise RuntimeError(
                    f"{self.model} with {config} must give, in training, {what} of the unpatched "
                    f"model within {bound:.3g} of its norm, got a difference of {apart:.3g}"
                )
        return largest


_OUTPUT = "the output"


def _norms(values: dict[str, Tensor]) -> dict[str, float]:
    return {what: value.norm().item() or 1.0 for what, value in values.items()}


def _output(output: Any) -> Tensor:
    """A distilled model in training may give one output a head."""
    return output if isinstance(output, Tensor) else torch.stack(tuple(output))


def _trained(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The output in the model's mode, and its gradients to the images and all that is trained."""
    with _same_random_numbers(model), torch.enable_grad():
        inputs = {"images": images.detach().requires_grad_()}
        inputs |= {name: p for name, p in model.named_parameters() if p.requires_grad}
        output = _output(model(inputs["images"]))
        loss = output.double().square().sum()
        grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    results = {_OUTPUT: output.detach()}
    for (name, value), grad in zip(inputs.items(), grads, strict=True):
        results[f"the gradient of {name}"] = torch.zeros_like(value) if grad is None else grad
    return results


def _same_bits(values: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, others[what]) for what, value in values.items())


def _same_random_numbers(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, torch's generators go on from where they are now; behind it they are there again."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def _count(model: nn.Module, images: Tensor) -> list[BlockTokens]:
    """Tokens per block of a patched model: (B, N, C) that its first part is given, and its last."""
    blocks: Any = families.of(model).blocks(model)._modules.values()
    seen: list[list[int]] = [[] for _ in blocks]
    handles = []
    for block, counts in zip(blocks, seen, strict=True):

        def note(module: nn.Module, args: Any, counts: list[int] = counts) -> None:
            if args and isinstance(args[0], Tensor) and args[0].dim() == 3:
                counts.append(args[0].shape[1])

        parts = [part for part in block.modules() if part is not block]
        handles += [part.register_forward_pre_hook(note) for part in parts]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [BlockTokens(counts[0], counts[-1]) for counts in seen]


def _check_counts(model: nn.Module, config: SkipConfig, counts: list[BlockTokens]) -> None:
    """Raise RuntimeError where a block works on other tokens than the configuration counts."""
    family = families.of(model)
    prefix, heads = family.num_prefix_tokens(model), family.num_head_tokens(model)
    expected = config.token_counts(len(counts), counts[0].attention - prefix, prefix, heads)
    blocks: Any = family.blocks(model)
    for layer, (count, wanted) in enumerate(zip(counts, expected, strict=True), start=1):
        if layer in config.drop_at and families.of_block(blocks[layer - 1]).side_by_side:
            wanted = wanted._replace(mlp=wanted.attention)
        if count != wanted:
            raise RuntimeError(
                f"{type(model).__name__} with {config} must work in layer {layer} on "
                f"{wanted.attention} tokens in the attention and {wanted.mlp} in the MLP, "
                f"got {count.attention} and {count.mlp}"
            )


def _modules(model: nn.Module) -> dict[str, Any]:
    """Every module by its name: which it is, of which class, with which hooks and attributes."""
    return {
        name or type(model).__name__: (
            id(module),
            type(module),
            list(module._forward_pre_hooks.values()),
            list(module._forward_hooks.values()),
            set(vars(module)),
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }
