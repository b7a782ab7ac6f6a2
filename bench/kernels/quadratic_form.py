"""``diag(X S Xᵀ)``, the sums of row and column costs, against ``((X @ S) * X).sum(1)`` in TF32.

    python -m bench.kernels.quadratic_form            # appended to results/quadratic_form.csv
    python -m bench.kernels.quadratic_form --tune     # launch configurations; nothing is recorded

Times are medians of CUDA graph replays. Errors are relative norms against float64, and the mean of the relative errors,
sign and all. TFLOP/s count the products that have to be made, R C (C + 1) multiplications and additions. Memory is what
is allocated beyond the operands.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.environment import append_row, environment, require_gpu
from bench.timing import extra_bytes, graph_ms
from surgeon_kernels import quadratic_form
from surgeon_kernels.linalg import quadratic_form_triton
from surgeon_kernels.linalg.quadratic_form_triton import Config

# Rows, columns, and whether the rows are adjacent in memory: (W, A) for row costs, (Wᵀ, G) for column costs.
CASES = [
    (11008, 4096, True),
    (4096, 11008, True),
    (4096, 4096, True),
    (4096, 11008, False),
    (11008, 4096, False),
    (4096, 4096, False),
    (8192, 28672, True),
    (2048, 2048, True),
    (1024, 1024, True),
]
CONFIGS = [
    Config(128, 256, 32, 8, 4),
    Config(128, 256, 32, 8, 3),
    Config(256, 128, 32, 8, 4),
    Config(256, 128, 32, 8, 3),
    Config(128, 128, 32, 8, 4),
    Config(128, 128, 64, 8, 3),
    Config(64, 256, 32, 4, 4),
]


def operands(R: int, C: int, row_major: bool) -> tuple[Tensor, Tensor]:
    x = torch.randn(R, C, device="cuda") if row_major else torch.randn(C, R, device="cuda").T
    y = torch.randn(2 * C, C, device="cuda") * torch.logspace(0, -2, C, device="cuda")
    return x, y.T @ y / len(y)


def torch_form(x: Tensor, S: Tensor) -> Tensor:
    """Row by row, or column by column of ``xᵀ``, whichever lies in memory."""
    return ((x @ S) * x).sum(dim=1) if x.stride(1) == 1 else ((S @ x.T) * x.T).sum(dim=0)


def exact_form(x: Tensor, S: Tensor) -> Tensor:
    S = S.double()
    return torch.cat([torch_form(rows.double(), S) for rows in x.split(2048)])


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def mean_error(actual: Tensor, expected: Tensor) -> float:
    return float(((actual.double() - expected) / expected).mean())


def measure(R: int, C: int, row_major: bool) -> dict[str, Any]:
    x, S = operands(R, C, row_major)
    ours, theirs = quadratic_form(x, S), torch_form(x, S)
    exact = exact_form(x[:2048], S)
    times = graph_ms([partial(torch_form, x, S)]), graph_ms([partial(quadratic_form, x, S)])
    torch.backends.cuda.matmul.allow_tf32 = False
    float32 = graph_ms([partial(torch_form, x, S)], 3)
    torch.backends.cuda.matmul.allow_tf32 = True
    return {
        "rows": R,
        "columns": C,
        "layout": "rows" if row_major else "columns",
        "torch_tf32_ms": f"{times[0]:.4f}",
        "torch_fp32_ms": f"{float32:.4f}",
        "kernel_ms": f"{times[1]:.4f}",
        "speedup": f"{times[0] / times[1]:.2f}",
        "tflops": f"{R * C * (C + 1) / times[1] / 1e9:.0f}",
        "error": f"{error(ours[:2048], exact):.2e}",
        "torch_tf32_error": f"{error(theirs[:2048], exact):.2e}",
        "mean_error": f"{mean_error(ours[:2048], exact):.1e}",
        "torch_tf32_mean_error": f"{mean_error(theirs[:2048], exact):.1e}",
        "extra_mb": f"{extra_bytes(partial(quadratic_form, x, S)) / 1e6:.0f}",
        "torch_extra_mb": f"{extra_bytes(partial(torch_form, x, S)) / 1e6:.0f}",
    }


def tune(R: int, C: int, row_major: bool) -> None:
    x, S = operands(R, C, row_major)
    print(
        f"{R} x {C} {'rows' if row_major else 'columns'}: torch {graph_ms([partial(torch_form, x, S)]):.4f} ms",
        flush=True,
    )
    for config in CONFIGS:
        print(
            f"    {tuple(config)}: {graph_ms([partial(quadratic_form_triton.launch, x, S, config)]):.4f} ms", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="time launch configurations instead")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "quadratic_form.csv")
    options = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    if options.tune:
        for case in (CASES[0], CASES[3]):
            tune(*case)
        return
    about = environment("cuda")
    for case in CASES:
        row = {**measure(*case), **about}
        print(*list(row.values())[:14], flush=True)
        append_row(options.out, row)


if __name__ == "__main__":
    main()
