"""Checks the kernel of diag(X S Xᵀ) in Triton's interpreter; run by test_quadratic_form_interpreted.py on its own."""

import torch

from surgeon_kernels.quadratic_form_triton import Config, launch


def main() -> None:
    torch.manual_seed(0)
    for rows, columns in [(40, 52), (33, 65)]:
        x, y = torch.randn(rows, columns), torch.randn(columns, columns)
        S = y @ y.T
        expected = ((x.double() @ S.double()) * x.double()).sum(dim=1)
        for config in (Config(16, 32, 16, 4, 2), Config(32, 16, 16, 4, 2)):
            for view in (x, x.T.contiguous().T, torch.cat([x, x[:, :1]], dim=1)[:, :-1]):
                q = launch(view, S, config)
                torch.testing.assert_close(q.double(), expected, rtol=1e-5, atol=0.0)
    print("agrees")


if __name__ == "__main__":
    main()
