"""Argument checks of the operators: they raise before anything is launched.

Each message names the argument, what was expected and what came.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def shape(name: str, tensor: Tensor, expected: str, *sizes: int | None) -> None:
    """`sizes`: one entry a dimension, None for any size; `expected` says it in words."""
    if tensor.dim() != len(sizes) or any(
        want is not None and want != have for want, have in zip(sizes, tensor.shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")


def floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, float16, bfloat16 or float64, got {_dtype(tensor)}"
        )


def same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {_dtype(other)}, got {_dtype(tensor)}"
        )


def int64(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {_dtype(tensor)}")


def same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on {other_name}'s device, {other.device}, got {tensor.device}"
        )


def count(name: str, value: int, limit: int) -> None:
    if isinstance(value, float) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 0 or value > limit:
        raise ValueError(f"{name} must be in [0, {limit}], got {value}")


def scores(value: Tensor, x: Tensor, num_keep: int, num_prefix_tokens: int) -> None:
    """Scores (B, n) or (B, H, n) that select `num_keep` of the patches of x (B, P + n, C)."""
    shape("x", x, "(B, N, C)", None, None, None)
    floating("x", x)
    floating("scores", value)
    same_device("scores", value, "x", x)
    batch, num_tokens, _ = x.shape
    count("num_prefix_tokens", num_prefix_tokens, num_tokens)
    num_patches = num_tokens - num_prefix_tokens
    expected = f"({batch}, {num_patches}) or ({batch}, H, {num_patches})"
    if value.dim() == 3:
        shape("scores", value, expected, batch, None, num_patches)
        if value.shape[1] == 0:
            raise ValueError(f"scores must have at least one head, got {tuple(value.shape)}")
    else:
        shape("scores", value, expected, batch, num_patches)
    count("num_keep", num_keep, num_patches)


def index(value: Tensor, rows: Tensor, rows_name: str) -> None:
    """An index (B, M) of rows of `rows` (B, N, C)."""
    int64("index", value)
    same_device("index", value, rows_name, rows)
    shape("index", value, f"({rows.shape[0]}, M)", rows.shape[0], None)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
