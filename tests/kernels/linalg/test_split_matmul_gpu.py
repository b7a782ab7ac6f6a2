"""Products of large float32 matrices by their bfloat16 parts, against float64."""

import pytest
import torch

from surgeon_kernels.linalg.split_matmul import RUN, SPLIT_FROM, _fits, mm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def error(out, exact):
    return float((out.double() - exact).norm() / exact.norm())


def matrix(rows, columns, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(rows, columns, device="cuda", generator=generator)


def allowed(products):
    """Of sums that are cut, not rounded, to float32 after every 16 products of a run: by a unit in the last place."""
    return min(products, RUN) / 16 * 2.0**-23


@pytest.mark.parametrize("shape", [(1024, 1024, 1024), (1500, 3001, 1100), (1024, 9000, 1024)])
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
def test_products(shape, layout):
    m, k, n = shape
    A, B = matrix(m, k, 0), matrix(k, n, 1)
    if layout == "transposed":
        A, B = matrix(k, m, 0).T, matrix(n, k, 1).T
    elif layout == "sliced":
        A, B = matrix(m, k + 3, 0)[:, 3:], matrix(k + 1, n, 1)[1:]
    assert _fits(A, B)
    exact = A.double() @ B.double()
    assert error(mm(A, B), exact) <= allowed(k)
    out = torch.full((m, n), float("nan"), device="cuda")
    assert mm(A, B, out=out, alpha=-0.5) is out
    assert error(out, -0.5 * exact) <= allowed(k)
    assert torch.equal(out, mm(A, B, alpha=-0.5))  # the same bits again


def test_a_matrix_and_its_transpose_share_their_parts():
    X = matrix(2000, 1100, 2)
    assert error(mm(X.T, X), X.double().T @ X.double()) <= allowed(2000)


def test_what_is_small_or_need_not_be_exact_is_one_product():
    A, B = matrix(1200, SPLIT_FROM - 1, 3), matrix(SPLIT_FROM - 1, 1100, 4)
    exact = A.double() @ B.double()
    assert not _fits(A, B)
    assert error(mm(A, B), exact) <= 2 * error(A @ B, exact)
    A, B = matrix(1200, 2000, 5), matrix(2000, 1100, 6)
    exact = A.double() @ B.double()
    torch.set_float32_matmul_precision("high")
    try:
        assert not _fits(A, B)
        assert error(mm(A, B), exact) <= 2 * error(A @ B, exact)
    finally:
        torch.set_float32_matmul_precision("highest")
