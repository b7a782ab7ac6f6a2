"""Cost and N:M selection in one kernel, in percent of the bandwidth of a copy measured in the same run.

    python -m bench.kernels.nm_select            # appended to results/nm_select.csv

Bytes are those that must move: the weight once, and the output (mask 1 byte a weight, group cost 4 a group, pruned
weight as wide as the weight). Times are medians of CUDA graph replays over weights, each with its own output, that do
not fit in L2. Bandwidths of copies count bytes read and written: of a copy of 4 GiB, and of copies that move as many
bytes as the op, one after the other likewise. PyTorch is the reference on the same device.
"""

from __future__ import annotations

import argparse
import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.environment import append_row, environment, require_gpu
from bench.timing import copy_bandwidth, eager_ms, graph_ms
from surgeon_kernels import WeightCosts, nm_select
from surgeon_kernels.selection.nm_select import _reference

_ROTATED_BYTES = 512 << 20
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672)]
PATTERNS = [(2, 4), (1, 4), (4, 8), (8, 16)]
OUTPUTS = {"mask": "nm_select", "group cost": "nm_group_cost", "pruned weight": "nm_prune"}
SLOW = [((4096, 11008), (3, 5)), ((4096, 11008), (2, 4))]  # by the general kernel: any M, rows not aligned


def problems(shape: tuple[int, int], dtype: torch.dtype, aligned: bool = True) -> list[WeightCosts]:
    count = max(2, -(-_ROTATED_BYTES // (shape[0] * shape[1] * dtype.itemsize)))
    g, a = torch.rand(shape[0], device="cuda"), torch.rand(shape[1], device="cuda")
    width = shape[1] + (not aligned)  # with a bias column at the end, say
    weights = [torch.randn(shape[0], width, device="cuda").to(dtype)[:, : shape[1]] for _ in range(count)]
    return [WeightCosts(weight, g, a) for weight in weights]


def copy_ms(moved: int) -> float:
    """Milliseconds of a copy that reads and writes ``moved`` bytes together."""
    count = max(2, -(-_ROTATED_BYTES // (moved // 2)))
    source = torch.randint(256, (count, moved // 2), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return graph_ms([partial(to.copy_, part) for to, part in zip(target, source, strict=True)])


def measure(
    shape: tuple[int, int], dtype: torch.dtype, pattern: tuple[int, int], output: str, aligned: bool, copy: float
) -> dict[str, Any]:
    n, m = pattern
    shape = (shape[0], shape[1] // m * m)
    costs = problems(shape, dtype, aligned)
    nm_select(costs[0], n, m)  # builds and registers the ops
    invalid = torch.zeros((), dtype=torch.bool, device="cuda")
    extra = (None, float("inf"), True, invalid) if output == "mask" else (invalid,)
    op = getattr(torch.ops.surgeon_kernels, OUTPUTS[output])
    outputs: list[torch.Tensor] = []
    ms = graph_ms([lambda cost=cost: outputs.append(op(*cost, n, m, *extra)) for cost in costs])
    outputs.clear()
    weights = shape[0] * shape[1]
    written = {"mask": weights, "group cost": 4 * weights // m, "pruned weight": weights * dtype.itemsize}[output]
    moved = weights * dtype.itemsize + written
    reference, same_size = math.nan, moved / copy_ms(moved) * 1e3
    if output == "mask" and weights < 1 << 26:
        reference = eager_ms([lambda: _reference(costs[0].dense(), n, m, None)], 3)
    return {
        "output": output,
        "rows": shape[0],
        "columns": shape[1],
        "dtype": str(dtype).removeprefix("torch."),
        "pattern": f"{n}:{m}",
        "aligned": aligned,
        "ms": f"{ms:.4f}",
        "gb_per_s": f"{moved / ms / 1e6:.0f}",
        "copy_gb_per_s": f"{copy / 1e9:.0f}",
        "percent_of_copy": f"{100 * moved / ms * 1e3 / copy:.1f}",
        "same_size_copy_gb_per_s": f"{same_size / 1e9:.0f}",
        "percent_of_same_size_copy": f"{100 * moved / ms * 1e3 / same_size:.1f}",
        "torch_ms": f"{reference:.3f}",
        "speedup": f"{reference / ms:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "nm_select.csv")
    options = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    copy = copy_bandwidth()
    about = environment("cuda")
    cases: list[tuple[Any, ...]] = [
        (shape, dtype, (2, 4), output, True)
        for shape, dtype, output in itertools.product(SHAPES, (torch.bfloat16, torch.float32), OUTPUTS)
    ]
    cases += [
        (SHAPES[-1], dtype, pattern, "mask", True)
        for dtype, pattern in itertools.product((torch.bfloat16, torch.float32), PATTERNS[1:])
    ]
    cases += [(shape, torch.bfloat16, pattern, "mask", False) for shape, pattern in SLOW]
    for case in cases:
        row = {**measure(*case, copy), **about}
        print(*list(row.values())[:14], flush=True)
        append_row(options.out, row)


if __name__ == "__main__":
    main()
