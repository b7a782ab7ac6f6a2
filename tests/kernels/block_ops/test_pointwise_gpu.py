"""RMS norm, SwiGLU and rotary embedding on a CUDA device, forward and backward, against float64."""

import pytest
import torch

from surgeon_kernels import rms_norm, rotary, swiglu
from surgeon_kernels.block_ops.rms_norm import rms_norm_reference
from surgeon_kernels.block_ops.rotary import rotary_reference
from surgeon_kernels.block_ops.swiglu import swiglu_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def randn(*shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, device="cuda")).to(dtype)


def check(kernel, reference, *inputs, constants=()):
    """The result and all gradients are at most twice as far from float64 as the reference in the same dtype.

    The reference may be right to the last digit by luck where there are few numbers: a unit in that place is allowed,
    and one in float32's for exponentials, which are approximate.
    """
    results = []
    for function, dtype in ((kernel, None), (reference, None), (reference, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        y = function(*leaves, *(c.to(dtype or c.dtype) if isinstance(c, torch.Tensor) else c for c in constants))
        gradient = randn(*y.shape, dtype=inputs[0].dtype, seed=9).to(y.dtype)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, gradient)])
    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.dtype == inputs[0].dtype
        scale = exact.norm()
        allowed = 2 * max(float((theirs.double() - exact).norm() / scale), torch.finfo(ours.dtype).eps / 2, 2**-23)
        assert float((ours.double() - exact).norm() / scale) <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 4096), (3, 100), (1, 8), (7, 5120), (2, 16384), (300, 4096)])
def test_rms_norm(dtype, shape):
    x, weight = randn(*shape, dtype=dtype, scale=3.0), randn(shape[-1], dtype=dtype, seed=1)
    check(rms_norm, rms_norm_reference, x, constants=(weight, 1e-5))


@pytest.mark.parametrize("rows", [1, 100, 128, 129])
def test_a_norm_that_may_start_early_reads_what_the_kernel_before_wrote(rows):
    """In a graph, norms by turns with additions that are not launched so, and with each other."""
    weight = randn(4096, dtype=torch.bfloat16, seed=1, scale=2.0)
    steps = [lambda x: rms_norm(x, weight, 1e-5), lambda x: rms_norm(x + 0.5, weight, 1e-5)] * 20
    x = right = randn(rows, 4096, dtype=torch.bfloat16)
    for step in steps:
        right = step(right)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for step in steps:
            y = step(y)
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, right)


def test_rms_norm_with_a_result_of_another_dtype():
    x, weight = randn(6, 200, dtype=torch.float32).requires_grad_(), randn(200, dtype=torch.float32, seed=1)
    y = rms_norm(x, weight, 1e-5, torch.bfloat16)
    assert torch.equal(y, rms_norm(x, weight, 1e-5).bfloat16())
    gradient = randn(6, 200, dtype=torch.bfloat16, seed=9)
    (found,) = torch.autograd.grad(y, x, gradient)
    (expected,) = torch.autograd.grad(rms_norm(x, weight, 1e-5), x, gradient.float())
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 11008), (3, 100), (1,)])
def test_swiglu(dtype, shape):
    check(swiglu, swiglu_reference, randn(*shape, dtype=dtype, scale=3.0), randn(*shape, dtype=dtype, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "length", "dim"), [(2, 32, 50, 128), (3, 5, 7, 80), (1, 1, 1, 2)])
@pytest.mark.parametrize("angles_per_sequence", [False, True])
def test_rotary(dtype, batch, heads, length, dim, angles_per_sequence):
    x = randn(batch, length, heads, dim, dtype=dtype).transpose(1, 2)
    cos, sin = (randn(batch if angles_per_sequence else 1, length, dim, dtype=dtype, seed=s) for s in (1, 2))
    check(rotary, rotary_reference, x, constants=(cos, sin))
    assert rotary(x, cos, sin).stride() == x.stride()


def test_heads_that_lie_more_than_2_31_numbers_apart():
    length, dim, apart = 3, 4, 1 << 30
    memory = torch.empty(2 * apart + length * dim, dtype=torch.bfloat16, device="cuda")  # 4.3 GB
    x = memory.as_strided((1, 3, length, dim), (0, apart, dim, 1))
    x.copy_(randn(1, 3, length, dim, dtype=torch.bfloat16))
    cos, sin = (randn(1, length, dim, dtype=torch.bfloat16, seed=s) for s in (1, 2))
    close = x.contiguous()
    torch.testing.assert_close(rotary(x, cos, sin), rotary(close, cos, sin), rtol=0.0, atol=0.0)


def test_non_contiguous_and_empty():
    x = randn(6, 200, dtype=torch.bfloat16)
    w = randn(100, dtype=torch.bfloat16)
    torch.testing.assert_close(rms_norm(x[:, ::2], w, 1e-6), rms_norm_reference(x[:, ::2], w, 1e-6))
    torch.testing.assert_close(swiglu(x.T, x.T), swiglu_reference(x.T, x.T))
    gate, up = x.view(2, 3, 200).chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(gate, up), swiglu_reference(gate, up))
    assert rms_norm(x[:0], randn(200, dtype=torch.bfloat16), 1e-6).shape == (0, 200)
    assert swiglu(x[:0], x[:0]).shape == (0, 200)


def test_a_weight_that_wants_its_gradient_gets_it():
    x, w = randn(6, 100, dtype=torch.float32), randn(100, dtype=torch.float32).requires_grad_()
    rms_norm(x, w, 1e-6).sum().backward()
    assert w.grad is not None and w.grad.any()
