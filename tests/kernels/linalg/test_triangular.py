import pytest
import torch

from surgeon_kernels import inverse_and_diagonal, inverse_diagonal, spd_inverse, unchecked_inverse
from surgeon_kernels.linalg import split_matmul, triangular
from surgeon_kernels.linalg.split_matmul import addmm_split_, mm, split, split_reference
from tests.kernels.dense import factor, relative_error, with_condition


@pytest.fixture(autouse=True, params=[8, 1024])
def large_from(request, monkeypatch):
    """Blocks are merged in batches below this size and pair by pair from it on."""
    monkeypatch.setattr(triangular, "SPLIT_FROM", request.param)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 31, 33, 64, 65, 100])
@pytest.mark.parametrize("panel", [4, 16])
@pytest.mark.parametrize("upper", [False, True])
def test_inverse_from_a_factor_of_any_size_and_memory_order(n, panel, upper):
    M = factor(n, "plain", n)
    L = torch.linalg.cholesky_ex(M, upper=True).L.T if upper else torch.linalg.cholesky(M)
    X = triangular.triangular_inverse_(L.clone(memory_format=torch.preserve_format), base=4, panel=panel)
    assert X.triu(1).eq(0).all()
    torch.testing.assert_close(X @ L, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    memory = L.data_ptr()
    inverse = triangular.cholesky_inverse_(L, base=4, panel=panel)
    assert inverse.data_ptr() == memory
    assert torch.equal(inverse, inverse.T)
    torch.testing.assert_close(inverse, torch.linalg.inv(M), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("n", [40, 65])
def test_blocks_of_a_factor_that_is_a_view(n):
    M = factor(n, "plain", 1)
    padded = torch.full((n + 3, n + 2), float("nan"), dtype=torch.float64)
    padded[2 : n + 2, 1 : n + 1] = torch.linalg.cholesky(M)
    inverse = triangular.cholesky_inverse_(padded[2 : n + 2, 1 : n + 1], base=4, panel=8)
    torch.testing.assert_close(inverse, torch.linalg.inv(M), rtol=1e-11, atol=1e-12)
    assert padded.isnan().sum() == padded.numel() - n * n


@pytest.mark.parametrize("n", [16, 33, 41])
def test_inverses_by_blocks_are_of_aligned_rows(n, monkeypatch):
    monkeypatch.setattr("surgeon_kernels.linalg.spd_inverse._blocked", lambda M: True)
    sides = []
    for name in ("cholesky_inverse_", "triangular_inverse_"):
        function = getattr(triangular, name)
        monkeypatch.setattr(
            f"surgeon_kernels.linalg.spd_inverse.{name}", lambda L, f=function: sides.append(len(L)) or f(L, base=4)
        )
    M = factor(n, "plain", n)
    expected = torch.linalg.inv(M)
    inverse, diagonal, good = inverse_and_diagonal(M)
    for found in (spd_inverse(M).inverse, unchecked_inverse(M), inverse):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
        assert torch.equal(found, found.T)
    for found in (diagonal, inverse_diagonal(M)[0]):
        torch.testing.assert_close(found, expected.diagonal(), rtol=1e-11, atol=1e-12)
    assert good and not inverse_diagonal(-M)[1]
    assert sides == [-(-n // 8) * 8] * 5


@pytest.mark.parametrize("condition", [1e3, 1e6])
def test_blocks_are_as_accurate_as_the_library(condition):
    M = with_condition(96, condition, 0)
    exact, L = torch.linalg.inv(M), torch.linalg.cholesky(M.float())
    error = relative_error(triangular.cholesky_inverse_(L.clone(), base=8, panel=16), exact)
    assert error < 2 * relative_error(torch.cholesky_inverse(L), exact) + 1e-6


def test_three_parts_of_eight_bits_hold_a_float32():
    x = torch.randn(33, 65, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 65)
    parts = split(x)
    assert parts.dtype == torch.bfloat16 and parts.shape == (3, 33, 65)
    assert ((parts.double().sum(0) - x.double()).abs() <= 2.0**-24 * x.abs()).all()
    assert torch.equal(split(x.T).transpose(1, 2), parts)
    assert split_reference(torch.zeros(0, 3)).shape == (3, 0, 3)


@pytest.mark.parametrize("run", [split_matmul.RUN, 64, 300])
@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
def test_products_of_parts_are_as_exact_as_float32(beta, run, monkeypatch):
    monkeypatch.setattr(split_matmul, "RUN", run)
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(40, 300, generator=generator), torch.randn(300, 20, generator=generator)
    before = torch.randn(40, 20, generator=generator)
    expected = beta * before.double() + 0.25 * A.double() @ B.double()
    out = before.clone() if beta else torch.full((40, 20), float("nan"))
    assert addmm_split_(out, split(A), split(B), beta=beta, alpha=0.25) is out
    assert relative_error(out, expected) < 2 * relative_error(beta * before + 0.25 * (A @ B), expected) + 1e-7


@pytest.mark.parametrize("fits", [False, True])
def test_products_by_either_way(fits, monkeypatch):
    monkeypatch.setattr(split_matmul, "_fits", lambda A, B: fits)
    A, B = torch.randn(7, 5, dtype=torch.float64).float(), torch.randn(5, 9)
    expected = A.double() @ B.double()
    assert relative_error(mm(A, B), expected) < 1e-6
    out = torch.full((7, 9), float("nan"))
    assert mm(A, B, out=out, alpha=-2.0) is out
    assert relative_error(out, -2 * expected) < 1e-6
    assert relative_error(mm(A.T, A), A.double().T @ A.double()) < 1e-6


def test_split_products_in_an_inverse(monkeypatch):
    monkeypatch.setattr(split_matmul, "_fits", lambda A, B: True)
    M = factor(64, "outlier", 0)
    inverse = triangular.cholesky_inverse_(torch.linalg.cholesky(M.float()), base=4, panel=16)
    assert relative_error(inverse, torch.linalg.inv(M)) < 1e-4


@pytest.mark.parametrize("kind", ["plain", "outlier", "deficient", "dead"])
def test_diagonal_of_the_inverse(kind):
    M = factor(11, kind, 3)
    diagonal, good = inverse_diagonal(M)
    assert bool(good)
    torch.testing.assert_close(diagonal, torch.linalg.inv(M).diagonal(), rtol=1e-9, atol=0)
    torch.testing.assert_close(unchecked_inverse(M), torch.linalg.inv(M), rtol=1e-8, atol=1e-8)
    both = inverse_and_diagonal(M)
    torch.testing.assert_close(both[0], torch.linalg.inv(M), rtol=1e-8, atol=1e-8)
    assert torch.equal(both[0], both[0].T) and torch.equal(both[1], diagonal) and bool(both[2])


def test_what_is_not_positive_definite_is_told_without_an_exception():
    assert not bool(inverse_diagonal(-torch.eye(3))[1])
    assert not bool(inverse_diagonal(torch.full((3, 3), float("nan")))[1])
    assert not bool(inverse_diagonal(torch.ones(4, 4))[1])
    assert not bool(inverse_and_diagonal(torch.ones(4, 4))[2])
    diagonal, good = inverse_diagonal(torch.zeros(0, 0))
    assert diagonal.shape == (0,) and bool(good)


def test_a_known_jitter_is_taken_as_it_is():
    M = factor(6, "plain", 0)
    known, found = spd_inverse(M, 0.1, jitter=1e-3), spd_inverse(M, 0.1 + 1e-3)
    assert known.jitter == 1e-3
    torch.testing.assert_close(known.damped, found.damped)
    torch.testing.assert_close(known.inverse, found.inverse)
