"""Products with two positive definite matrices by their float16 parts, against float64."""

import pytest
import torch

from surgeon_kernels.linalg import kron_product as module
from surgeon_kernels.linalg.kron_product import kron_product, kron_product_split, mm_half, scaled_parts
from surgeon_kernels.linalg.masked_cg import product
from tests.kernels.dense import factor, relative_error, with_condition

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])]


def scaled(M, decades):
    """``M`` with rows and columns of scales spread over so many decades."""
    scales = torch.logspace(0, decades, len(M), dtype=M.dtype, device=M.device)[torch.randperm(len(M))]
    return scales[:, None] * M * scales


def error(out, L, X, M):
    """Against float64, relative to what the rounding of float32 products is bounded by."""
    L, X, M = (t.double() for t in (L, X, M))
    bound = (L.abs() @ X.abs() @ M.abs()).clamp_min(1e-300)
    return float(((out.double() - L @ X @ M).abs() / bound).max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e12])
def test_split_products_are_as_exact_as_float32(scale, device):
    torch.manual_seed(0)
    L = scaled(factor(40, "plain", 0), 3.0).to(device).float()
    M = scaled(with_condition(70, 1e4, 1), 2.0).to(device).float()
    X = (scale * torch.randn(40, 70)).to(device)
    assert error(kron_product_split(L, X, M), L, X, M) < 2e-6


@pytest.mark.parametrize("device", DEVICES)
def test_one_part_is_rounded_to_eleven_bits_by_larger_scales(device):
    torch.manual_seed(1)
    L, M, X = (
        factor(40, "plain", 0).float().to(device),
        factor(70, "outlier", 1).float().to(device),
        torch.randn(40, 70),
    )
    L[3], L[:, 3] = 0.0, 0.0  # of a dead output: nothing to scale by
    X = X.to(device)
    scales = L.diagonal() + 0.1, M.diagonal() + 0.1
    out = kron_product_split(L, X, M, scales=scales, parts=1)
    assert 1e-7 < error(out, L, X, M) < 2e-3 and out[3].eq(0.0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", [1, 2])
def test_terms_of_a_sum_may_be_indefinite(parts, device, monkeypatch):
    torch.manual_seed(2)
    monkeypatch.setattr(module, "fits_split", lambda X: True)
    sizes = 40, 70
    second = [torch.randn(n, n, device=device) for n in sizes]
    second = [scaled(M + M.T, 3.0) for M in second]
    second[0].diagonal()[:5] = 0.0
    second[1][7], second[1][:, 7] = 0.0, 0.0  # nothing to scale by
    terms = [tuple(factor(n, "plain", n).float().to(device) for n in sizes), tuple(second)]
    X = torch.randn(*sizes, device=device)
    total = product(terms, X, parts=parts).double()
    wide = [tuple(M.double() for M in term) for term in terms]
    expected = sum(L @ X.double() @ M for L, M in wide)
    bound = sum(L.abs() @ X.double().abs() @ M.abs() for L, M in wide)
    assert float(((total - expected).abs() / bound).max()) < (2e-3 if parts == 1 else 2e-6)


def test_entries_far_below_the_largest_keep_their_digits():
    L, M = torch.eye(3), torch.eye(4)
    X = torch.logspace(0, -9, 12).view(3, 4)
    out = kron_product_split(L, X, M)
    torch.testing.assert_close(out[X > 1e-4], X[X > 1e-4], rtol=2**-21, atol=0.0)
    torch.testing.assert_close(out, X, rtol=2**-21, atol=2**-34)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_times_anything_is_nothing(device):
    L, M = (factor(n, "plain", n).float().to(device) for n in (5, 6))
    assert kron_product_split(L, torch.zeros(5, 6, device=device), M).eq(0.0).all()
    assert kron_product(L[:0, :0], torch.zeros(0, 6, device=device), M).shape == (0, 6)


def test_nan_is_not_hidden():
    X = torch.zeros(5, 6)
    X[1, 2] = torch.nan
    assert kron_product_split(torch.eye(5), X, torch.eye(6)).isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_half_products_are_summed_in_float32(dtype, device):
    torch.manual_seed(0)
    A, B = torch.randn(9, 33, device=device).half(), torch.randn(33, 7, device=device).half()
    out = torch.full((9, 7), torch.nan, dtype=dtype, device=device)
    exact = A.double() @ B.double()
    mm_half(A, B, out, alpha=0.5)
    assert relative_error(out, 0.5 * exact) < (1e-3 if dtype == torch.float16 else 1e-6)
    before = out.double()
    mm_half(A, B, out, beta=1.0, alpha=-2.0)
    assert relative_error(out, before - 2.0 * exact) < (1e-3 if dtype == torch.float16 else 1e-6)


def test_unit_diagonal():
    M = scaled(factor(20, "plain", 0), 4.0)
    scale = M.diagonal().rsqrt()
    parts = scaled_parts(M.float(), scale.float(), scale.float(), 2)
    assert parts.dtype == torch.float16 and parts.shape == (2, 20, 20)
    assert parts[0].diagonal().eq(1.0).all() and parts[0].abs().max() <= 1.0
    whole = parts[0].double() + parts[1].double() / 2**11
    torch.testing.assert_close(whole, scale[:, None] * M * scale, rtol=0.0, atol=1e-6)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("shape", [(1024, 1500), (2100, 1100)])
def test_large_products_are_split_on_a_gpu(shape):
    torch.manual_seed(0)
    X = torch.randn(shape, device="cuda")
    L, M = (torch.randn(n, 2 * n, device="cuda") for n in shape)
    L, M = scaled(L @ L.T, 3.0), scaled(M @ M.T, 3.0)
    out = kron_product(L, X, M)
    assert torch.equal(out, kron_product_split(L, X, M))
    assert torch.equal(out, kron_product(L, X, M))  # the same bits again
    exact = L.double() @ X.double() @ M.double()
    # Two products, whose sums tensor cores cut to float32 after every 16 terms.
    assert relative_error(out, exact) <= 2 * max(shape) / 16 * 2.0**-23
    strided = torch.stack([X, X], dim=-1)[..., 0]
    assert torch.equal(kron_product(L, strided, M.T), kron_product_split(L, X, M.T.contiguous()))
