"""Argument checks of the operators: they raise before anything is launched.

Each message names the argument, what was expected and what came.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def shape(name: str, tensor: Tensor, *sizes: int | str) -> None:
    """`sizes`: what each dimension must be, or the letter of one that may be anything.

    Nothing is formatted before it is needed: a symbolic size in a string makes torch.compile
    specialise on its value.
    """
    if not _has_shape(tensor, sizes):
        expected = ", ".join(map(str, sizes))
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(tensor.shape)}")


def _has_shape(tensor: Tensor, sizes: tuple[int | str, ...]) -> bool:
    return tensor.dim() == len(sizes) and all(
        isinstance(want, str) or want == have
        for want, have in zip(sizes, tensor.shape, strict=True)
    )


def floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, float16, bfloat16 or float64, got {_dtype(tensor)}"
        )


def float32(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {_dtype(tensor)}")


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
    shape("x", x, "B", "N", "C")
    floating("x", x)
    floating("scores", value)
    same_device("scores", value, "x", x)
    batch, num_tokens, _ = x.shape
    count("num_prefix_tokens", num_prefix_tokens, num_tokens)
    num_patches = num_tokens - num_prefix_tokens
    if not _has_shape(value, (batch, num_patches)) and not (
        _has_shape(value, (batch, "H", num_patches)) and value.shape[1] > 0
    ):
        raise ValueError(
            f"scores must have shape ({batch}, {num_patches}) or ({batch}, H, {num_patches}) with "
            f"at least one head, got {tuple(value.shape)}"
        )
    count("num_keep", num_keep, num_patches)


def index(value: Tensor, rows: Tensor, rows_name: str) -> None:
    """An index (B, M) of rows of `rows` (B, N, C)."""
    int64("index", value)
    same_device("index", value, rows_name, rows)
    shape("index", value, rows.shape[0], "M")


def features(value: Tensor) -> None:
    """Features (B, N, D) or (B, H, N, D)."""
    if not _has_shape(value, ("B", "N", "D")) and not (
        _has_shape(value, ("B", "H", "N", "D")) and value.shape[1] > 0
    ):
        raise ValueError(
            "features must have shape (B, N, D) or (B, H, N, D) with at least one head, got "
            f"{tuple(value.shape)}"
        )
    floating("features", value)


def owner(value: Tensor, x: Tensor) -> None:
    """An owner (B, N) for every row of x (B, N, C)."""
    int64("owner", value)
    same_device("owner", value, "x", x)
    shape("owner", value, *x.shape[:2])


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
