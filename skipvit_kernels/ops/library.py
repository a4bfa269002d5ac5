"""What the operators share: how one is defined, and when its autograd.Function is needed.

One schema per operator under ``torch.ops.skipvit``, and it is the public signature, defaults
included, so that a kernel needs no adapter. torch's dispatcher chooses the kernel by the tensors'
device. `reference.py` stands behind every one (CompositeExplicitAutograd); a module of `backends`
registers the kernel of its device over it. The autograd.Function stays outside the operator, which
is the cheapest route through torch (about 5 us a call against 12 us for `register_autograd`, CPU,
torch 2.13) and is skipped where no gradient is wanted.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

LIBRARY = torch.library.Library("skipvit", "DEF")

# The operators, each with its group: the file that holds it, here and among a backend's kernels.
OPERATORS: dict[str, str] = {}
_PLAIN: dict[Any, Callable[..., Any]] = {}


@functools.cache
def _warn_of_fallback(name: str, device_type: str) -> None:
    warnings.warn(
        f"skipvit::{name} runs as plain PyTorch on {device_type}: no kernel is registered for it "
        "there ('skipvit info' says why)",
        stacklevel=3,
    )


def operator(
    schema: str,
    spec: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    graph: Callable[..., Any] | None = None,
) -> Any:
    """Define an operator with the reference behind it; returns the overload.

    `graph` stands in for a reference that loops over positions under `reference_operators`.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def fallback(*args: Any, **kwargs: Any) -> Any:
        _warn_of_fallback(name, args[0].device.type)
        return spec(*args, **kwargs)

    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"skipvit::{name}", fake, lib=LIBRARY)
    OPERATORS[name] = fake.__module__.rpartition(".")[2]
    overload = getattr(torch.ops.skipvit, name).default
    _PLAIN[overload] = graph or spec
    return overload


class reference_operators(TorchFunctionMode):
    """Run the operators as their plain-PyTorch references, for tracers and transforms.

        with sk.reference_operators():
            torch.onnx.export(model, (images,), "model.onnx", dynamo=True)

    Inside, a graph holds standard operators only (ONNX knows no others), and every operator is
    differentiated, batched and differentiated again as any other PyTorch code: torch.func.grad,
    vmap, jvp, second derivatives. The same values, slower, and with more memory in a backward;
    sums over merged rows are those of `scatter_add`, in any order on a GPU.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is wants_grad:
            return False
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether an operator's own backward is needed."""
    if has_torch_function(tensors):
        return handle_torch_function(wants_grad, tensors, *tensors)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
