"""Checks the kernel of many Gram matrices in Triton's interpreter; run by test_interpreted.py in its own process."""

import torch

from surgeon_kernels.gram import gram_group_triton
from surgeon_kernels.gram.gram_rows_triton import gather_rows


def main() -> None:
    torch.manual_seed(0)
    for tokens in (1, 150, 320):
        products = [(40, False), (64, True), (130, True), (200, False), (1, True)]
        xs = [gather_rows(torch.randn(tokens, columns).half(), None) for columns, _ in products]
        outs = [
            torch.full((columns + ones, columns + ones + 2), 2.0)[:, : columns + ones] for columns, ones in products
        ]
        fits = [gram_group_triton.fits(out, x) for out, x in zip(outs, xs, strict=True)]
        assert fits == [columns >= gram_group_triton.LEAST_COLUMNS for columns, _ in products]
        gram_group_triton.accumulate_(outs, xs, [ones for _, ones in products], 0.5, (64, 32, 4, 2))
        for x, out, (_, ones) in zip(xs, outs, products, strict=True):
            rows = torch.cat([x.double(), torch.ones(tokens, int(ones))], dim=1)
            expected = (2.0 + 0.5 * rows.T @ rows).tril()
            torch.testing.assert_close(
                out.double().tril(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
            )
    print("agrees")


if __name__ == "__main__":
    main()
