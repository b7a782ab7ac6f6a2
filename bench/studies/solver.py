"""Variants of the joint update's solver, by the products that they take to come within 5 % and 1 % of the optimum.

    python -m bench.studies.solver --models MODEL [MODEL ...] --data wikitext-2.zip

Layers of two decoder blocks, 2:4 and unstructured 50 % (one threshold over these layers), curvature of 16 x 512 tokens
by default; ``--factors FILE`` reads ``[(layer, W, G, A), ...]`` from ``torch.save`` instead. A product is
``L X M``: the operator or a preconditioner that is a product once each; products with thin matrices are not counted.
Feasible iterates are compared: those of the dual with ``-W`` put on the pruned weights. The variants are in
``solver_variants.py``. Rows are appended to ``results/solver_trials.csv``, the variant in column ``way``: one for each
layer and, as layer ``all``, one for the sum of their objectives over the sum of their optima.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.environment import append_row, environment
from bench.studies.solver_variants import VARIANTS, Problem, Trace
from llm_surgeon.checkpoint import load_model
from llm_surgeon.curvature.estimate import estimate_curvature
from llm_surgeon.data.calibration import calibration_windows
from llm_surgeon.data.documents import read_text
from llm_surgeon.data.tokens import tokenize
from llm_surgeon.models.decoder import find_decoder
from surgeon_kernels import element_cost, joint_update, k_smallest, nm_select, spd_inverse

_CAP = 120  # products


def values(trace: Trace, enough: float) -> Tensor:
    """The least objective after 0, 1, ..., _CAP products; the trace ends early once it is ``enough``."""
    found = torch.full((_CAP + 1,), math.inf, dtype=torch.float64)
    for products, value in trace:
        if products > _CAP:
            break
        found[int(products) :].clamp_(max=value)
        if value <= enough:
            break
    return found


def products_until(found: Tensor, target: float) -> str:
    reached = (found <= target).nonzero()
    return str(int(reached[0])) if len(reached) else f">{_CAP}"


def factors(
    model_path: str, data: str, samples: int, seqlen: int, blocks: list[int] | None = None
) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    model, tokenizer, _ = load_model(model_path, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    decoder = find_decoder(model)
    windows = calibration_windows(tokenize(read_text(data, "calibration"), tokenizer), samples, seqlen, 0)
    curvature = estimate_curvature(model, decoder, windows, batch_size=4)
    chosen = blocks or (1, len(decoder.blocks) - 2)
    found = []
    for linear in decoder.linears:
        G, A = curvature.factors(linear)
        if linear.depth in chosen and G is not None:
            found.append((linear.name, linear.matrix(), G, A))
    return found


def problems(layers: list[tuple[str, Tensor, Tensor, Tensor]], structure: str) -> Iterator[tuple[str, Problem]]:
    damped = [(spd_inverse(G.float(), 0.1), spd_inverse(A.float(), 0.01)) for _, _, G, A in layers]
    costs = []
    for (_, W, _, _), (g, a) in zip(layers, damped, strict=True):
        cost = element_cost(W.float(), 1.0 / g.inverse.diagonal(), 1.0 / a.inverse.diagonal())
        costs.append(cost[:, : W.shape[1] // 4 * 4])  # no bias column
    if structure == "2:4":
        masks = [nm_select(cost, 2, 4) for cost in costs]
    else:
        masks = k_smallest(costs, sum(cost.numel() for cost in costs) // 2)[1]
    for (name, W, _, _), (g, a), mask in zip(layers, damped, masks, strict=True):
        pruned = torch.zeros_like(W, dtype=torch.bool)
        pruned[:, : mask.shape[1]] = mask
        yield name, Problem(W.float(), pruned, g.damped, a.damped, g.inverse, a.inverse)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, default=[])
    parser.add_argument("--factors", nargs="+", type=Path, default=[], help="files named after their models")
    parser.add_argument("--data", help="text with a train part (.zip)")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", help="left out: the second and the last but one")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--structures", nargs="+", default=["2:4", "unstructured"])
    parser.add_argument("--largest", type=int, help="leave out layers with more rows or columns")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "solver_trials.csv")
    options = parser.parse_args()
    sources = [
        (path.name, lambda p=path: factors(str(p), options.data, options.samples, options.seqlen, options.blocks))
        for path in options.models
    ]
    sources += [(path.stem, lambda p=path: torch.load(p)) for path in options.factors]
    for model, read in sources:
        layers = read()
        for structure in options.structures:
            sums: dict[str, Tensor] = {}
            optima, pruned, size = 0.0, 0, 0
            about: dict[str, object] = {"model": model, "structure": structure}
            for layer, p in problems(layers, structure):
                if options.largest and max(p.weight.shape) > options.largest:
                    continue
                best = joint_update(*p, tolerance=1e-3, max_iterations=600)
                optimum = best.bound[-1] if best.bound[-1] > 0.0 else best.objective[-1]
                about |= {
                    "layer": layer,
                    "rows": len(p.weight),
                    "columns": p.weight.shape[1],
                    "kept": f"{p.density:.3f}",
                }
                for variant in options.variants:
                    found = values(VARIANTS[variant](p), 1.002 * optimum)
                    record(options.out, about, variant, found, optimum)
                    sums[variant] = sums.get(variant, 0.0) + found
                optima += optimum
                pruned, size = pruned + int(p.pruned.sum()), size + p.pruned.numel()
            about |= {"layer": "all", "rows": 0, "columns": 0, "kept": f"{1.0 - pruned / size:.3f}"}
            for variant, found in sums.items():
                record(options.out, about, variant, found, optima)


def record(path: Path, about: dict[str, object], variant: str, found: Tensor, optimum: float) -> None:
    products = {f"products_{gap}": products_until(found, (1.0 + gap / 100) * optimum) for gap in (5, 1)}
    row = {**about, "way": variant, **products, **environment("cuda" if torch.cuda.is_available() else "cpu")}
    append_row(path, row)
    print(*list(row.values())[:9], sep=" | ", flush=True)


if __name__ == "__main__":
    main()
