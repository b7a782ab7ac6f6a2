"""Checks the sweep's kernel in Triton's interpreter; run by test_interpreted.py in a process of its own.

With float16 numbers for the first part and nothing in the others: the interpreter's bfloat16 products are wrong.
"""

import torch

from surgeon_kernels.linalg.sweep_inverse import sweep_reference_
from surgeon_kernels.linalg.sweep_inverse_triton import SweepConfig, sweep_


def main() -> None:
    torch.manual_seed(0)
    config, block = SweepConfig(32, 32, 4, 2), 64
    for n in (64, 150, 200):
        tiles = -(-n // config.side)
        for start in range(0, n, block):
            end = min(start + block, n)
            U, W = torch.randn(n, end - start).half(), torch.randn(n, n)
            parts = torch.zeros(3, tiles * config.side, block, dtype=torch.float16)
            parts[0, :n, : end - start] = U
            expected = W.clone()
            sweep_reference_(expected, U.float(), start, end)
            first, width = (end // config.side, -(-min(block, n - end) // config.side)) if end < n else (tiles, 0)
            for of_next in (True, False):
                sweep_(parts, W, (start, end), (first, width), config, of_next=of_next)
            torch.testing.assert_close(W.tril(), expected.tril(), rtol=1e-5, atol=1e-4)
    print("agrees")


if __name__ == "__main__":
    main()
