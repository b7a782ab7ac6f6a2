"""The exact global threshold over every weight of a model, against ``torch.kthvalue`` on stored costs.

    python bench/cost_threshold.py            # appended to results/cost_threshold.csv

The model is of Llama-2-7B's shape: 224 matrices, 6.5 billion weights, of random values and diagonals that differ from
layer to layer. Rows say what was selected (weights or 2:4 groups), what was asked for (the threshold alone, or the
masks too), the median time, and the memory allocated beyond weights and masks. ``torch.kthvalue`` gets the costs of the
bfloat16 model, already computed: of all blocks, or of half as many until it succeeds and finds the same value; it is
compared with the threshold of as many blocks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from environment import append_row, environment
from surgeon_kernels import WeightCosts, k_cheapest, nm_group_cost
from surgeon_kernels.cost_threshold import kth_cost, number_of_costs
from timing import copy_bandwidth

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


def extra_bytes(call: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def kthvalue(layers: list[WeightCosts], pattern: tuple[int, int] | None) -> tuple[int, float]:
    """The most costs, of all blocks or of halves of them, for which torch.kthvalue works; its milliseconds."""
    while True:
        sizes = [number_of_costs(cost, pattern) for cost in layers]
        try:
            costs = torch.empty(sum(sizes), device="cuda")
            for part, layer in zip(costs.split(sizes), layers, strict=True):
                part.copy_((nm_group_cost(layer, *pattern) if pattern else layer.dense()).flatten())
            torch.cuda.synchronize()
            begun = time.perf_counter()
            value = float(torch.kthvalue(costs, len(costs) // 2).values)
            ms = 1e3 * (time.perf_counter() - begun)
        except RuntimeError as error:
            print(f"torch.kthvalue of {sum(sizes)} costs: {str(error).splitlines()[0]}", flush=True)
        else:
            ours = bits_to_float(kth_cost(layers, sum(sizes) // 2, sizes, pattern)[0])
            if ours == value:
                return len(costs), ms
            print(f"torch.kthvalue of {sum(sizes)} costs: {value}, not {ours}", flush=True)
        layers = layers[: len(layers) // 2]


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
        ms = wall_ms(call)
        rows.append(
            {
                "of": "weights" if pattern is None else "groups {}:{}".format(*pattern),
                "result": what,
                "costs": sum(sizes),
                "dtype": str(layers[0].weight.dtype).removeprefix("torch."),
                "ms": f"{ms:.2f}",
                "one_read_ms": f"{1e3 * read / copy:.2f}",
                "extra_mb": f"{(extra_bytes(call) - output) / 1e6:.0f}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cost_threshold.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    copy, about = copy_bandwidth(), environment("cuda")
    baseline: dict[object, tuple[int, float]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        layers = model(options.blocks, dtype)
        for pattern in (None, (2, 4)):
            rows = measure(layers, pattern, copy)
            print(*rows[0].values(), flush=True)
            if pattern not in baseline:
                baseline[pattern] = kthvalue(layers, pattern)
            costs, kthvalue_ms = baseline[pattern]
            part = layers[: len(layers) * costs // rows[0]["costs"]]
            sizes = [number_of_costs(cost, pattern) for cost in part]
            ms = wall_ms(partial(kth_cost, part, sum(sizes) // 2, sizes, pattern))
            for row in rows:
                row |= {"kthvalue_costs": "", "kthvalue_ms": "", "threshold_of_as_many_ms": "", "speedup": ""}
                if row["result"] == "threshold":
                    row |= {
                        "kthvalue_costs": costs,
                        "kthvalue_ms": f"{kthvalue_ms:.1f}",
                        "threshold_of_as_many_ms": f"{ms:.2f}",
                        "speedup": f"{kthvalue_ms / ms:.0f}",
                    }
                print(*row.values(), flush=True)
                append_row(options.out, {**row, **about})
        del layers, part


if __name__ == "__main__":
    main()
