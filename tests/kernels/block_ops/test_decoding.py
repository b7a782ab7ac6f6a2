"""The references of the decoding kernels against their formulas in float64."""

import math

import pytest
import torch

from surgeon_kernels import DecodeAttention, add_rms_norm, fill_cache, rms_norm, rotary

CPU = torch.device("cpu")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_add_rms_norm():
    x, residual, weight = randn(2, 3, 5), randn(2, 3, 5, seed=1), randn(5, seed=2)
    h, y = add_rms_norm(x, residual, weight, 0.1)
    assert torch.equal(h, x + residual) and torch.equal(y, rms_norm(h, weight, 0.1))
    with pytest.raises(ValueError, match=r"must be \[..., C\]"):
        add_rms_norm(x, residual[:1], weight, 0.1)


def turned(head, angles):
    """``head`` ``[D]`` as D / 2 complex numbers, each turned by its angle."""
    half = len(head) // 2
    return [complex(head[d], head[d + half]) * complex(math.cos(a), math.sin(a)) for d, a in enumerate(angles)]


@pytest.mark.parametrize("position", [0, 3])
def test_decode_attention(position):
    batch, heads, kv_heads, dim, length, scale = 2, 4, 2, 6, 5, 0.4
    attention = DecodeAttention(batch, heads, kv_heads, dim, length, scale, CPU)
    angles = randn(length, dim // 2, seed=1)
    cos, sin = (f(angles).repeat(1, 2) for f in (torch.cos, torch.sin))
    keys, values = randn(2, batch, kv_heads, length, dim, seed=2)
    before = keys.clone(), values.clone()
    qkv = randn(batch, 1, (heads + 2 * kv_heads) * dim, seed=3)
    y = attention(qkv, cos, sin, keys, values, torch.tensor([position])).view(batch, heads, dim)
    for cache, old in zip((keys, values), before, strict=True):
        others = torch.arange(length) != position
        assert torch.equal(cache[:, :, others], old[:, :, others])
    for b in range(batch):
        q, k, v = qkv[b, 0].view(-1, dim).split([heads, kv_heads, kv_heads])
        for g in range(kv_heads):
            new = turned(k[g], angles[position])
            assert [complex(*pair) for pair in keys[b, g, position].view(2, -1).T] == pytest.approx(new)
            assert torch.equal(values[b, g, position], v[g])
        for h in range(heads):
            g = h // (heads // kv_heads)
            query = turned(q[h], angles[position])
            parts = [[complex(*pair) for pair in keys[b, g, n].view(2, -1).T] for n in range(position + 1)]
            scores = [sum((a * c.conjugate()).real for a, c in zip(query, key, strict=True)) for key in parts]
            weights = [math.exp(scale * score) for score in scores]
            expected = sum(w * values[b, g, n] for n, w in enumerate(weights)) / sum(weights)
            torch.testing.assert_close(y[b, h], expected)


def test_what_attention_does_not_take():
    with pytest.raises(ValueError, match="whole groups"):
        DecodeAttention(1, 3, 2, 4, 8, 1.0, CPU)
    with pytest.raises(ValueError, match="does not take"):
        DecodeAttention(1, 2, 2, 4, 8, 1.0, CPU)(
            randn(1, 1, 24), randn(8, 4), randn(8, 4), randn(1, 2, 8, 4), randn(1, 1, 8, 4), torch.tensor([0])
        )


def test_fill_cache():
    batch, heads, kv_heads, dim, length, room = 2, 4, 2, 6, 3, 5
    qkv = randn(batch, length, (heads + 2 * kv_heads) * dim)
    cos, sin = randn(2, room, dim, seed=1)
    keys, values = randn(2, batch, kv_heads, room, dim, seed=2)
    before = keys.clone(), values.clone()
    found = fill_cache(qkv, cos, sin, keys, values)
    q, k, v = (
        part.reshape(batch, length, -1, dim).transpose(1, 2)
        for part in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=2)
    )
    angles = cos[None, :length], sin[None, :length]
    assert torch.equal(found, rotary(q, *angles))
    assert torch.equal(keys[:, :, :length], rotary(k, *angles)) and torch.equal(values[:, :, :length], v)
    for cache, old in zip((keys, values), before, strict=True):
        assert torch.equal(cache[:, :, length:], old[:, :, length:])
    with pytest.raises(ValueError, match="do not fit"):
        fill_cache(qkv, cos[:2], sin[:2], keys, values)
