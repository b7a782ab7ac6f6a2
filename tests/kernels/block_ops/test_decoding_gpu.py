"""The decoding kernels on a CUDA device against float64, and in graphs of kernels that start early."""

import pytest
import torch

from surgeon_kernels import DecodeAttention, add_rms_norm, fill_cache, rms_norm, swiglu
from surgeon_kernels.block_ops.add_rms_norm import add_rms_norm_reference
from surgeon_kernels.block_ops.decode_attention import decode_attention_reference
from surgeon_kernels.block_ops.fill_cache import fill_cache_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def randn(*shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, device="cuda")).to(dtype)


def assert_as_good(found, reference, exact):
    """At most twice the reference's error in the same dtype; a unit in the last place is allowed, and float32's."""
    scale = exact.norm()
    own = float((reference.double() - exact).norm() / scale)
    allowed = 2 * max(own, torch.finfo(found.dtype).eps / 2, 2**-22)
    assert float((found.double() - exact).norm() / scale) <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 4096), (16, 1, 4096), (3, 100), (300, 5120), (2, 16384)])
def test_add_rms_norm(dtype, shape):
    x, residual = randn(*shape, dtype=dtype, scale=3.0), randn(*shape, dtype=dtype, seed=1)
    weight = randn(shape[-1], dtype=dtype, seed=2)
    torch.cuda.synchronize()
    found = add_rms_norm(x, residual, weight, 1e-5)
    reference = add_rms_norm_reference(x, residual, weight, 1e-5)
    exact = add_rms_norm_reference(x.double(), residual.double(), weight.double(), 1e-5)
    assert torch.equal(found[0], reference[0])
    for ours, theirs, right in zip(found, reference, exact, strict=True):
        assert_as_good(ours, theirs, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "dim", "length"),
    [
        (1, 32, 32, 128, 256),
        (16, 32, 32, 128, 256),
        (1, 32, 8, 128, 3000),
        (2, 9, 3, 64, 700),
        (3, 8, 1, 80, 333),
        (1, 8, 4, 256, 700),
    ],
)
def test_decode_attention(dtype, batch, heads, kv_heads, dim, length):
    scale = dim**-0.5
    attention = DecodeAttention(batch, heads, kv_heads, dim, length, scale, torch.device("cuda"))
    assert attention._kernel is not None
    cos, sin = (randn(length, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    caches = [randn(batch, kv_heads, length, dim, dtype=dtype, seed=seed) for seed in (3, 4)]
    for position in (0, 1, 64, length // 2, length - 1):
        qkv = randn(batch, 1, (heads + 2 * kv_heads) * dim, dtype=dtype, seed=position + 5)
        at = torch.tensor([position], device="cuda")
        ours, theirs = ([cache.clone() for cache in caches] for _ in range(2))
        wide = [cache.double() for cache in caches]
        for cache in ours:
            cache[:, :, position:] = float("nan")  # not yet written
        found = [attention(qkv, cos, sin, *ours, at) for _ in range(3)]
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        reference = decode_attention_reference(qkv, cos, sin, *theirs, at, scale)
        exact = decode_attention_reference(qkv.double(), cos.double(), sin.double(), *wide, at, scale)
        assert_as_good(found[0], reference, exact)
        for mine, right, before in zip(ours, wide, caches, strict=True):
            assert torch.equal(mine[:, :, :position], before[:, :, :position])
            assert mine[:, :, position + 1 :].isnan().all()
            assert_as_good(mine[:, :, position], mine[:, :, position], right[:, :, position])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "dim", "length"),
    [(1, 32, 32, 128, 300), (2, 9, 3, 64, 77), (1, 71, 1, 64, 5), (3, 8, 2, 80, 33)],
)
def test_fill_cache(dtype, batch, heads, kv_heads, dim, length):
    qkv = randn(batch, length, (heads + 2 * kv_heads) * dim, dtype=dtype)
    cos, sin = (randn(length + 3, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    caches = randn(2, batch, kv_heads, length + 2, dim, dtype=dtype, seed=3)
    ours, theirs, wide = caches.clone(), caches.clone(), caches.double()
    found = fill_cache(qkv, cos, sin, *ours)
    reference = fill_cache_reference(qkv, cos, sin, *theirs)
    exact = fill_cache_reference(qkv.double(), cos.double(), sin.double(), *wide)
    assert_as_good(found, reference, exact)
    assert_as_good(ours, theirs, wide)
    assert torch.equal(ours[:, :, :, length:], caches[:, :, :, length:])


def test_caches_of_any_strides():
    batch, heads, dim, length = 2, 4, 64, 200
    attention = DecodeAttention(batch, heads, heads, dim, length, 0.125, torch.device("cuda"))
    cos, sin = (randn(length, dim, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    qkv, at = randn(batch, 1, 3 * heads * dim, dtype=torch.bfloat16), torch.tensor([150], device="cuda")
    by_token = [randn(batch, length, heads, dim, dtype=torch.bfloat16, seed=s).transpose(1, 2) for s in (3, 4)]
    by_head = [cache.contiguous() for cache in by_token]
    assert torch.equal(attention(qkv, cos, sin, *by_token, at), attention(qkv, cos, sin, *by_head, at))
    assert all(torch.equal(a, b) for a, b in zip(by_token, by_head, strict=True))


@pytest.mark.parametrize("batch", [1, 16])
def test_kernels_that_start_early_read_what_those_before_wrote(batch):
    """In a graph, by turns with products that are not launched so."""
    heads, dim, length = 8, 64, 300
    width = heads * dim
    attention = DecodeAttention(batch, heads, heads, dim, length, 0.125, torch.device("cuda"))
    cos, sin = (randn(length, dim, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    weights = [randn(3 * width, width, dtype=torch.bfloat16, seed=s, scale=width**-0.5) for s in (3, 4)]
    norm, start = randn(width, dtype=torch.bfloat16, seed=5), randn(batch, 1, width, dtype=torch.bfloat16, seed=6)
    caches = [[torch.zeros(batch, heads, length, dim, dtype=torch.bfloat16, device="cuda") for _ in "kv"] for _ in "ab"]
    position = torch.zeros(1, dtype=torch.long, device="cuda")

    def step(x, wait=lambda: None):
        h = x
        for weight, cache in zip(weights, caches, strict=True):
            x = rms_norm(x, norm, 1e-5)
            wait()
            qkv = x @ weight.T
            wait()
            x = attention(qkv, cos, sin, *cache, position)
            wait()
            h, x = add_rms_norm(x, h, norm, 1e-5)
            wait()
            x = swiglu(*(x @ weight.T)[..., : 2 * width].chunk(2, dim=-1))
            wait()
        position.add_(1)
        return x

    right = []
    for _ in range(100):
        right.append(step(start, torch.cuda.synchronize))
    position.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(start)
    position.zero_()
    for expected in right:
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


def test_attention_by_a_scale_that_is_not_positive_is_left_to_pytorch():
    for scale, by_kernel in [(1.0, True), (0.0, False), (-1.0, False)]:
        attention = DecodeAttention(1, 2, 1, 64, 128, scale, torch.device("cuda"))
        assert (attention._kernel is not None) == by_kernel
