"""Time and error of damped inverses against ``cholesky_ex`` and ``cholesky_inverse``.

    python -m bench.kernels.spd_inverse --sizes 4096 11008 28672
    python -m bench.kernels.spd_inverse --tune --sizes 1024 2048 4096   # sides of blocks; nothing is recorded

Errors are ``‖X - M⁻¹‖ / ‖M⁻¹‖`` (Frobenius) against a float64 inverse, for a matrix whose eigenvalues are spread evenly
in logarithm from 1 down to 1 / condition. Rows are appended to results/spd_inverse.csv.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.environment import append_row, environment, require_gpu
from bench.timing import extra_bytes, warm_ms
from surgeon_kernels import inverse_diagonal, spd_inverse, unchecked_inverse
from surgeon_kernels.linalg.sweep_inverse import sweep_inverse, sweep_on_gpu_
from surgeon_kernels.linalg.sweep_inverse_triton import CONFIG, SweepConfig
from surgeon_kernels.linalg.triangular import cholesky_inverse_


def with_condition(n: int, condition: float) -> Tensor:
    """Float64 ``Q diag(eigenvalues) Qᵀ`` with ``Q`` a cosine transform between two flips of random signs."""
    i = torch.arange(n, dtype=torch.float64, device="cuda")
    Q = torch.outer(2 * i + 1, i).mul_(math.pi / (2 * n)).cos_().mul_(math.sqrt(2 / n))
    Q[:, 0] /= math.sqrt(2)
    Q *= torch.randint(0, 2, (n, 1), device="cuda") * 2.0 - 1.0
    eigenvalues = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64, device="cuda")
    eigenvalues = eigenvalues[torch.randperm(n, device="cuda")]
    return (Q * eigenvalues) @ Q.T


def library(M: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(M).L)


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "cholesky_ex": lambda M: torch.linalg.cholesky_ex(M).L,
    "cholesky_ex + cholesky_inverse": library,
    "unchecked_inverse": unchecked_inverse,
    "sweep_inverse": lambda M: sweep_inverse(M)[0],
    "spd_inverse": lambda M: spd_inverse(M).inverse,
    "inverse_diagonal": lambda M: inverse_diagonal(M)[0],
}


def relative_error(out: Tensor, exact: Tensor) -> float:
    exact = exact.diagonal() if out.dim() == 1 else exact
    return float((out.double() - exact).norm() / exact.norm())


def swept(M: Tensor, block: int, config: SweepConfig) -> None:
    blocks = [(start, min(start + block, len(M))) for start in range(0, len(M), block)]
    sweep_on_gpu_(M.clone(), blocks, torch.ones((), dtype=torch.bool, device="cuda"), config)


def tune(n: int, repeats: int) -> None:
    """Print the times of the library, of sweeps, and of sides of the blocks of surgeon_kernels/linalg/triangular.py."""
    M = with_condition(n, 1e3).float()
    print(f"{n}: library {warm_ms(partial(library, M), repeats):.3f} ms", flush=True)
    for config in (CONFIG, SweepConfig(128, 32, 8, 4), SweepConfig(64, 64, 4, 2)):
        for block in (256, 512, 1024):
            ms = warm_ms(partial(swept, M, block, config), repeats)
            print(f"    sweeps of {block} by {tuple(config)}: {ms:.3f} ms", flush=True)
    for base in (32, 64, 128):
        for panel in (1024, 2048, 4096):

            def blocked(M: Tensor, base: int = base, panel: int = panel) -> Tensor:
                return cholesky_inverse_(torch.linalg.cholesky_ex(M).L, base=base, panel=panel)

            print(f"    base {base}, panel {panel}: {warm_ms(partial(blocked, M), repeats):.3f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="time sides of blocks instead")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 5120, 11008, 13824])
    parser.add_argument("--conditions", type=float, nargs="+", default=[1e3, 1e6])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--largest-checked", type=int, default=16384, help="No float64 inverse of larger matrices.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "spd_inverse.csv")
    options = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    if options.tune:
        for n in options.sizes:
            tune(n, options.repeats)
        return
    about = environment("cuda")
    for n in options.sizes:
        for condition in options.conditions:
            exact = with_condition(n, condition)
            M = exact.float()
            exact = torch.cholesky_inverse(torch.linalg.cholesky(M.double())) if n <= options.largest_checked else exact
            for name, op in OPS.items():
                checked = n <= options.largest_checked and name != "cholesky_ex"
                row = {
                    "op": name,
                    "n": n,
                    "condition": f"{condition:g}",
                    "ms": f"{warm_ms(partial(op, M), options.repeats):.3f}",
                    "matrices": f"{extra_bytes(partial(op, M)) / M.nbytes:.2f}",
                    "error": f"{relative_error(op(M), exact):.2e}" if checked else "",
                    **about,
                }
                print(*row.values(), flush=True)
                append_row(options.out, row)
            del exact, M


if __name__ == "__main__":
    main()
