"""Queries, keys and values of a prompt: rotary embedding and write to the cache, in one pass."""

from __future__ import annotations

from torch import Tensor

from surgeon_kernels.block_ops.rotary import rotary_reference
from surgeon_kernels.runtime.triton_support import HALF_OR_SINGLE, has_kernels

_MOST_NUMBERS = 65536  # of a token, which one program holds


def fill_cache(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Rotate queries and keys (:func:`~surgeon_kernels.rotary`), and begin the cache with keys and values::

        q ← R q,   K[:, :, :T] = R k,   V[:, :, :T] = v

    On CUDA devices a Triton kernel computes it, where all have one dtype of at most 32 bits; elsewhere it is the
    PyTorch reference. It has no gradient.

    Args:
        qkv: ``[batch, T, (heads + 2 kv_heads) · D]``, queries, keys and values in this order.
        cos, sin: ``[T or more, D]``, of every position.
        keys, values: ``[batch, kv_heads, T or more, D]``, neighbours in memory along a head.

    Returns:
        The rotated queries, ``[batch, heads, T, D]``, which lie in memory token by token.

    Raises:
        ValueError: the shapes do not fit.
    """
    length, dim = qkv.shape[-2], keys.shape[-1]
    heads = qkv.shape[-1] // max(dim, 1) - 2 * keys.shape[1]
    if (
        qkv.dim() != 3
        or keys.dim() != 4
        or keys.shape != values.shape
        or dim % 2
        or qkv.shape[2] % dim
        or heads < 1
        or len(keys) != len(qkv)
        or cos.shape != sin.shape
        or cos.shape[1:] != (dim,)
        or min(keys.shape[2], len(cos)) < length
    ):
        shapes = [list(t.shape) for t in (qkv, cos, sin, keys, values)]
        raise ValueError(f"queries, keys and values do not fit angles and caches: {shapes}")
    if (
        qkv.is_cuda
        and has_kernels()
        and qkv.dtype == keys.dtype == values.dtype == cos.dtype == sin.dtype
        and qkv.dtype in HALF_OR_SINGLE
        and keys.stride(3) == values.stride(3) == 1
        and qkv.numel() > 0
        and qkv.shape[2] <= _MOST_NUMBERS
    ):
        from surgeon_kernels.block_ops import fill_cache_triton

        return fill_cache_triton.forward(qkv.contiguous(), cos.contiguous(), sin.contiguous(), keys, values)
    return fill_cache_reference(qkv, cos, sin, keys, values)


def fill_cache_reference(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    batch, length, _ = qkv.shape
    kv_heads, dim = keys.shape[1], keys.shape[3]
    new = qkv.view(batch, length, -1, dim).transpose(1, 2)
    heads = new.shape[1] - 2 * kv_heads
    turned = rotary_reference(new[:, : heads + kv_heads], cos[None, :length], sin[None, :length])
    keys[:, :, :length] = turned[:, heads:]
    values[:, :, :length] = new[:, heads + kv_heads :]
    return turned[:, :heads]
