"""Ways of solving for the joint update, by the matrix products they take to come within 5 % and 1 % of the optimum.

    python bench/solver.py --models MODEL [MODEL ...] --data wikitext-2.zip

Layers of two decoder blocks, 2:4 and unstructured 50 % (one threshold over these layers), curvature of 16 x 512 tokens
by default; ``--factors FILE`` reads ``[(layer, W, G, A), ...]`` from ``torch.save`` instead. A product is
``L X M``: the operator or a preconditioner that is a product once each. What is feasible is compared: an iterate of the
dual with ``-W`` put on the pruned weights. Rows are appended to ``results/solver_trials.csv``: one for each layer and,
as layer ``all``, one for the sum of their objectives over the sum of their optima.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from environment import append_row, environment
from llm_surgeon.capture import estimate_curvature
from llm_surgeon.checkpoint import load_model
from llm_surgeon.data import calibration_windows, read_text, tokenize
from llm_surgeon.models import find_decoder
from surgeon_kernels import chunked_update, element_cost, joint_update, k_smallest, nm_select, spd_inverse

_CAP = 120  # products


class Problem(NamedTuple):
    weight: Tensor
    pruned: Tensor
    G: Tensor
    A: Tensor
    G_inv: Tensor
    A_inv: Tensor

    @property
    def density(self) -> float:
        return 1.0 - float(self.pruned.double().mean())


# A way of solving: (products so far, objective of the feasible iterate) after each iteration.
Trace = Iterator[tuple[float, float]]


def kept(p: Problem, precondition: Callable[[Tensor], Tensor], cost: float, start: Tensor | None = None) -> Trace:
    """Preconditioned conjugate gradients on the kept weights, from zeroing or from a line search along ``start``."""
    delta = torch.where(p.pruned, -p.weight, 0.0)
    residual = (-(p.G @ delta @ p.A)).masked_fill_(p.pruned, 0.0)
    products, value = 1.0, -0.5 * _dot(delta, p.G @ -delta @ p.A)
    if start is not None:
        step = start.masked_fill(p.pruned, 0.0)
        image = (p.G @ step @ p.A).masked_fill_(p.pruned, 0.0)
        scale = _dot(step, residual) / _dot(step, image)
        value -= 0.5 * scale * _dot(step, residual)
        residual -= scale * image
        products += 2.0  # the start's own, and this one
    yield products, value
    direction, energy = torch.zeros_like(residual), 0.0
    while True:
        z = precondition(residual).masked_fill_(p.pruned, 0.0)
        before, energy = energy, _dot(residual, z)
        direction = z + direction * (energy / before) if before else z
        image = (p.G @ direction @ p.A).masked_fill_(p.pruned, 0.0)
        length = energy / _dot(direction, image)
        residual -= length * image
        value -= 0.5 * length * energy
        products += 1.0 + cost
        yield products, value


def dual(p: Problem, precondition: Callable[[Tensor], Tensor], cost: float) -> Trace:
    """Preconditioned conjugate gradients on the multipliers; the bound plus half the residual's energy in G ⊗ A."""
    wanted = p.weight.masked_fill(~p.pruned, 0.0)
    multipliers, residual = torch.zeros_like(wanted), wanted.clone()
    direction, energy, products = torch.zeros_like(wanted), 0.0, 2.0  # two at the end: Δ and its gradient
    while True:
        bound = 0.5 * _dot(multipliers, wanted + residual)
        yield products, bound + 0.5 * _dot(residual, p.G @ residual @ p.A)
        z = precondition(residual).masked_fill_(~p.pruned, 0.0)
        before, energy = energy, _dot(residual, z)
        direction = z + direction * (energy / before) if before else z
        image = (p.G_inv @ direction @ p.A_inv).masked_fill_(~p.pruned, 0.0)
        length = energy / _dot(direction, image)
        multipliers += length * direction
        residual -= length * image
        products += 1.0 + cost


