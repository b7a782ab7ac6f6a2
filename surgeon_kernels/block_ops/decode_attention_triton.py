"""The Triton kernel of attention with a cache, for one new token of every sequence.

A program has the query heads of one key head and a share of the positions before the new one. Keys and values are read
once, in the dtype of the model; sums are float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from surgeon_kernels.runtime.triton_support import has_dependent_launch

# Keys (and values) of a step in bytes, and how many at most; warps; and stages where a multiprocessor has so much
# shared memory: estimates. A product takes at least 16 rows, so that small groups are filled up.
_STEP_BYTES, _MOST_N, _WARPS, _STAGES, _FEWER_STAGES = 16384, 64, 4, 3, 2
_SHARED_BYTES = 160 << 10
_LEAST_ROWS = 16


@triton.jit
def rotated(x: tl.tensor, cos: tl.tensor, sin: tl.tensor, d: tl.tensor, mask: tl.tensor, dim: tl.tensor) -> tl.tensor:
    """Entries ``d`` of the head at ``x``, rotated by ``cos`` and ``sin`` and rounded to its dtype."""
    half = dim // 2
    other = tl.where(d < half, d + half, d - half)
    sign = tl.where(d < half, -1.0, 1.0)
    own = tl.load(x + d, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(x + other, mask=mask, other=0.0).to(tl.float32)
    return (own * cos + sign * partner * sin).to(x.dtype.element_ty)


@triton.jit
def decode_attention_kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    position: tl.tensor,
    y: tl.tensor,
    partial: tl.tensor,
    maxima: tl.tensor,
    weights: tl.tensor,
    arrived: tl.tensor,
    kv_heads: tl.tensor,
    group: tl.tensor,
    dim: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_token: tl.tensor,
    value_batch: tl.tensor,
    value_head: tl.tensor,
    value_token: tl.tensor,
    scale: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """A share of the positions for the ``group`` query heads of one key head of one sequence.

    The first share begins with the new token, whose key and value it also writes to the cache. With several shares,
    ``partial`` ``[heads of all, SPLITS, BLOCK_G, BLOCK_D]``, ``maxima`` and ``weights`` keep what each found, and
    ``arrived`` counts those that are done: the last one adds up and leaves zero. ``scale``, which is positive and
    includes log2(e), multiplies differences of scores: small where a weight counts, and so little is rounded off.
    ``DEPENDENT`` as in ``rms_norm_kernel``.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)  # of all sequences
    split = tl.program_id(1)
    batch = (head // kv_heads).to(tl.int64)
    kv_head = (head % kv_heads).to(tl.int64)
    p = tl.load(position)
    share = tl.cdiv(tl.cdiv(p, SPLITS), BLOCK_N) * BLOCK_N
    busy = tl.maximum(tl.cdiv(p, tl.maximum(share, 1)), 1)
    if split < busy:
        g = tl.arange(0, BLOCK_G)
        d = tl.arange(0, BLOCK_D)
        inside = d < dim
        c = tl.load(cos + p * dim + d, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + p * dim + d, mask=inside, other=0.0).to(tl.float32)
        new = qkv + batch * ((group + 2) * kv_heads * dim)
        queries = new + (kv_head * group + g[:, None]) * dim
        q = rotated(queries, c[None, :], s[None, :], d[None, :], (g[:, None] < group) & inside[None, :], dim)

        keys += batch * key_batch + kv_head * key_head
        values += batch * value_batch + kv_head * value_head
        top = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        sums = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        if split == 0:
            k_new = rotated(new + (group * kv_heads + kv_head) * dim, c, s, d, inside, dim)
            v_new = tl.load(new + ((group + 1) * kv_heads + kv_head) * dim + d, mask=inside, other=0.0)
            tl.store(keys + p * key_token + d, k_new, mask=inside)
            tl.store(values + p * value_token + d, v_new, mask=inside)
            top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], axis=1)
            total = tl.full([BLOCK_G], 1.0, tl.float32)
            sums += v_new.to(tl.float32)[None, :]

        n = tl.arange(0, BLOCK_N)
        end = tl.minimum((split + 1) * share, p)
        for first in range(split * share, end, BLOCK_N):
            there = first + n < end
            at = (first + n).to(tl.int64)
            k = tl.load(keys + at[None, :] * key_token + d[:, None], mask=there[None, :] & inside[:, None], other=0.0)
            v = tl.load(
                values + at[:, None] * value_token + d[None, :], mask=there[:, None] & inside[None, :], other=0.0
            )
            scores = tl.dot(q, k, input_precision="ieee")
            scores = tl.where(there[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            shrunk = tl.exp2((top - higher) * scale)
            exponentials = tl.exp2((scores - higher[:, None]) * scale)
            total = total * shrunk + tl.sum(exponentials, axis=1)
            sums = sums * shrunk[:, None]
            sums = tl.dot(exponentials.to(v.dtype), v, sums, input_precision="ieee")
            top = higher

        y += batch * (group * kv_heads * dim) + kv_head * group * dim
        if (SPLITS == 1) | (busy == 1):
            out = sums / total[:, None]
            tl.store(y + g[:, None] * dim + d[None, :], out, mask=(g[:, None] < group) & inside[None, :])
        else:
            slot = head.to(tl.int64) * SPLITS + split
            tl.store(partial + (slot * BLOCK_G + g[:, None]) * BLOCK_D + d[None, :], sums, mask=g[:, None] < group)
            tl.store(maxima + slot * BLOCK_G + g, top)
            tl.store(weights + slot * BLOCK_G + g, total)
            tl.debug_barrier()  # all of this program's sums are there before it says so
            if tl.atomic_add(arrived + head, 1, sem="acq_rel") == busy - 1:
                tl.store(arrived + head, 0)
                shares = tl.arange(0, BLOCK_S)
                done = shares < busy
                slots = head.to(tl.int64) * SPLITS + shares
                for h in range(group):
                    tops = tl.load(maxima + slots * BLOCK_G + h, mask=done, other=float("-inf"))
                    factors = tl.exp2((tops - tl.max(tops, axis=0)) * scale)
                    totals = tl.load(weights + slots * BLOCK_G + h, mask=done, other=0.0)
                    parts = tl.load(
                        partial + (slots[:, None] * BLOCK_G + h) * BLOCK_D + d[None, :], mask=done[:, None], other=0.0
                    )
                    out = tl.sum(parts * factors[:, None], axis=0) / tl.sum(totals * factors, axis=0)
                    tl.store(y + h * dim + d, out, mask=inside)


class Kernel:
    """The kernel for one set of sizes, with the memory of its sums."""

    def __init__(
        self, batch: int, heads: int, kv_heads: int, dim: int, splits: int, scale: float, device: torch.device
    ) -> None:
        self._heads, self._kv_heads, self._dim, self._splits = heads, kv_heads, dim, splits
        self._scale = scale * math.log2(math.e)
        self._block_g = max(_LEAST_ROWS, triton.next_power_of_2(heads // kv_heads))
        self._block_d = max(16, triton.next_power_of_2(dim))
        memory = (
            torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor if device.type == "cuda" else 0
        )
        self._stages = _STAGES if memory >= _SHARED_BYTES else _FEWER_STAGES
        slots = batch * kv_heads * splits
        self._partial = torch.empty(slots, self._block_g, self._block_d, device=device)
        self._maxima = torch.empty(slots, self._block_g, device=device)
        self._weights = torch.empty_like(self._maxima)
        self._arrived = torch.zeros(batch * kv_heads, dtype=torch.int32, device=device)

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
        batch, width = len(qkv), self._block_d * qkv.element_size()
        y = qkv.new_empty(batch, 1, self._heads * self._dim)
        dependent = has_dependent_launch(qkv.device)
        with torch.cuda.device_of(qkv):
            decode_attention_kernel[(batch * self._kv_heads, self._splits)](
                qkv, cos, sin, keys, values, position, y,
                self._partial, self._maxima, self._weights, self._arrived,
                self._kv_heads, self._heads // self._kv_heads, self._dim,
                *keys.stride()[:3], *values.stride()[:3], self._scale,
                SPLITS=self._splits, BLOCK_S=triton.next_power_of_2(self._splits), BLOCK_G=self._block_g,
                BLOCK_N=min(_MOST_N, max(16, _STEP_BYTES // width)), BLOCK_D=self._block_d, DEPENDENT=dependent,
                num_warps=_WARPS, num_stages=self._stages, **({"launch_pdl": True} if dependent else {}),
            )  # fmt: skip
        return y
