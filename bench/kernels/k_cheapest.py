"""The exact global threshold over every weight of a model, against ``torch.kthvalue`` on stored costs.

    python -m bench.kernels.k_cheapest            # appended to results/cost_threshold.csv

The model is of Llama-2-7B's shape: 224 matrices, 6.5 billion weights, of random values and diagonals that differ from
layer to layer. Rows say what was selected (weights or 2:4 groups), what was asked for (the threshold alone, or the
masks too), the median time, and the memory allocated beyond weights and masks. Rows of ``torch.kthvalue`` give it the
same costs, already computed: of all blocks, or of half as many until it fits into memory and ``--seconds``, and finds
the same value; ``speedup`` compares it with the threshold of as many blocks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.environment import append_row, environment, require_gpu
from bench.timing import copy_bandwidth, extra_bytes
from surgeon_kernels import WeightCosts, k_cheapest, nm_group_cost
from surgeon_kernels.selection.k_cheapest import kth_cost, number_of_costs

BLOCK = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def model(blocks: int, dtype: torch.dtype) -> list[WeightCosts]:
    """Layers whose typical costs differ by orders of magnitude, as those of real models do."""
    layers = []
    for R, C in BLOCK * blocks:
        scale = 10 ** float(torch.randn(()))
        g, a = (torch.randn(n, device="cuda").mul_(0.7).exp_() for n in (R, C))
        layers.append(WeightCosts((0.02 * torch.randn(R, C, device="cuda")).to(dtype), g * scale, a))
    return layers


def wall_ms(call: Callable[[], object], repetitions: int = 5) -> float:
    """Median wall time of calls that end on the host."""
    times = []
    for _ in range(repetitions + 1):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    return sorted(times[1:])[repetitions // 2]


def kthvalue(layers: list[WeightCosts], pattern: tuple[int, int] | None, seconds: float) -> dict[str, Any]:
    """The row of ``torch.kthvalue`` for the most costs, of all blocks or halves of them, for which it works."""
    trial = torch.rand(1 << 26, device="cuda")
    torch.kthvalue(trial, 1)
    rate = wall_ms(lambda: torch.kthvalue(trial, len(trial) // 2), 1) / len(trial)
    while True:
        sizes = [number_of_costs(cost, pattern) for cost in layers]
        total = sum(sizes)
        try:
            if rate * total > 1e3 * seconds:
                raise RuntimeError(f"would take {rate * total / 1e3:.0f} s")
            costs = torch.empty(total, device="cuda")
            for part, layer in zip(costs.split(sizes), layers, strict=True):
                part.copy_((nm_group_cost(layer, *pattern) if pattern else layer.dense()).flatten())
            torch.cuda.synchronize()
            begun = time.perf_counter()
            value = float(torch.kthvalue(costs, total // 2).values)
            ms = 1e3 * (time.perf_counter() - begun)
            ours = bits_to_float(kth_cost(layers, total // 2, sizes, pattern)[0])
            if ours != value:
                raise RuntimeError(f"finds {value}, not {ours}")
        except RuntimeError as error:
            print(f"torch.kthvalue of {total} costs: {str(error).splitlines()[0]}", flush=True)
            layers = layers[: len(layers) // 2]
        else:
            threshold_ms = wall_ms(partial(kth_cost, layers, total // 2, sizes, pattern))
            return {
                **labels(layers, pattern, "torch.kthvalue", ms),
                "threshold_ms": f"{threshold_ms:.2f}",
                "speedup": f"{ms / threshold_ms:.0f}",
            }


def labels(layers: list[WeightCosts], pattern: tuple[int, int] | None, result: str, ms: float) -> dict[str, Any]:
    return {
        "of": "weights" if pattern is None else "groups {}:{}".format(*pattern),
        "result": result,
        "costs": sum(number_of_costs(cost, pattern) for cost in layers),
        "dtype": str(layers[0].weight.dtype).removeprefix("torch."),
        "ms": f"{ms:.2f}",
        "one_read_ms": "",
        "extra_mb": "",
        "threshold_ms": "",
        "speedup": "",
    }


def bits_to_float(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def measure(layers: list[WeightCosts], pattern: tuple[int, int] | None, copy: float) -> list[dict[str, Any]]:
    sizes = [number_of_costs(cost, pattern) for cost in layers]
    k, read = sum(sizes) // 2, sum(cost.weight.nbytes for cost in layers)
    masks = sum(cost.weight.numel() for cost in layers)
    rows = []
    for what, call, output in (
        ("threshold", lambda: kth_cost(layers, k, sizes, pattern), 0),
        ("masks", lambda: k_cheapest(layers, k, pattern=pattern), masks),
    ):
        row = labels(layers, pattern, what, wall_ms(call))
        row["one_read_ms"] = f"{1e3 * read / copy:.2f}"
        row["extra_mb"] = f"{(extra_bytes(call) - output) / 1e6:.0f}"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="longest that torch.kthvalue may take")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "cost_threshold.csv")
    options = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    copy, about = copy_bandwidth(), environment("cuda")

    def record(row: dict[str, Any]) -> None:
        print(*row.values(), flush=True)
        append_row(options.out, {**row, **about})

    for dtype, compared in ((torch.bfloat16, None), (torch.float32, (2, 4))):
        layers = model(options.blocks, dtype)
        for pattern in (None, (2, 4)):
            for row in measure(layers, pattern, copy):
                record(row)
        record(kthvalue(layers, compared, options.seconds))


if __name__ == "__main__":
    main()