def default(p: Problem) -> Trace:
    """``joint_update`` itself, at tolerances from loose to tight."""
    for tolerance in (0.3, 0.1, 0.05, 0.03, 0.01, 0.003):
        solved = joint_update(*p, tolerance=tolerance)
        # Each part ends with one product in full precision, the first with two.
        yield len(solved.bound) + len(solved.objective) + (len(solved.objective) > 1), solved.objective[-1]


def shrunk(M: Tensor, rho: float) -> Tensor:
    """Inverse of M with its off-diagonals shrunk."""
    shrunk = rho * M
    shrunk.diagonal().copy_(M.diagonal())
    return spd_inverse(shrunk).inverse


def equivalent(M: Tensor, density: float) -> Tensor:
    """``(M + D)⁻¹``, the expected inverse of a random principal submatrix: ``D_i [(M + D)⁻¹]_ii = 1 - density``."""
    D = (1.0 - density) / density / spd_inverse(M).inverse.diagonal()
    for _ in range(4):
        D = (1.0 - density) / spd_inverse(M + D.diag()).inverse.diagonal()
    return spd_inverse(M + D.diag()).inverse


def by(left: Tensor, right: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda residual: left @ residual @ right


def jacobi(left: Tensor, right: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda residual: residual / torch.outer(left.diagonal(), right.diagonal())


def _start(p: Problem, m: int) -> Tensor:
    return chunked_update(p.weight, p.pruned, p.G_inv, p.A_inv, max_correlated=m, sequential=False).delta


def _root(p: Problem) -> tuple[float, float]:
    return p.density**0.5, (1.0 - p.density) ** 0.5


WAYS: dict[str, Callable[[Problem], Trace]] = {
    "kept, shrunk inverses": lambda p: kept(p, by(shrunk(p.G, _root(p)[0]), shrunk(p.A, _root(p)[0])), 1.0),
    "kept, shrunk inverses, chunks of 64": lambda p: kept(
        p, by(shrunk(p.G, _root(p)[0]), shrunk(p.A, _root(p)[0])), 1.0, _start(p, 64)
    ),
    "kept, inverses": lambda p: kept(p, by(p.G_inv, p.A_inv), 1.0),
    "kept, equivalent inverses": lambda p: kept(p, by(equivalent(p.G, _root(p)[0]), equivalent(p.A, _root(p)[0])), 1.0),
    "kept, diagonal": lambda p: kept(p, jacobi(p.G, p.A), 0.0),
    "dual, shrunk inverses": lambda p: dual(p, by(shrunk(p.G_inv, _root(p)[1]), shrunk(p.A_inv, _root(p)[1])), 1.0),
    "dual, diagonal": lambda p: dual(p, jacobi(p.G_inv, p.A_inv), 0.0),
    "dual then kept, diagonal (joint_update)": default,
}


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


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum(dtype=torch.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, default=[])
    parser.add_argument("--factors", nargs="+", type=Path, default=[], help="files named after their models")
    parser.add_argument("--data", help="text with a train part (.zip)")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", help="left out: the second and the last but one")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--structures", nargs="+", default=["2:4", "unstructured"])
    parser.add_argument("--largest", type=int, help="leave out layers with more rows or columns")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "solver_trials.csv")
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
                for way in options.ways:
                    found = values(WAYS[way](p), 1.002 * optimum)
                    record(options.out, about, way, found, optimum)
                    sums[way] = sums.get(way, 0.0) + found
                optima += optimum
                pruned, size = pruned + int(p.pruned.sum()), size + p.pruned.numel()
            about |= {"layer": "all", "rows": 0, "columns": 0, "kept": f"{1.0 - pruned / size:.3f}"}
            for way, found in sums.items():
                record(options.out, about, way, found, optima)


def record(path: Path, about: dict[str, object], way: str, found: Tensor, optimum: float) -> None:
    products = {f"products_{gap}": products_until(found, (1.0 + gap / 100) * optimum) for gap in (5, 1)}
    row = {**about, "way": way, **products, **environment("cuda" if torch.cuda.is_available() else "cpu")}
    append_row(path, row)
    print(*list(row.values())[:9], sep=" | ", flush=True)


if __name__ == "__main__":
    main()
