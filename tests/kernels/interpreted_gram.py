"""Checks the Gram kernels in Triton's interpreter; run by test_gram_interpreted.py in a process of its own."""

import itertools

import torch

from surgeon_kernels import SymmetricAccumulator, gram_triton, symmetric_triton
from surgeon_kernels.gram_plan import GramConfig

SHAPES = [(300, 170, 256), (135, 33, 128)]  # columns, rows, block_n


def exact(x: torch.Tensor, mask: torch.Tensor | None, ones_column: bool) -> torch.Tensor:
    rows = x.double()
    if ones_column:
        rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    rows = rows if mask is None else rows[mask]
    return rows.T @ rows


def check(out: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def main() -> None:
    torch.manual_seed(0)
    for (columns, tokens, block_n), dtype, descriptors in itertools.product(
        SHAPES, (torch.float32, torch.float16), (True, False)
    ):
        config = GramConfig(128, block_n, 32, 4, 2, 1, descriptors, "ieee", run=2)
        x = torch.randn(tokens, columns + 5).to(dtype)[:, 3 : columns + 3]
        mask = torch.rand(tokens) < 0.6
        for masked, ones_column in ((mask, True), (None, False)):
            poisoned = x if masked is None else x.masked_fill(~mask[:, None], float("nan"))
            n = columns + ones_column
            rows = gram_triton.gather_rows(poisoned, masked, ones_column)
            assert not rows[:, n:].any()
            assert gram_triton.readable(rows)
            expected = 2.0 + 0.5 * exact(x, masked, ones_column)

            packed = SymmetricAccumulator.zeros(n, packed=True)
            packed.storage.fill_(2.0)
            gram_triton.accumulate_(packed.storage, n, rows[:, :n], 0.5, config, packed=True)
            check(packed.full(), expected)
            assert torch.equal(symmetric_triton.unpack(packed.storage, n), packed.full())

            dense = torch.full((n, n + 3), 2.0)[:, :n]
            gram_triton.accumulate_(dense, n, rows[:, :n], 0.5, config, packed=False)
            symmetric_triton.mirror_(dense)
            check(dense, expected)
            assert torch.equal(dense, dense.T)
    transposed = torch.randn(130, 40).T
    assert not gram_triton.readable(transposed)
    assert torch.equal(gram_triton.gather_rows(transposed, None, False)[:, :130], transposed)
    print("agrees")


if __name__ == "__main__":
    main()
