"""Checks the kernels of diag(X S Xᵀ) in Triton's interpreter; run by test_interpreted.py on its own.

The interpreter does not cut operands to TF32 as tensor cores do: the kernel's sums, term by term, are what is checked.
"""

import torch

from surgeon_kernels.linalg import quadratic_form_triton
from surgeon_kernels.linalg.quadratic_form_triton import Config, launch


def cut(x):
    return (x.view(torch.int32) & -0x2000).view(torch.float32)


def nearest(x):
    return cut((x.view(torch.int32) + 0x1000).view(torch.float32))


def uncut_sums(x, S, block):
    """The kernel's sums: over blocks of columns on and above the diagonal, x on the left, 2 x - cut(x) on the right."""
    block_of = torch.arange(x.shape[1]) // block
    terms = nearest(S).double() * (1 + (block_of[None, :] - block_of[:, None]).sign())
    return ((x.double() @ terms.T) * (2.0 * x.double() - cut(x))).sum(dim=1)


def main() -> None:
    torch.manual_seed(0)
    for rows, columns, config in [(40, 52, Config(16, 32, 16, 4, 2)), (150, 37, Config(16, 16, 16, 4, 2))]:
        x, y = torch.randn(rows, columns), torch.randn(columns, columns)
        S = y @ y.T
        S[0, 1] = S[1, 0] = 1.0 + 2.0**-11  # halfway between two numbers of TF32
        quadratic_form_triton._STRIP_BYTES = 1  # one band of 128 rows: the second matrix is copied in two strips
        for view in (x, x.T.contiguous().T, torch.cat([x, x[:, :1]], dim=1)[:, :-1]):
            torch.testing.assert_close(
                launch(view, S, config).double(), uncut_sums(x, S, config.block_c), rtol=1e-5, atol=0.0
            )
    # Of numbers of TF32 nothing is cut: these sums are exact.
    x, S = cut(x), nearest(S)
    exact = ((x.double() @ S.double()) * x).sum(dim=1)
    torch.testing.assert_close(launch(x, S, config).double(), exact, rtol=1e-5, atol=0.0)
    S[2, 3] = S[3, 2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # NaN as CUDA writes it
    assert bool(launch(x, S, config).isnan().all())
    print("agrees")


if __name__ == "__main__":
    main()
