"""cls_scores: how much the CLS query attends to each patch, averaged over the heads.

Up to 1,024 tokens a program holds an image's logits of one head in registers, and the keys of the
next head in shared memory, so that every key is read once and nothing but the result is written.
Beyond, or where that memory is too small, an image is spread over many programs: one launch writes
the logits (4 bytes a token and head, D / 2 times less than bfloat16 keys) and what each tile of
them contributes to the softmax, a second one finishes.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipvit_kernels.backends.triton.launch import (
    block,
    cdiv,
    image_and_tile,
    launch,
    ptrs_at,
    shared_memory,
    sum_dtype,
)

# Above this the logits of a head do not fit the registers of one program beside its keys.
MAX_TOKENS = 1024
# Bytes of shared memory, at most, that a program of the first way takes beside the next keys.
SCRATCH = 4096
# Tokens of one program of the second way.
TILE = 64


@triton.jit
def _logits(
    q_ptr, k_ptr, o_n, m_n, scale, q_strides, k_strides, D: tl.constexpr, WIDTH: tl.constexpr
):
    """[TOKENS] of one head, q (D,) and k (N, D): scale * q . k, -inf where m_n is not set."""
    SUM: tl.constexpr = sum_dtype(k_ptr)
    b_dot = tl.zeros([o_n.shape[0]], SUM)
    for start in tl.static_range(0, D, WIDTH):
        o_d = start + tl.arange(0, WIDTH)
        m_d = o_d < D
        k_ptrs = ptrs_at(k_ptr, (o_n[:, None], o_d[None, :]), k_strides)
        b_k = tl.load(k_ptrs, mask=m_n[:, None] & m_d[None, :], other=0).to(SUM)
        b_q = tl.load(ptrs_at(q_ptr, (o_d,), q_strides), mask=m_d, other=0).to(SUM)
        b_dot += tl.sum(b_k * b_q[None, :], axis=1)
    return tl.where(m_n, b_dot * scale, float("-inf"))


@triton.jit
def _exp_sum(b_logit):
    """(max, exp(logit - max), its sum); a max of -inf, where nothing is, counts as 0."""
    top = tl.max(b_logit, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top).to(b_logit.dtype)
    b_exp = tl.exp(b_logit - top)
    return top, b_exp, tl.sum(b_exp, axis=0)


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "num_prefix"])
def _cls_scores_kernel(
    q_ptr,  # (B, H, D)
    k_ptr,  # (B, H, N, D)
    out_ptr,  # (B, n), contiguous
    scale,
    num_heads,
    num_tokens,
    num_prefix,
    q_strides,
    k_strides,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    o_b = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, TOKENS)
    m_n = o_n < num_tokens
    SUM: tl.constexpr = sum_dtype(k_ptr)
    b_mean = tl.zeros([TOKENS], SUM)
    q_ptr = ptrs_at(q_ptr, (o_b,), q_strides[:1])
    k_ptr = ptrs_at(k_ptr, (o_b,), k_strides[:1])
    for _ in tl.range(0, num_heads, num_stages=2):
        b_logit = _logits(q_ptr, k_ptr, o_n, m_n, scale, q_strides[2:], k_strides[2:], D, WIDTH)
        _, b_exp, total = _exp_sum(b_logit)
        b_mean += b_exp / total
        q_ptr += q_strides[1]
        k_ptr += k_strides[1]
    out_ptrs = out_ptr + o_b * (num_tokens - num_prefix) + o_n - num_prefix
    b_mean = (b_mean / num_heads).to(tl.float32)
    tl.store(out_ptrs, b_mean, mask=m_n & (o_n >= num_prefix))


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "tiles"])
def _cls_logits_kernel(
    q_ptr,  # (B, H, D)
    k_ptr,  # (B, H, N, D)
    logits_ptr,  # (B, H, N), contiguous
    parts_ptr,  # (B, H, 2, tiles), contiguous: max and sum of exp(logit - max) of each tile
    scale,
    num_heads,
    num_tokens,
    tiles,  # of an image
    q_strides,
    k_strides,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    o_bh, tile = image_and_tile(tiles)
    o_b, o_h = o_bh // num_heads, o_bh % num_heads
    o_n = tile * TOKENS + tl.arange(0, TOKENS)
    m_n = o_n < num_tokens
    q_ptr = ptrs_at(q_ptr, (o_b, o_h), q_strides[:2])
    k_ptr = ptrs_at(k_ptr, (o_b, o_h), k_strides[:2])
    b_logit = _logits(q_ptr, k_ptr, o_n, m_n, scale, q_strides[2:], k_strides[2:], D, WIDTH)
    tl.store(logits_ptr + o_bh * num_tokens + o_n, b_logit, mask=m_n)
    top, _, total = _exp_sum(b_logit)
    parts_ptr += o_bh * 2 * tiles + tile
    tl.store(parts_ptr, top)
    tl.store(parts_ptr + tiles, total)


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "num_prefix", "tiles"])
def _cls_softmax_mean_kernel(
    logits_ptr,  # (B, H, N), contiguous, like the next two
    parts_ptr,  # (B, H, 2, tiles)
    out_ptr,  # (B, n)
    num_heads,
    num_tokens,
    num_prefix,
    tiles,  # of an image
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
):
    o_b, tile = image_and_tile(tiles)
    o_n = tile * TOKENS + tl.arange(0, TOKENS)
    m_n = o_n < num_tokens
    o_t = tl.arange(0, TILES)
    m_t = o_t < tiles
    b_mean = tl.zeros([TOKENS], logits_ptr.dtype.element_ty)
    for o_h in range(0, num_heads):
        o_bh = o_b * num_heads + o_h
        part_ptrs = parts_ptr + o_bh * 2 * tiles + o_t
        b_top = tl.load(part_ptrs, mask=m_t, other=float("-inf"))
        top = tl.max(b_top, axis=0)
        b_total = tl.load(part_ptrs + tiles, mask=m_t, other=0)
        total = tl.sum(b_total * tl.exp(b_top - top), axis=0)
        b_logit = tl.load(logits_ptr + o_bh * num_tokens + o_n, mask=m_n, other=0)
        b_mean += tl.exp(b_logit - top) / total
    out_ptrs = out_ptr + o_b * (num_tokens - num_prefix) + o_n - num_prefix
    b_mean = (b_mean / num_heads).to(tl.float32)
    tl.store(out_ptrs, b_mean, mask=m_n & (o_n >= num_prefix))


def cls_scores(
    q: Tensor, k: Tensor, *, scale: float | None = None, num_prefix_tokens: int = 1
) -> Tensor:
    batch, heads, num_tokens, depth = k.shape
    scale = float(depth**-0.5 if scale is None else scale)
    num_patches = num_tokens - num_prefix_tokens
    out = k.new_empty((batch, num_patches), dtype=torch.float32)
    if num_patches == 0:
        return out
    size = block(num_tokens)
    threads = max(128, min(512, size))
    # 64 elements a thread.
    width = min(block(depth), 64 * threads // size)
    staged = size * cdiv(depth, width) * width * k.element_size()
    if num_tokens <= MAX_TOKENS and staged + SCRATCH <= shared_memory(out.get_device()):
        launch(
            _cls_scores_kernel, batch, out, threads=threads, q_ptr=q, k_ptr=k, out_ptr=out,
            scale=scale, num_heads=heads, num_tokens=num_tokens, num_prefix=num_prefix_tokens,
            q_strides=q.stride(), k_strides=k.stride(), D=depth, TOKENS=size, WIDTH=width,
        )  # fmt: skip
        return out
    tiles = cdiv(num_tokens, TILE)
    sums = torch.promote_types(k.dtype, torch.float32)
    logits = k.new_empty((batch, heads, num_tokens), dtype=sums)
    parts = k.new_empty((batch, heads, 2, tiles), dtype=sums)
    # 256 bytes of a key: a thread has half of it in its registers.
    width = min(block(depth), 256 // k.element_size())
    launch(
        _cls_logits_kernel, batch * heads * tiles, out,
        q_ptr=q, k_ptr=k, logits_ptr=logits, parts_ptr=parts,
        scale=scale, num_heads=heads, num_tokens=num_tokens, tiles=tiles, q_strides=q.stride(),
        k_strides=k.stride(), D=depth, TOKENS=TILE, WIDTH=width,
    )  # fmt: skip
    launch(
        _cls_softmax_mean_kernel, batch * tiles, out, logits_ptr=logits, parts_ptr=parts,
        out_ptr=out, num_heads=heads, num_tokens=num_tokens, num_prefix=num_prefix_tokens,
        tiles=tiles, TOKENS=TILE, TILES=block(tiles),
    )  # fmt: skip
    return out
