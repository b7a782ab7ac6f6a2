"""Attention of one new token of every sequence: rotary embedding, write to the cache and attention, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from surgeon_kernels.block_ops.rotary import rotary_reference
from surgeon_kernels.runtime.triton_support import HALF_OR_SINGLE, has_kernels

# Programs a multiprocessor that a launch has at least where the cache is long enough, positions of a program at least,
# and programs a head at most: estimates.
_PROGRAMS_PER_MULTIPROCESSOR = 2
_LEAST_POSITIONS = 64
_MOST_SPLITS = 64
_MOST_HEADS_A_GROUP, _MOST_DIM = 64, 256


class DecodeAttention:
    """Attention of one new token of each of ``batch`` sequences to those before it, and its place in the cache.

    With ``p`` the new token's position, ``R`` its rotation (:func:`~surgeon_kernels.rotary`) and ``g(h)`` the key head
    of query head ``h``, for every sequence::

        K[g, p] = R k_g,   V[g, p] = v_g
        y_h = softmax(scale · (R q_h)ᵀ K[g(h), : p + 1]) V[g(h), : p + 1]

    On CUDA devices one Triton kernel computes it, where all have one dtype of at most 32 bits and scale > 0: the
    positions of a key head are shared out among several programs (split-KV, as flash-decoding; Dao et al., 2023), and
    the one that ends last adds up their sums. Elsewhere it is the PyTorch reference. It has no gradient. An object
    holds the memory of these sums: its calls must follow each other in one stream.

    Args:
        heads, kv_heads: query heads, and key and value heads, each of which serves ``heads / kv_heads`` of the former.
        dim: of a head, even.
        length: positions of the cache.
        scale: of the products of queries and keys.

    Raises:
        ValueError: ``dim`` is odd, or ``heads`` no multiple of ``kv_heads``.
    """

    def __init__(
        self, batch: int, heads: int, kv_heads: int, dim: int, length: int, scale: float, device: torch.device
    ) -> None:
        if dim % 2 or heads % kv_heads:
            raise ValueError(f"attention needs an even head dimension and whole groups, not {dim}, {heads}/{kv_heads}")
        self.batch, self.heads, self.kv_heads, self.dim, self.scale = batch, heads, kv_heads, dim, scale
        # By a scale that is not positive the largest score would not have the largest weight.
        fits = heads // kv_heads <= _MOST_HEADS_A_GROUP and dim <= _MOST_DIM and scale > 0
        self._kernel = None
        if device.type == "cuda" and has_kernels() and fits:
            from surgeon_kernels.block_ops.decode_attention_triton import Kernel

            programs = _PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
            splits = min(-(-programs // (batch * kv_heads)), -(-length // _LEAST_POSITIONS), _MOST_SPLITS)
            self._kernel = Kernel(batch, heads, kv_heads, dim, splits, scale, device)

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
        """``y`` ``[batch, 1, heads · dim]``; ``keys`` and ``values`` are written to at the position.

        Args:
            qkv: ``[batch, 1, (heads + 2 kv_heads) · dim]``, queries, keys and values in this order, not yet rotated.
            cos, sin: ``[length, dim]``, of every position.
            keys, values: ``[batch, kv_heads, length, dim]``, neighbours in memory along a head.
            position: int64, one number on the device, smaller than ``length``: it is not read here.

        Raises:
            ValueError: the shapes do not fit.
        """
        B, H, K, D = self.batch, self.heads, self.kv_heads, self.dim
        length = keys.shape[2] if keys.dim() == 4 else -1
        if (
            qkv.shape != (B, 1, (H + 2 * K) * D)
            or not keys.shape == values.shape == (B, K, length, D)
            or not cos.shape == sin.shape == (length, D)
            or position.numel() != 1
        ):
            shapes = [list(t.shape) for t in (qkv, cos, keys, values, position)]
            raise ValueError(f"attention of {B} x ({H}, {K}) heads of {D} does not take {shapes}")
        if (
            self._kernel is not None
            and qkv.dtype == keys.dtype == values.dtype == cos.dtype == sin.dtype
            and qkv.dtype in HALF_OR_SINGLE
            and keys.stride(3) == values.stride(3) == 1
        ):
            return self._kernel(qkv.contiguous(), cos.contiguous(), sin.contiguous(), keys, values, position)
        return decode_attention_reference(qkv, cos, sin, keys, values, position, self.scale)


def decode_attention_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float
) -> Tensor:
    """In the operands' dtype, softmax in float32 or wider, as transformers computes it."""
    batch, kv_heads, length, dim = keys.shape
    new = qkv.view(batch, 1, -1, dim).transpose(1, 2)  # [batch, all heads, 1, dim]
    q, k, v = new.split([new.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    angles = (table.index_select(0, position.view(1))[None] for table in (cos, sin))
    q, k = rotary_reference(torch.cat([q, k], dim=1), *angles).split([q.shape[1], kv_heads], dim=1)
    keys.index_copy_(2, position.view(1), k.to(keys.dtype))
    values.index_copy_(2, position.view(1), v)
    group = q.shape[1] // kv_heads
    all_keys, all_values = (cache.repeat_interleave(group, dim=1) for cache in (keys, values))
    scores = scale * (q @ all_keys.mT)
    scores = scores.masked_fill(torch.arange(length, device=qkv.device) > position, float("-inf"))
    weights = functional.softmax(scores, dim=-1, dtype=torch.promote_types(qkv.dtype, torch.float32)).to(qkv.dtype)
    return (weights @ all_values).transpose(1, 2).reshape(batch, 1, -1)
