import pytest
import torch

from surgeon_kernels import SymmetricAccumulator, gram_accumulate_
from surgeon_kernels.gram.gram import packed_gram_reference_
from surgeon_kernels.gram.symmetric_layout import PACKED_FROM, TILE

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZES = [1, 127, 128, 129, 300, 3 * TILE]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accumulates_what_a_dense_matrix_would(n, packed, dtype):
    x, y = randn(40, n), randn(2, 3, n, seed=1)
    mask = randn(2, 3, seed=2) < 0.5
    out = SymmetricAccumulator.zeros(n, dtype=dtype, packed=packed)
    assert gram_accumulate_(out, x) is out
    gram_accumulate_(out, y, mask=mask, alpha=-0.5)
    expected = x.T @ x - 0.5 * y[mask].T @ y[mask]
    full = out.full()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(full.double(), expected, rtol=tolerance, atol=tolerance)
    assert full.dtype == dtype
    assert torch.equal(out.diagonal(), full.diagonal())
    assert torch.equal(full, full.T)


@pytest.mark.parametrize("panel", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [5 * TILE, 4 * TILE + 9])
def test_panels_of_tiles(n, panel):
    x, out = randn(40, n), SymmetricAccumulator.zeros(n, dtype=torch.float64, packed=True)
    out.storage.fill_(1.0)
    packed_gram_reference_(out.storage, x, 0.5, panel=panel)
    torch.testing.assert_close(out.full(), 1.0 + 0.5 * x.T @ x)


def test_a_column_of_ones():
    x, mask = randn(50, TILE), randn(50, seed=1) < 0
    out = gram_accumulate_(
        SymmetricAccumulator.zeros(TILE + 1, dtype=torch.float64, packed=True), x, mask=mask, ones_column=True
    )
    ones = torch.cat([x[mask], torch.ones(int(mask.sum()), 1)], dim=1)
    torch.testing.assert_close(out.full(), ones.T @ ones)


@pytest.mark.parametrize("n", [0, 1, PACKED_FROM - 1, PACKED_FROM, PACKED_FROM + 1])
def test_large_matrices_are_packed(n):
    out = SymmetricAccumulator.zeros(n)
    assert out.packed == (n >= PACKED_FROM)
    assert out.nbytes == 4 * SymmetricAccumulator.elements(n)
    assert out.full().shape == (n, n)
    assert out.diagonal().shape == (n,)


@pytest.mark.parametrize("n", [0, 1, PACKED_FROM - 1, PACKED_FROM, PACKED_FROM + 1])
@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])])
def test_of_a_matrix(n, column_major, device):
    matrix = randn(n, n, dtype=torch.float32).to(device)
    matrix = matrix + matrix.T
    if column_major:  # as the library's Cholesky factors are
        matrix = matrix.T.contiguous().T
    out = SymmetricAccumulator.of(matrix)
    assert out.n == n and out.packed == (n >= PACKED_FROM)
    assert out.nbytes == 4 * SymmetricAccumulator.elements(n) and out.storage.is_contiguous()
    assert torch.equal(out.full(), matrix) and torch.equal(out.diagonal(), matrix.diagonal())
    matrix.zero_()
    assert n == 0 or out.diagonal().ne(0).any()  # a copy


def test_packed_storage_is_about_half():
    assert SymmetricAccumulator.elements(11008) == 86 * 87 // 2 * TILE**2 < 0.51 * 11008**2


def test_only_the_lower_triangle_is_read():
    n = 200
    out = SymmetricAccumulator.zeros(n, packed=True)
    out.storage.fill_(float("nan"))
    for r in range(n):
        for start in range(0, r + 1, TILE):
            i, j = r // TILE, start // TILE
            stop = min(start + TILE, r + 1)
            out.storage[i * (i + 1) // 2 + j, r % TILE, : stop - start] = torch.arange(start, stop) + 1000.0 * r
    r, c = torch.arange(n)[:, None], torch.arange(n)[None, :]
    expected = 1000.0 * torch.maximum(r, c) + torch.minimum(r, c)
    assert torch.equal(out.full(), expected)
    out = SymmetricAccumulator(n, expected.masked_fill(c > r, float("nan")))
    assert torch.equal(out.full(), expected)


def test_what_is_full_or_diagonal_is_a_copy():
    for packed in (False, True):
        out = gram_accumulate_(SymmetricAccumulator.zeros(5, packed=packed), randn(3, 5))
        before = out.full()
        out.full().zero_()
        out.diagonal().zero_()
        assert torch.equal(out.full(), before)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[4, 4\]"):
        gram_accumulate_(SymmetricAccumulator.zeros(5), randn(3, 4))
    with pytest.raises(ValueError, match="float16"):
        gram_accumulate_(SymmetricAccumulator.zeros(4, dtype=torch.float16), randn(3, 4))
