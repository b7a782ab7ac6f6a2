"""Checks the Gram kernels in Triton's interpreter; run by test_interpreted.py in a process of its own."""

import itertools

import torch

from surgeon_kernels import SymmetricAccumulator
from surgeon_kernels.gram import gram_rows_triton, gram_triton, symmetric_triton
from surgeon_kernels.gram.plan import GramConfig

# Columns, rows, block_n, and how many blocks are computed in parts, where runs are added to the output and where not.
SHAPES = [(300, 170, 256, 0, 0), (135, 90, 128, 3, 0), (100, 170, 128, 1, 1)]


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
    for (columns, tokens, block_n, *parted), dtype, descriptors, in_registers in itertools.product(
        SHAPES, (torch.float32, torch.float16), (True, False), (True, False)
    ):
        config = GramConfig(128, block_n, 32, 4, 2, 1, descriptors, "ieee", 2, in_registers, step=20.0)
        x = torch.randn(tokens, columns + 5).to(dtype)[:, 3 : columns + 3]
        mask = torch.rand(tokens) < 0.6
        for masked, ones_column in ((mask, True), (None, False)):
            poisoned = x if masked is None else x.masked_fill(~mask[:, None], float("nan"))
            n = columns + ones_column
            rows = gram_rows_triton.gather_rows(poisoned, masked)
            assert gram_triton.readable(rows) and rows.shape == x.shape
            expected = 2.0 + 0.5 * exact(x, masked, ones_column)
            plans = [gram_triton.plan(columns, tokens, dtype, packed, config, rows.device) for packed in (True, False)]
            assert [plan.reduction_count for plan in plans] == [parted[in_registers]] * 2

            packed = SymmetricAccumulator.zeros(n, packed=True)
            packed.storage.fill_(2.0)
            gram_triton.accumulate_(packed.storage, rows, 0.5, plans[0])
            if ones_column:
                gram_rows_triton.add_column_sums_(packed.storage, rows, masked, 0.5, packed=True)
            check(packed.full(), expected)
            assert torch.equal(symmetric_triton.unpack(packed.storage, n), packed.full())

            dense = torch.full((n, n + 3), 2.0)[:, :n]
            gram_triton.accumulate_(dense, rows, 0.5, plans[1])
            if ones_column:
                gram_rows_triton.add_column_sums_(dense, rows, masked, 0.5, packed=False)
            check(SymmetricAccumulator(n, dense).full(), expected)
            symmetric_triton.mirror_(dense)
            check(dense, expected)
            assert torch.equal(dense, dense.T)
    x = torch.randn(70, 260)[:, :256]
    packed = SymmetricAccumulator.zeros(257, packed=True)
    gram_triton.accumulate_(packed.storage, x, 0.5, gram_triton.plan(256, 70, x.dtype, True, config, x.device))
    gram_rows_triton.add_column_sums_(packed.storage, x, None, 0.5, packed=True)
    check(packed.full(), 0.5 * exact(x, None, True))
    transposed = torch.randn(130, 40).T
    assert not gram_triton.readable(transposed)
    assert torch.equal(gram_rows_triton.gather_rows(transposed, None), transposed)
    print("agrees")


if __name__ == "__main__":
    main()
