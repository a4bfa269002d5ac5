"""cls_scores: how much the CLS query attends to each patch, averaged over the heads.

Up to 1,024 tokens a program holds an image's logits of one head in registers, so that every key is
read once and nothing but the result is written. Beyond, an image is spread over many programs: one
launch writes the logits (4 bytes a token and head, D / 2 times less than bfloat16 keys) and what
each tile of them contributes to the softmax, a second one finishes.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipvit_kernels.backends.triton.launch import block, cdiv, image_and_tile, launch

# Above this the logits of a head do not fit the registers of one program beside its keys.
MAX_TOKENS = 1024
# Tokens of one program of the second way.
TILE = 64


@triton.jit
def _logits(
    q_ptr,  # (D,)
    k_ptr,  # (N, D)
    o_n,  # [TOKENS]
    m_n,
    scale,
    q_stride_d,
    k_stride_n,
    k_stride_d,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """[TOKENS] of one head: scale * q . k, -inf where m_n is not set."""
    SUM: tl.constexpr = tl.float64 if k_ptr.dtype.element_ty == tl.float64 else tl.float32
    b_dot = tl.zeros([o_n.shape[0]], SUM)
    for start in tl.static_range(0, D, WIDTH):
        o_d = start + tl.arange(0, WIDTH).to(tl.int64)
        m_d = o_d < D
        k_ptrs = k_ptr + o_n.to(tl.int64)[:, None] * k_stride_n + o_d[None, :] * k_stride_d
        b_k = tl.load(k_ptrs, mask=m_n[:, None] & m_d[None, :], other=0).to(SUM)
        b_q = tl.load(q_ptr + o_d * q_stride_d, mask=m_d, other=0).to(SUM)
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
    q_stride_b,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    q_ptr += b * q_stride_b
    k_ptr += b * k_stride_b
    o_n = tl.arange(0, TOKENS)
    m_n = o_n < num_tokens
    SUM: tl.constexpr = tl.float64 if k_ptr.dtype.element_ty == tl.float64 else tl.float32
    b_mean = tl.zeros([TOKENS], SUM)
    for _ in tl.range(0, num_heads, num_stages=STAGES):
        b_logit = _logits(
            q_ptr, k_ptr, o_n, m_n, scale, q_stride_d, k_stride_n, k_stride_d, D, WIDTH
        )
        _, b_exp, total = _exp_sum(b_logit)
        b_mean += b_exp / total
        q_ptr += q_stride_h
        k_ptr += k_stride_h
    out_ptrs = out_ptr + b * (num_tokens - num_prefix) + o_n - num_prefix
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
    tiles,  # per image and head
    q_stride_b,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    image_head, tile = image_and_tile(tiles)
    b, h = image_head // num_heads, image_head % num_heads
    o_n = tile * TOKENS + tl.arange(0, TOKENS)
    m_n = o_n < num_tokens
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + h * k_stride_h
    b_logit = _logits(q_ptr, k_ptr, o_n, m_n, scale, q_stride_d, k_stride_n, k_stride_d, D, WIDTH)
    tl.store(logits_ptr + image_head * num_tokens + o_n, b_logit, mask=m_n)
    top, _, total = _exp_sum(b_logit)
    parts_ptr += image_head * 2 * tiles + tile
    tl.store(parts_ptr, top)
    tl.store(parts_ptr + tiles, total)


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "num_prefix", "tiles"])
def _cls_softmax_mean_kernel(
    logits_ptr,  # (B, H, N)
    parts_ptr,  # (B, H, 2, tiles)
    out_ptr,  # (B, n)
    num_heads,
    num_tokens,
    num_prefix,
    tiles,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
):
    b, tile = image_and_tile(tiles)
    o_n = tile * TOKENS + tl.arange(0, TOKENS)
    m_n = o_n < num_tokens
    o_t = tl.arange(0, TILES)
    m_t = o_t < tiles
    b_mean = tl.zeros([TOKENS], logits_ptr.dtype.element_ty)
    for h in range(0, num_heads):
        image_head = b * num_heads + h
        part_ptrs = parts_ptr + image_head * 2 * tiles + o_t
        b_top = tl.load(part_ptrs, mask=m_t, other=float("-inf"))
        top = tl.max(b_top, axis=0)
        total = tl.sum(tl.load(part_ptrs + tiles, mask=m_t, other=0) * tl.exp(b_top - top), axis=0)
        b_logit = tl.load(logits_ptr + image_head * num_tokens + o_n, mask=m_n, other=0)
        b_mean += tl.exp(b_logit - top) / total
    out_ptrs = out_ptr + b * (num_tokens - num_prefix) + o_n - num_prefix
    b_mean = (b_mean / num_heads).to(tl.float32)
    tl.store(out_ptrs, b_mean, mask=m_n & (o_n >= num_prefix))


def cls_scores(
    q: Tensor, k: Tensor, *, scale: float | None = None, num_prefix_tokens: int = 1
) -> Tensor:
    batch, heads, num_tokens, depth = k.shape
    scale = depth**-0.5 if scale is None else scale
    num_patches = num_tokens - num_prefix_tokens
    out = k.new_empty((batch, num_patches), dtype=torch.float32)
    if num_patches == 0:
        return out
    if num_tokens <= MAX_TOKENS:
        size = block(num_tokens)
        threads = max(128, min(512, size))
        # 64 elements a thread.
        width = min(triton.next_power_of_2(depth), 64 * threads // size)
        sizes = heads, num_tokens, num_prefix_tokens
        scalars = scale, *sizes, *q.stride(), *k.stride(), depth, size, width, 2
        launch(_cls_scores_kernel, batch, out, (q, k, out), scalars, threads)
        return out
    tiles = cdiv(num_tokens, TILE)
    sums = torch.promote_types(k.dtype, torch.float32)
    logits = k.new_empty((batch, heads, num_tokens), dtype=sums)
    parts = k.new_empty((batch, heads, 2, tiles), dtype=sums)
    width = min(triton.next_power_of_2(depth), 128)
    scalars = scale, heads, num_tokens, tiles, *q.stride(), *k.stride(), depth, TILE, width
    launch(_cls_logits_kernel, batch * heads * tiles, out, (q, k, logits, parts), scalars)
    scalars = heads, num_tokens, num_prefix_tokens, tiles, TILE, block(tiles)
    launch(_cls_softmax_mean_kernel, batch * tiles, out, (logits, parts, out), scalars)
    return out
