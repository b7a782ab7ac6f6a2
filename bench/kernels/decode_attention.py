"""Attention of one new token with a static cache: the kernel by its launches, and PyTorch's way.

    python -m bench.kernels.decode_attention

Microseconds of a call, replayed from a CUDA graph over the caches of so many layers that none stays in the L2 cache.
PyTorch rotates, writes with index_copy_ and attends by scaled_dot_product_attention, with a mask over the whole cache.
The floor is the time to read the filled part of the cache at the copy bandwidth measured here. Rows are appended to
results/decode_attention.csv, of the default launch first.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from bench.environment import append_row, environment, require_gpu
from bench.timing import copy_bandwidth, graph_ms
from surgeon_kernels import rotary
from surgeon_kernels.block_ops import decode_attention_triton
from surgeon_kernels.block_ops.decode_attention import DecodeAttention

NAMES = ("batch_size", "heads", "kv_heads", "dim", "length", "position")
CASES = [
    (1, 32, 32, 128, 256, 192),
    (16, 32, 32, 128, 256, 192),
    (1, 32, 8, 128, 4160, 4096),
    (8, 32, 8, 128, 4160, 2000),
]
# Bytes of keys of a step, warps and stages; those of the kernel first.
LAUNCHES = [(16384, 4, 3), (16384, 4, 2), (16384, 8, 3), (8192, 4, 3), (8192, 4, 2), (8192, 2, 3)]
_BYTES = 200 << 20  # of all caches, more than L2 holds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "decode_attention.csv")
    options = parser.parse_args()
    require_gpu()
    about = environment("cuda")
    bandwidth = copy_bandwidth()
    for case in CASES:
        batch, heads, kv_heads, dim, length, position = case
        layers = max(4, _BYTES // (4 * batch * kv_heads * length * dim))
        caches = torch.randn(layers, 2, batch, kv_heads, length, dim, device="cuda").bfloat16()
        qkv = torch.randn(batch, 1, (heads + 2 * kv_heads) * dim, device="cuda").bfloat16()
        cos, sin = torch.randn(2, length, dim, device="cuda").bfloat16()
        at = torch.tensor([position], device="cuda")
        scale = dim**-0.5
        floor = 4e6 * batch * kv_heads * position * dim / bandwidth
        own = DecodeAttention(batch, heads, kv_heads, dim, length, scale, caches.device)._kernel
        assert own is not None
        torch_us = 1e3 * graph_ms([partial(by_torch, qkv, cos, sin, kv, at, scale) for kv in caches])
        tried = [(own._splits, LAUNCHES[0]), *((splits, LAUNCHES[0]) for splits in (1, 2, 4, 8, 16, 33))]
        tried += [(own._splits, launch) for launch in LAUNCHES[1:]]
        for splits, (step, warps, stages) in dict.fromkeys(tried):
            if splits > max(1, position // 48) or splits * batch * kv_heads > 2048:
                continue
            with mock.patch.multiple(decode_attention_triton, _STEP_BYTES=step, _WARPS=warps, _STAGES=stages):
                kernel = decode_attention_triton.Kernel(batch, heads, kv_heads, dim, splits, scale, caches.device)
                us = 1e3 * graph_ms([partial(kernel, qkv, cos, sin, *kv, at) for kv in caches], 5)
            row: dict[str, object] = dict(zip(NAMES, case, strict=True))
            row |= {"splits": splits, "step_bytes": step, "warps": warps, "stages": stages}
            row |= {"us": f"{us:.2f}", "torch_us": f"{torch_us:.2f}", "floor_us": f"{floor:.2f}", **about}
            print(*row.values(), flush=True)
            append_row(options.out, row)


def by_torch(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, at: Tensor, scale: float) -> Tensor:
    _, batch, kv_heads, length, dim = cache.shape
    new = qkv.view(batch, 1, -1, dim).transpose(1, 2)
    heads = new.shape[1] - 2 * kv_heads
    turned = rotary(new[:, : heads + kv_heads], cos[at][None], sin[at][None])
    keys, values = cache
    keys.index_copy_(2, at, turned[:, heads:])
    values.index_copy_(2, at, new[:, heads + kv_heads :])
    mask = (torch.arange(length, device=at.device) <= at)[None, None, None]
    return functional.scaled_dot_product_attention(
        turned[:, :heads], keys, values, mask, scale=scale, enable_gqa=heads > kv_heads
    )


if __name__ == "__main__":
    main()
