"""Variants of the joint update's solver, compared by ``solver.py``: traces of products and feasible objectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from surgeon_kernels import chunked_update, joint_update, spd_inverse
from surgeon_kernels.linalg import low_rank


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


# (Products so far, objective of the feasible iterate) after each iteration.
Trace = Iterator[tuple[float, float]]


def kept(p: Problem, precondition: Callable[[Tensor], Tensor], cost: float, start: Tensor | None = None) -> Trace:
    """Preconditioned conjugate gradients on the kept weights, from zeroing or from a line search along ``start``."""
    delta = torch.where(p.pruned, -p.weight, 0.0)
    residual = (-(p.G @ delta @ p.A)).masked_fill_(p.pruned, 0.0)
    products, value = 1.0, -0.5 * inner(delta, p.G @ -delta @ p.A)
    if start is not None:
        step = start.masked_fill(p.pruned, 0.0)
        image = (p.G @ step @ p.A).masked_fill_(p.pruned, 0.0)
        scale = inner(step, residual) / inner(step, image)
        value -= 0.5 * scale * inner(step, residual)
        residual -= scale * image
        products += 2.0  # the start's own, and this one
    yield products, value
    direction, energy = torch.zeros_like(residual), 0.0
    while True:
        z = precondition(residual).masked_fill_(p.pruned, 0.0)
        before, energy = energy, inner(residual, z)
        direction = z + direction * (energy / before) if before else z
        image = (p.G @ direction @ p.A).masked_fill_(p.pruned, 0.0)
        length = energy / inner(direction, image)
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
        bound = 0.5 * inner(multipliers, wanted + residual)
        yield products, bound + 0.5 * inner(residual, p.G @ residual @ p.A)
        z = precondition(residual).masked_fill_(~p.pruned, 0.0)
        before, energy = energy, inner(residual, z)
        direction = z + direction * (energy / before) if before else z
        image = (p.G_inv @ direction @ p.A_inv).masked_fill_(~p.pruned, 0.0)
        length = energy / inner(direction, image)
        multipliers += length * direction
        residual -= length * image
        products += 1.0 + cost


def default(p: Problem) -> Trace:
    """``joint_update`` itself, at tolerances from loose to tight: its feasible iterates."""
    for tolerance in (0.3, 0.1, 0.05, 0.03, 0.01, 0.003):
        solved = joint_update(*p, tolerance=tolerance)
        # The iterations on the pruned weights, if any, end with a product in full precision, and one begins the others.
        before = len(solved.bound) + (len(solved.bound) > 1)
        yield from ((before + k, value) for k, value in enumerate(solved.objective[:-1]))
        yield before + len(solved.objective) - 1 + (len(solved.objective) > 1), solved.objective[-1]


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


def corrected(p: Problem, rank: int) -> Callable[[Tensor], Tensor]:
    """The dual's diagonal with the correction by so many eigenvectors of each factor, from the first iteration on."""
    with mock.patch.object(low_rank, "_RANK", rank):
        correction = low_rank.low_rank_correction(
            low_rank.leading_vectors(p.G, p.G_inv), low_rank.leading_vectors(p.A, p.A_inv), p.pruned
        )
    scales = torch.outer(p.G_inv.diagonal(), p.A_inv.diagonal()).rsqrt()

    def precondition(residual: Tensor) -> Tensor:
        left, right, _ = correction.factors(scales * residual)
        return scales * torch.addmm(scales * residual, left, right.T)

    return precondition


def modelled(p: Problem, rank: int) -> Callable[[Tensor], Tensor]:
    """Of the kept weights: ``M ≈ D + V Vᵀ`` for both factors, inverted on the kept weights by rows and by columns::

    T_A T_G T_A,   T_G = I - U (I + Uᵀ_F U_F)⁻¹ Uᵀ  for every column,   T_A² the same by rows
    """
    kept, parts = (~p.pruned).to(p.weight.dtype), []
    for M, inverse, mask in ((p.G, p.G_inv, kept.T), (p.A, p.A_inv, kept)):
        D = 1.0 / inverse.diagonal()
        values, vectors = torch.linalg.eigh(M / torch.outer(D, D).sqrt())
        V = vectors[:, -rank:] * (values[-rank:] - 1.0).clamp_min(0.0).sqrt() * D.sqrt()[:, None]
        D = torch.maximum(M.diagonal() - V.square().sum(1), D)
        V = V / D.sqrt()[:, None]
        N = (mask @ (V[:, :, None] * V[:, None, :]).flatten(1)).unflatten(1, (V.shape[1], -1))
        n, Q = torch.linalg.eigh(N.double())
        n = n.clamp_min(1e-9)
        whole, root = ((Q * f[:, None, :] @ Q.mT).to(V.dtype) for f in (1 / (1 + n), (1 - (1 + n).rsqrt()) / n))
        parts.append((D.rsqrt(), V, whole, root))
    (g, U, by_column, _), (a, V, _, by_row) = parts
    scales = torch.outer(g, a)

    def rows(z: Tensor) -> Tensor:
        return kept * (z - torch.einsum("rkl,rl->rk", by_row, z @ V) @ V.T)

    def precondition(residual: Tensor) -> Tensor:
        z = rows(scales * residual)
        return scales * rows(kept * (z - U @ torch.einsum("ckl,cl->kc", by_column, z.T @ U)))

    return precondition


def _start(p: Problem, m: int) -> Tensor:
    return chunked_update(p.weight, p.pruned, p.G_inv, p.A_inv, max_correlated=m, sequential=False).delta


def _root(p: Problem) -> tuple[float, float]:
    return p.density**0.5, (1.0 - p.density) ** 0.5


VARIANTS: dict[str, Callable[[Problem], Trace]] = {
    "kept, shrunk inverses": lambda p: kept(p, by(shrunk(p.G, _root(p)[0]), shrunk(p.A, _root(p)[0])), 1.0),
    "kept, shrunk inverses, chunks of 64": lambda p: kept(
        p, by(shrunk(p.G, _root(p)[0]), shrunk(p.A, _root(p)[0])), 1.0, _start(p, 64)
    ),
    "kept, inverses": lambda p: kept(p, by(p.G_inv, p.A_inv), 1.0),
    "kept, equivalent inverses": lambda p: kept(p, by(equivalent(p.G, _root(p)[0]), equivalent(p.A, _root(p)[0])), 1.0),
    "kept, diagonal": lambda p: kept(p, jacobi(p.G, p.A), 0.0),
    "kept, 16 eigenvectors": lambda p: kept(p, modelled(p, 16), 0.0),
    "dual, shrunk inverses": lambda p: dual(p, by(shrunk(p.G_inv, _root(p)[1]), shrunk(p.A_inv, _root(p)[1])), 1.0),
    "dual, diagonal": lambda p: dual(p, jacobi(p.G_inv, p.A_inv), 0.0),
    **{f"dual, {k} eigenvectors": lambda p, k=k: dual(p, corrected(p, k), 0.0) for k in (8, 16, 32)},
    "joint_update": default,
}


def inner(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum(dtype=torch.float64))
