"""The Triton kernel that rotates a prompt's queries and keys and writes the cache: one program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def fill_cache_kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    length: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    half: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_token: tl.tensor,
    value_batch: tl.tensor,
    value_head: tl.tensor,
    value_token: tl.tensor,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """All heads of one token; halves of a head are rotated into each other."""
    batch = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    there = d < half
    dim = 2 * half
    cos += token * dim + d
    sin += token * dim + d
    c1 = tl.load(cos, mask=there, other=0.0).to(tl.float32)
    c2 = tl.load(cos + half, mask=there, other=0.0).to(tl.float32)
    s1 = tl.load(sin, mask=there, other=0.0).to(tl.float32)
    s2 = tl.load(sin + half, mask=there, other=0.0).to(tl.float32)
    qkv += tl.program_id(0).to(tl.int64) * (heads + 2 * kv_heads) * dim

    h = tl.arange(0, BLOCK_H)[:, None]
    inside = (h < heads) & there
    q1 = tl.load(qkv + h * dim + d, mask=inside, other=0.0).to(tl.float32)
    q2 = tl.load(qkv + h * dim + half + d, mask=inside, other=0.0).to(tl.float32)
    queries += tl.program_id(0).to(tl.int64) * heads * dim + h * dim + d
    tl.store(queries, q1 * c1 - q2 * s1, mask=inside)
    tl.store(queries + half, q2 * c2 + q1 * s2, mask=inside)

    k = tl.arange(0, BLOCK_K)[:, None]
    inside = (k < kv_heads) & there
    new = qkv + (heads + k) * dim + d
    k1 = tl.load(new, mask=inside, other=0.0).to(tl.float32)
    k2 = tl.load(new + half, mask=inside, other=0.0).to(tl.float32)
    keys += batch * key_batch + k.to(tl.int64) * key_head + token * key_token + d
    tl.store(keys, k1 * c1 - k2 * s1, mask=inside)
    tl.store(keys + half, k2 * c2 + k1 * s2, mask=inside)

    new += kv_heads * dim
    values += batch * value_batch + k.to(tl.int64) * value_head + token * value_token + d
    tl.store(values, tl.load(new, mask=inside, other=0.0), mask=inside)
    tl.store(values + half, tl.load(new + half, mask=inside, other=0.0), mask=inside)


def forward(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Rotated queries ``[batch, heads, T, D]``; ``qkv`` and angles contiguous."""
    batch, length, width = qkv.shape
    kv_heads, dim = keys.shape[1], keys.shape[3]
    heads = width // dim - 2 * kv_heads
    queries = qkv.new_empty(batch, length, heads, dim)
    with torch.cuda.device_of(qkv):
        fill_cache_kernel[(batch * length,)](
            qkv, cos, sin, queries, keys, values, length, heads, kv_heads, dim // 2,
            *keys.stride()[:3], *values.stride()[:3],
            BLOCK_H=triton.next_power_of_2(heads), BLOCK_K=triton.next_power_of_2(kv_heads),
            BLOCK_D=triton.next_power_of_2(dim // 2), num_warps=4,
        )  # fmt: skip
    return queries.transpose(1, 2)
