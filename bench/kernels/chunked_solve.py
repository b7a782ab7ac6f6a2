"""Chunked solves and sequential chunked updates against PyTorch, on a CUDA device.

    python -m bench.kernels.chunked_solve        # every case, appended to results/chunked_solve.csv
    python -m bench.kernels.chunked_solve --rows 4096 256 --reference-rows 256   # its reference on 256 rows only

A solve is gather + ``cholesky_ex`` + ``cholesky_solve`` in PyTorch; the chunks are runs of a 2:4 pruned layer, or for
``condition`` rows of a matrix of that condition number. An update is the package's own PyTorch reference. Times are
medians of plain calls, four one after the other. Residuals are ``|S x - b| / |b|`` of 64 chunks together,
in float64. The roofline is ``K³ / 3`` operations a chunk at a third of the vendor's dense tf32 rate.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.environment import append_row, environment, require_gpu
from bench.timing import eager_ms
from surgeon_kernels import chunked_solve, spd_inverse
from surgeon_kernels.updates import chunked_update as update

DEVICE = "cuda"
R, C = 4096, 11008
ROOFLINE = 494.7e12 / 3  # H100 and H200 (SXM), NVIDIA's datasheet
CASES = [(64, 4096), (128, 4096), (192, 4096), (512, 1024), (1024, 512), (2048, 128)]
CASES += [(1, 4096), (32, 4096), (256, 4096), (2000, 1), (64, 352256)]


def inverse_factor(n: int) -> Tensor:
    """The inverse of a damped Gram matrix of correlated samples."""
    x = torch.randn(n, n, device=DEVICE) * torch.logspace(0, -1, n, device=DEVICE)
    x = x + x.roll(1, dims=1)
    return spd_inverse(x.T @ x / n, 0.01).inverse


def pruned_2_4(rows: int, columns: int) -> Tensor:
    order = torch.rand(rows, columns // 4, 4, device=DEVICE).argsort(dim=-1)
    return (order < 2).view(rows, columns)


def torch_solve(G_inv: Tensor, A_inv: Tensor, rows: Tensor, columns: Tensor, target: Tensor) -> Tensor:
    """All of one size: indices and target [B, K]."""
    S = G_inv[rows[:, :, None], rows[:, None, :]] * A_inv[columns[:, :, None], columns[:, None, :]]
    return torch.cholesky_solve(target[..., None], torch.linalg.cholesky_ex(S).L)[..., 0]


def residual(G_inv: Tensor, A_inv: Tensor, rows: Tensor, columns: Tensor, target: Tensor, x: Tensor) -> float:
    rest = total = 0.0
    for b in range(0, len(target), -(-len(target) // 64)):
        r, c = rows[b], columns[b]
        S = G_inv[r[:, None], r].double() * A_inv[c[:, None], c].double()
        rest += float((S @ x[b].double() - target[b]).square().sum())
        total += float(target[b].double().square().sum())
    return float((rest / total) ** 0.5)


def solve_row(
    name: str, G_inv: Tensor, A_inv: Tensor, rows: Tensor, columns: Tensor, repetitions: int
) -> dict[str, Any]:
    B, K = rows.shape
    target = torch.randn(B, K, device=DEVICE)
    offsets = torch.arange(B + 1) * K
    flat = rows.flatten(), columns.flatten(), offsets, target.flatten()

    def kernel() -> Tensor:
        return chunked_solve(G_inv, A_inv, *flat)[0].view(B, K)

    def baseline() -> Tensor:
        return torch.cat([torch_solve(G_inv, A_inv, *part) for part in zip(*parts, strict=True)])

    # PyTorch's batched Cholesky holds all systems at once: a number that fits.
    parts = [x.split(max(1, (4 << 30) // (4 * K * K))) for x in (rows, columns, target)]
    errors = [residual(G_inv, A_inv, rows, columns, target, run()) for run in (kernel, baseline)]
    again = kernel()
    torch.cuda.synchronize()
    assert torch.equal(again, kernel())
    ours, theirs = eager_ms([kernel] * 4, repetitions), eager_ms([baseline] * 4, max(3, repetitions // 3))
    operations = B * K**3 / 3
    return {
        "case": name,
        "K": K,
        "chunks": B,
        "torch_ms": f"{theirs:.3f}",
        "kernel_ms": f"{ours:.3f}",
        "speedup": f"{theirs / ours:.2f}",
        "tflops": f"{operations / ours / 1e9:.2f}",
        "roofline_percent": f"{100 * operations / ROOFLINE / ours * 1e3:.1f}",
        "residual": f"{errors[0]:.2e}",
        "torch_residual": f"{errors[1]:.2e}",
    }


def conditioned(K: int, condition: float, chunks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Systems of that condition number: whole rows of one matrix, each scaled."""
    Q = torch.linalg.qr(torch.randn(K, K, device=DEVICE, dtype=torch.float64)).Q
    A_inv = (Q * torch.logspace(0, -1, K, base=condition, device=DEVICE, dtype=torch.float64)) @ Q.T
    G_inv = torch.diag(torch.rand(chunks, device=DEVICE) + 0.5)
    rows = torch.arange(chunks, device=DEVICE)[:, None].expand(chunks, K).contiguous()
    return G_inv, ((A_inv + A_inv.T) / 2).float(), rows, torch.arange(K, device=DEVICE).expand(chunks, K).contiguous()


