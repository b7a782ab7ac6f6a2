"""Blocked inverses on a GPU against float64."""

import pytest
import torch

from surgeon_kernels import (
    NotPositiveDefiniteError,
    damp,
    inverse_and_diagonal,
    inverse_diagonal,
    spd_inverse,
    unchecked_inverse,
)
from surgeon_kernels.linalg import spd_inverse as of_spd
from surgeon_kernels.linalg.split_matmul import addmm_split_, split, split_reference
from surgeon_kernels.linalg.sweep_inverse import sweep_inverse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def spd(n, samples, seed=0, outlier=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(samples, n, device="cuda", dtype=torch.float64, generator=generator)
    x = x + x.roll(1, dims=1)
    x[:, n // 2] *= outlier
    M = x.T @ x / samples
    return damp(M, 1e-3)


def error(out, exact):
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("n", [1500, 2048, 2049, 3000, 4096, 5000])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_inverse_is_as_accurate_as_the_library(n, outlier):
    M = spd(n, 2 * n, outlier=outlier)
    exact = torch.linalg.inv(M)
    single = M.float()
    library = error(torch.cholesky_inverse(torch.linalg.cholesky(single)), exact)
    result = spd_inverse(single)
    assert result.jitter == 0.0 and torch.equal(result.inverse, result.inverse.T)
    assert error(result.inverse, exact) < 2 * library + 1e-6
    assert torch.equal(unchecked_inverse(single), result.inverse)
    diagonal, good = inverse_diagonal(single)
    assert bool(good)
    assert error(diagonal, exact.diagonal()) < 2 * library + 1e-6
    both = inverse_and_diagonal(single)
    assert error(both[0], exact) < 2 * library + 1e-6 and torch.equal(both[0], both[0].T)
    assert torch.equal(both[1], diagonal) and bool(both[2])


@pytest.mark.parametrize("n", [500, 2049, 3000, 4096])
@pytest.mark.parametrize("block", [256, 512])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_sweeps_are_as_accurate_as_the_library(n, block, outlier):
    M = spd(n, 2 * n, outlier=outlier)
    exact, single = torch.linalg.inv(M), M.float()
    library = error(torch.cholesky_inverse(torch.linalg.cholesky(single)), exact)
    inverse, good = sweep_inverse(single, block=block)
    assert bool(good) and torch.equal(inverse, inverse.T)
    assert error(inverse, exact) < 2 * library + 1e-6
    assert torch.equal(sweep_inverse(single, block=block)[0], inverse)
    assert not bool(sweep_inverse(-single, block=block)[1])


def test_inverses_by_sweeps(monkeypatch):
    monkeypatch.setattr(of_spd, "_SWEPT", (2048, 4096))
    M = spd(2501, 5000).float()
    expected, good = sweep_inverse(M)
    assert bool(good)
    result = spd_inverse(M)
    assert result.jitter == 0.0 and torch.equal(result.inverse, expected)
    assert torch.equal(unchecked_inverse(M), expected)
    diagonal, good = inverse_diagonal(M)
    assert bool(good) and torch.equal(diagonal, expected.diagonal())
    both = inverse_and_diagonal(M)
    assert torch.equal(both[0], expected) and torch.equal(both[1], diagonal) and bool(both[2])
    assert 0.0 < spd_inverse(torch.ones(2048, 2048, device="cuda")).jitter <= 1e-3


def test_jitter_escalates_and_nothing_is_nan():
    M = torch.ones(2048, 2048, device="cuda")
    result = spd_inverse(M)
    assert 0.0 < result.jitter <= 1e-3 and bool(result.inverse.isfinite().all())
    with pytest.raises(NotPositiveDefiniteError):
        spd_inverse(-M)


@pytest.mark.parametrize("n", [2048, 3000, 4096])
def test_at_most_one_more_matrix(n):
    M = spd(n, 2 * n).float()
    unchecked_inverse(M)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    unchecked_inverse(M)
    assert torch.cuda.max_memory_allocated() - before <= 2.05 * M.nbytes


@pytest.mark.parametrize("shape", [(3, 5), (1024, 2048), (1000, 777)])
def test_split_is_the_reference(shape):
    x = torch.randn(*shape, device="cuda") * 1e3
    for matrix in (x, x.T, x[:, 1:], x[::2]):
        assert torch.equal(split(matrix), split_reference(matrix))


def test_split_products_have_the_accuracy_of_float32():
    generator = torch.Generator("cuda").manual_seed(0)
    A, B = (torch.randn(*shape, device="cuda", generator=generator) for shape in ((1500, 3000), (3000, 1100)))
    exact = A.double() @ B.double()
    out = torch.full((1500, 1100), float("nan"), device="cuda")
    assert error(addmm_split_(out, split(A), split(B)), exact) < 4 * error(A @ B, exact)
