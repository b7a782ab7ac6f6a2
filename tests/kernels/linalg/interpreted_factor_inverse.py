"""Checks inverses of factors in Triton's interpreter; run by test_interpreted.py in a process of its own."""

import torch

from surgeon_kernels.linalg.factor_inverse_triton import factor_inverse
from tests.kernels.dense import with_condition


def main() -> None:
    for n in (1, 20, 64, 75):
        larger = torch.full((n + 3, n + 5), float("nan"))
        M = with_condition(max(n, 2), 100.0, n)[:n, :n]
        larger[1 : n + 1, 2 : n + 2] = M.float().tril() + torch.full((n, n), float("nan")).triu(1)
        X = factor_inverse(larger[1 : n + 1, 2 : n + 2])
        expected = torch.linalg.inv(torch.linalg.cholesky(M))
        torch.testing.assert_close(X.double(), expected, rtol=1e-4, atol=1e-4)
        assert not X.triu(1).any()
    M[40, 40] = -1.0
    assert not factor_inverse(M.float()).diagonal().isfinite().all()
    print("agrees")


if __name__ == "__main__":
    main()