def update_row(rows: int, m: int, G_inv: Tensor, A_inv: Tensor, reference: bool) -> dict[str, Any]:
    weight, pruned = torch.randn(rows, C, device=DEVICE) / 64, pruned_2_4(rows, C)
    arguments = weight, pruned, G_inv[:rows, :rows].contiguous(), A_inv
    theirs = error = float("nan")

    def run() -> Tensor:
        return update.chunked_update(*arguments, max_correlated=m).delta

    by_kernel = run()
    ours = eager_ms([run], 1 if rows > 2048 else 3)
    if reference:
        rule, update.uses_extension = update.uses_extension, lambda x: False
        results: list[Tensor] = []
        theirs = eager_ms([lambda: results.append(run())], 1)
        error = float((results[0] - by_kernel).norm() / by_kernel.norm())
        update.uses_extension = rule
    return {
        "case": f"sequential update of {rows} x {C}, 2:4",
        "K": m,
        "chunks": rows * -(-(C // 2) // m),
        "torch_ms": f"{theirs:.1f}",
        "kernel_ms": f"{ours:.1f}",
        "speedup": f"{theirs / ours:.2f}",
        "tflops": "",
        "roofline_percent": "",
        "residual": f"{error:.2e}",
        "torch_residual": "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[R], help="rows of the sequential update's layer")
    parser.add_argument("--reference-rows", type=int, default=R, help="most rows that the reference is timed on")
    parser.add_argument("--only", choices=["solves", "conditions", "updates"], help="part of the cases")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "chunked_solve.csv")
    options = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    about = environment(DEVICE)

    def record(row: dict[str, Any]) -> None:
        print(*row.values(), flush=True)
        append_row(options.out, {**row, **about})

    if options.only in (None, "conditions"):
        for K, condition in ((64, 1e6), (192, 1e6), (512, 1e6), (2048, 1e6), (2048, 1e3)):
            record(solve_row(f"condition {condition:g}", *conditioned(K, condition, 16), 3))
    if options.only == "conditions":
        return
    G_inv, A_inv = inverse_factor(R), inverse_factor(C)
    if options.only in (None, "solves"):
        positions = pruned_2_4(R, C).nonzero()
        for K, chunks in CASES:
            rows, columns = positions[: K * chunks].T.reshape(2, chunks, K).contiguous()
            record(solve_row("2:4", G_inv, A_inv, rows, columns, 9))
    if options.only in (None, "updates"):
        for rows in options.rows:
            record(update_row(rows, 2000, G_inv, A_inv, rows <= options.reference_rows))


if __name__ == "__main__":
    main()
