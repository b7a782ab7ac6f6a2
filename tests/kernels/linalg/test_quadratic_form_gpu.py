"""The kernel of diag(X S Xᵀ) against float64 and PyTorch's own error in TF32."""

import pytest
import torch

from surgeon_kernels import column_cost, quadratic_form, row_cost
from surgeon_kernels.linalg.quadratic_form import fits_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(1024, 1024), (1500, 2048), (1025, 1027), (3000, 1100), (1111, 4097)]


def operands(rows, columns, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x, y = (torch.randn(n, columns, generator=generator, device="cuda") for n in (rows, 2 * columns))
    y *= torch.logspace(0, -2, columns, device="cuda")  # inputs of very different sizes, as real ones are
    return x, y.T @ y / len(y)


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


def exact(x, S):
    return ((x.double() @ S.double()) * x.double()).sum(dim=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["rows", "columns", "misaligned"])
def test_errors_are_at_most_twice_those_of_torch_in_tf32_and_have_no_bias(shape, layout, monkeypatch):
    x, S = operands(*shape)
    if layout == "columns":
        x = x.T.contiguous().T
    elif layout == "misaligned":
        x = torch.cat([x[:, :1], x], dim=1)[:, 1:]
    assert fits_kernel(x, S)
    expected = exact(x, S)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    allowed = 2 * error(((x @ S) * x).sum(dim=1), expected)
    actual = quadratic_form(x, S)
    assert 1e-7 < error(actual, expected) <= allowed < 2e-3
    relative = (actual - expected) / expected
    assert float(relative.abs().max()) < 1e-3  # every single one
    assert abs(float(relative.mean())) < 5e-5  # with operands cut it would be -7e-4
    assert all(torch.equal(actual, quadratic_form(x, S)) for _ in range(3))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_what_is_cut_from_x_makes_sums_too_large_as_often_as_too_small(layout):
    x, S = operands(4096, 2048, seed=3)
    S = ((S.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)  # nothing of S is cut or rounded
    difference = quadratic_form(x if layout == "rows" else x.T.contiguous().T, S) - exact(x, S)
    assert 0.4 < float((difference > 0).double().mean()) < 0.6
    assert abs(float(difference.mean())) < 0.2 * float(difference.std())


def test_columns_are_copied_in_strips():
    x, S = operands(2048, 1024)
    W = torch.randn(1024, 1 << 17, device="cuda")
    W[:, -2048:] = x.T
    quadratic_form(W.T[:2048], S)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    q = quadratic_form(W.T, S)
    assert torch.cuda.max_memory_allocated() - before < W.nbytes / 4
    torch.testing.assert_close(q[-2048:], quadratic_form(x, S), rtol=1e-6, atol=0.0)


def test_costs_of_rows_and_columns():
    x, S = operands(1200, 1300)
    scale = torch.rand(1200, device="cuda")
    assert error(row_cost(x, S, scale), 0.5 * exact(x, S) * scale) < 2e-4
    W = x.T  # [1300, 1200]: its columns' form is that of the rows of x
    assert error(column_cost(W, S, scale), 0.5 * exact(x, S) * scale) < 2e-4


def test_rows_of_zeros_cost_nothing_and_empty_rows_of_the_last_block_do_not_leak():
    x, S = operands(1030, 1025)
    x[::2] = 0.0
    q = quadratic_form(x, S)
    assert not q[::2].any() and bool((q[1::2] > 0).all())


def test_small_or_other_operands_take_the_reference():
    x, S = operands(1024, 1024)
    assert not fits_kernel(x[:1000], S)
    assert not fits_kernel(x.double(), S.double())
    assert not fits_kernel(x.cpu(), S.cpu())
    assert error(quadratic_form(x[:1000], S), exact(x[:1000], S)) < 1e-5


def test_opcheck():
    torch.library.opcheck(torch.ops.surgeon_kernels.quadratic_form.default, operands(1024, 1024))
