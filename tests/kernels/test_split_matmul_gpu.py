"""Products of large float32 matrices by their bfloat16 parts against float64 and PyTorch's own in float32."""

import pytest
import torch

from surgeon_kernels.split_matmul import SPLIT_FROM, _fits, mm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def error(out, exact):
    return float((out.double() - exact).norm() / exact.norm())


def matrix(rows, columns, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    scale = torch.logspace(0, -3, columns, device="cuda")  # columns of very different sizes
    return torch.randn(rows, columns, device="cuda", generator=generator) * scale


@pytest.mark.parametrize("shape", [(1024, 1024, 1024), (1500, 3001, 1100), (1025, 4096, 1027)])
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
def test_products_have_the_accuracy_of_float32(shape, layout):
    m, k, n = shape
    A, B = matrix(m, k, 0), matrix(k, n, 1)
    if layout == "transposed":
        A, B = matrix(k, m, 0).T, matrix(n, k, 1).T
    elif layout == "sliced":
        A, B = matrix(m, k + 3, 0)[:, 3:], matrix(k + 1, n, 1)[1:]
    assert _fits(A, B)
    exact, single = A.double() @ B.double(), A @ B
    allowed = 2 * error(single, exact)
    assert 0.0 < error(mm(A, B), exact) <= allowed < 1e-5
    out = torch.full((m, n), float("nan"), device="cuda")
    assert mm(A, B, out=out, alpha=-0.5) is out
    assert error(out, -0.5 * exact) <= allowed
    assert torch.equal(out, mm(A, B, alpha=-0.5))  # the same bits again


def test_a_matrix_and_its_transpose_share_their_parts():
    X = matrix(2000, 1100, 2)
    exact = X.double().T @ X.double()
    product = mm(X.T, X)
    assert error(product, exact) <= 2 * error(X.T @ X, exact)
    torch.testing.assert_close(product, product.T, rtol=1e-4, atol=1e-5 * float(product.abs().max()))


def test_what_is_small_or_need_not_be_exact_is_one_product():
    A, B = matrix(1200, SPLIT_FROM - 1, 3), matrix(SPLIT_FROM - 1, 1100, 4)
    assert not _fits(A, B)
    assert torch.equal(mm(A, B), A @ B)
    A, B = matrix(1200, 2000, 5), matrix(2000, 1100, 6)
    torch.set_float32_matmul_precision("high")
    try:
        assert not _fits(A, B)
        assert torch.equal(mm(A, B), A @ B)
    finally:
        torch.set_float32_matmul_precision("highest")
