"""Checks the kernels of decoding in Triton's interpreter; run by test_interpreted.py in a process of its own."""

import itertools

import torch

from surgeon_kernels.block_ops import add_rms_norm_triton, decode_attention_triton, fill_cache_triton
from surgeon_kernels.block_ops.add_rms_norm import add_rms_norm_reference
from surgeon_kernels.block_ops.decode_attention import decode_attention_reference
from surgeon_kernels.block_ops.fill_cache import fill_cache_reference


def attention(batch: int, heads: int, kv_heads: int, dim: int, splits: int, dtype: torch.dtype) -> None:
    length, scale = 300, 0.3
    kernel = decode_attention_triton.Kernel(batch, heads, kv_heads, dim, splits, scale, torch.device("cpu"))
    keys, values = (torch.randn(batch, kv_heads, length, dim).to(dtype) for _ in range(2))
    cos, sin = (torch.randn(length, dim).to(dtype) for _ in range(2))
    for position in (0, 1, 63, 64, 200, length - 1):
        keys[:, :, position:] = values[:, :, position:] = float("nan")  # not yet written
        qkv = torch.randn(batch, 1, (heads + 2 * kv_heads) * dim).to(dtype)
        at = torch.tensor([position])
        wide = [t.double() for t in (keys, values)]
        wide[0][:, :, position:] = wide[1][:, :, position:] = 0.0
        exact = decode_attention_reference(qkv.double(), cos.double(), sin.double(), *wide, at, scale)
        y = kernel(qkv, cos, sin, keys, values, at)
        tolerance = 1e-5 if dtype == torch.float32 else 4e-3
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
        for cache, expected in zip((keys, values), wide, strict=True):
            torch.testing.assert_close(
                cache[:, :, : position + 1].double(), expected[:, :, : position + 1], rtol=tolerance, atol=tolerance
            )
            assert cache[:, :, position + 1 :].isnan().all()
            cache[:, :, position + 1 :] = torch.randn(batch, kv_heads, length - position - 1, dim)
        assert not kernel._arrived.any()


def caches(batch: int, heads: int, kv_heads: int, dim: int) -> None:
    length, room = 7, 9
    qkv = torch.randn(batch, length, (heads + 2 * kv_heads) * dim)
    cos, sin = torch.randn(2, room, dim)
    ours = torch.randn(2, batch, room, kv_heads, dim).transpose(2, 3)
    theirs = ours.clone()
    found, expected = fill_cache_triton.forward(qkv, cos, sin, *ours), fill_cache_reference(qkv, cos, sin, *theirs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def main() -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 100), torch.randn(5, 100), torch.randn(100)
    ours = add_rms_norm_triton.forward(x, residual, weight, 1e-5)
    for found, expected in zip(ours, add_rms_norm_reference(x, residual, weight, 1e-5), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)

    shapes = [(1, 2, 2, 16), (2, 6, 2, 24)]
    for shape, splits, dtype in itertools.product(shapes, (1, 3), (torch.float32, torch.float16)):
        attention(*shape, splits, dtype)
    for shape in shapes:
        caches(*shape)
    print("agrees")


if __name__ == "__main__":
    main()
