"""The joint solver on a CUDA device: time of an iteration against its product and against plain PyTorch; whole solves.

    python -m bench.kernels.joint_update           # every shape, appended to results/joint_update.csv
    python -m bench.kernels.joint_update --tune    # launch configurations of the passes; nothing is recorded

``product`` is the iteration's two float16 matrix products alone, ``passes`` the kernels alone, ``torch`` the same
iteration in PyTorch calls with TF32 products, ``exact_product`` a product as exact as in float32; ``corrected`` is an
iteration with the low-rank correction, ``correction`` the time to make that; ``floor`` counts the
products at a measured rate and the passes' bytes at a measured bandwidth. ``workspace`` is the solve's peak beyond its
inputs, in matrices of the weight's size. Times are medians, of what has run before.
Factors have spectra that fall as k^-1 (A) and k^-0.5 (G), damped as by default, half of the weights go as 2:4.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.environment import append_row, environment, require_gpu
from bench.timing import extra_bytes, warm_ms
from surgeon_kernels import joint_update, nm_select, spd_inverse
from surgeon_kernels.linalg.kron_product import kron_product
from surgeon_kernels.linalg.low_rank import leading_vectors, low_rank_correction
from surgeon_kernels.linalg.masked_cg import FusedCG, MaskedCG

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
# Rate of half-precision products (8192^3) and bandwidth of copies, measured on an H200 (torch 2.11).
HALF, BANDWIDTH = 685e12, 4.2e12
_BYTES = 35  # an iteration's passes, for each entry
_ITERATIONS = 20


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, ...]:
    """``(weight, pruned, G, A, G_inv, A_inv)``."""
    torch.manual_seed(seed)
    g, a = (
        spd_inverse(_power_law(n, power), damping) for n, power, damping in ((rows, 0.5, 0.1), (columns, 1.0, 0.01))
    )
    weight = 0.02 * torch.randn(rows, columns, device="cuda")
    pruned = nm_select(weight**2 / torch.outer(g.inverse.diagonal(), a.inverse.diagonal()), 2, 4)
    return weight, pruned, g.damped, a.damped, g.inverse, a.inverse


def _power_law(n: int, power: float) -> Tensor:
    """Covariance of samples whose independent components have variances k^-power, mixed at random."""
    x = torch.randn(n, n, device="cuda") / n**0.5
    x = x * torch.arange(1, n + 1, device="cuda") ** (-power / 2)
    return x @ x.T


def iteration_times(inputs: tuple[Tensor, ...], iterations: int = _ITERATIONS) -> dict[str, float]:
    """Milliseconds of one iteration: with the kernels, in PyTorch calls, and of its product alone."""
    weight, pruned, G, A, G_inv, A_inv = inputs
    terms, residual = [(G_inv, A_inv)], weight.masked_fill(~pruned, 0.0)
    correction = low_rank_correction(leading_vectors(G, G_inv), leading_vectors(A, A_inv), pruned)
    corrected = FusedCG(terms, pruned, residual.clone(), correction)
    fused, plain = FusedCG(terms, pruned, residual.clone()), MaskedCG(terms, pruned, residual)

    def products() -> None:
        for _ in range(iterations):
            fused._multiply()

    times = {
        "fused_ms": warm_ms(lambda: fused.run(iterations)) / iterations,
        "corrected_ms": warm_ms(lambda: corrected.run(iterations)) / iterations,
        "correction_ms": warm_ms(
            lambda: low_rank_correction(leading_vectors(G, G_inv), leading_vectors(A, A_inv), pruned)
        ),
        "torch_ms": warm_ms(lambda: _in_tf32(lambda: plain.run(iterations))) / iterations,
        "product_ms": warm_ms(products) / iterations,
        "passes_ms": _passes_ms(fused, iterations),
        "exact_product_ms": warm_ms(lambda: kron_product(G_inv, weight, A_inv)),
    }
    return times


def _in_tf32(run: Callable[[], object]) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        run()
    finally:
        torch.set_float32_matmul_precision("highest")


def _passes_ms(fused: FusedCG, iterations: int) -> float:
    fused._multiply = lambda: None  # type: ignore[method-assign]
    return warm_ms(lambda: fused.run(iterations)) / iterations


def measure(rows: int, columns: int) -> dict[str, object]:
    inputs = problem(rows, columns)
    times = iteration_times(inputs)
    floor = 2 * rows * columns * (rows + columns) / HALF + _BYTES * rows * columns / BANDWIDTH
    solved = joint_update(*inputs)
    peak = extra_bytes(lambda: joint_update(*inputs))
    return {
        "rows": rows,
        "columns": columns,
        **{key: f"{value:.3f}" for key, value in times.items()},
        "floor_ms": f"{1e3 * floor:.3f}",
        "passes_tb_s": f"{_BYTES * rows * columns / times['passes_ms'] / 1e9:.2f}",
        "solve_ms": f"{warm_ms(lambda: joint_update(*inputs)):.1f}",
        "iterations_dual": len(solved.bound) - 1,
        "iterations_kept": len(solved.objective) - 1,
        "certified_gap": f"{solved.gap:.5f}",
        "workspace_matrices": f"{peak / inputs[0].nbytes:.1f}",
        **environment("cuda"),
    }


def tune() -> None:
    for rows, columns in SHAPES[:2]:
        weight, pruned, _, _, G_inv, A_inv = problem(rows, columns)
        residual = weight.masked_fill(~pruned, 0.0)
        for block, warps in ((512, 4), (1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8)):
            for resident in (2, 4, 8):
                solver = FusedCG(
                    [(G_inv, A_inv)], pruned, residual.clone(), resident=resident, block=block, warps=warps
                )
                solver.run(1)
                ms = _passes_ms(solver, _ITERATIONS)
                rate = _BYTES * rows * columns / ms / 1e9
                print(
                    f"{rows} x {columns} block {block} warps {warps} resident {resident}: {ms:.4f} ms {rate:.2f} TB/s"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "joint_update.csv")
    options = parser.parse_args()
    require_gpu()
    if options.tune:
        tune()
        return
    for rows, columns in SHAPES:
        row = measure(rows, columns)
        append_row(options.out, row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
