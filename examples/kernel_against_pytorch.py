"""One op beside PyTorch: a Gram product that is added to in place, its error against float64, and the time of both.

python examples/kernel_against_pytorch.py --tokens 16384 --width 4096
"""

import argparse
import time
from collections.abc import Callable

import torch

from surgeon_kernels import SymmetricAccumulator, gram_accumulate_


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Median of ten runs after two."""
    times = []
    for _ in range(12):
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    return sorted(times[2:])[5]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384 if device == "cuda" else 1024)
    parser.add_argument("--width", type=int, default=4096 if device == "cuda" else 256)
    options = parser.parse_args()

    torch.manual_seed(0)
    x = torch.randn(options.tokens, options.width, device=device).to(
        torch.bfloat16 if device == "cuda" else torch.float32
    )
    exact = x.double().T @ x.double()

    A = SymmetricAccumulator.zeros(options.width, dtype=torch.float32, device=torch.device(device))
    gram_accumulate_(A, x)
    theirs = (x.T @ x).float()
    for name, found in (("surgeon_kernels", A.full()), ("torch", theirs)):
        print(f"{name:16} relative error {float((found - exact).norm() / exact.norm()):.2e}")

    out = torch.zeros(options.width, options.width, device=device)
    print(f"surgeon_kernels  {milliseconds(lambda: gram_accumulate_(A, x), device):.3f} ms")
    print(f"torch            {milliseconds(lambda: out.add_(x.T @ x), device):.3f} ms")


if __name__ == "__main__":
    main()
