"""Brute-force truth in float64 (the curvature as one dense matrix) and the random problems it is asked about."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

# Repeatable examples, few enough for CI, and no deadline: machines differ.
repeatable = settings(deadline=None, max_examples=25, derandomize=True)

FACTOR_KINDS = ("plain", "outlier", "deficient", "dead", "zero")
MASK_KINDS = ("random", "none", "all", "row", "column", "row and column", "single")


def kron(G: Tensor, A: Tensor) -> Tensor:
    """``G ⊗ A`` as a dense matrix ``[R C, R C]``, entry by entry: ``F[(r,c),(s,d)] = G[r,s] A[c,d]``."""
    G, A = G.double(), A.double()
    size = G.shape[0] * A.shape[0]
    return torch.einsum("rs,cd->rcsd", G, A).reshape(size, size)


def cost(weight: Tensor, removed: Tensor, G: Tensor, A: Tensor) -> float:
    """Eq. 7: ``½ w_Kᵀ ([F⁻¹]_KK)⁻¹ w_K`` with ``K`` the weights that ``removed`` marks."""
    K = removed.flatten().nonzero()[:, 0]
    w = weight.double().flatten()[K]
    return 0.5 * float(w @ torch.linalg.solve(torch.linalg.inv(kron(G, A))[K][:, K], w))


def update(weight: Tensor, removed: Tensor, G: Tensor, A: Tensor) -> Tensor:
    """Eq. 8: ``Δ = -F⁻¹ E (Eᵀ F⁻¹ E)⁻¹ w_K``, as ``[R, C]``."""
    K = removed.flatten().nonzero()[:, 0]
    columns = torch.linalg.inv(kron(G, A))[:, K]  # F⁻¹ E
    return -(columns @ torch.linalg.solve(columns[K], weight.double().flatten()[K])).view(weight.shape)


def objective(delta: Tensor, G: Tensor, A: Tensor) -> float:
    """``½ vec(Δ)ᵀ F vec(Δ)``."""
    d = delta.double().flatten()
    return 0.5 * float(d @ kron(G, A) @ d)


def optimum(weight: Tensor, removed: Tensor, G: Tensor, A: Tensor) -> float:
    """The least objective that removing ``removed`` can have."""
    return objective(update(weight, removed, G, A), G, A)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected magnitude (the absolute error where all is zero)."""
    if expected.numel() == 0:
        return 0.0
    scale = float(expected.double().abs().max())
    return float((actual.double() - expected.double()).abs().max()) / (scale or 1.0)


def factor(n: int, kind: str, seed: int, damping: float = 0.05) -> Tensor:
    """A damped curvature factor ``[n, n]`` in float64, of the kinds that real layers show.

    plain: many correlated samples; outlier: one channel 1e3 larger; deficient: fewer samples than channels;
    dead: channels that no sample reaches; zero: no sample reaches any.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = max(1, n // 2) if kind == "deficient" else 3 * n
    x = torch.randn(samples, n, generator=generator, dtype=torch.float64)
    x = x + x.roll(1, dims=1)  # neighbours correlate
    if kind == "outlier":
        x[:, n // 2] *= 1e3
    if kind == "dead":
        x[:, ::3] = 0.0
    if kind == "zero":
        x[:] = 0.0
    M = x.T @ x / samples
    return M + (damping * M.diagonal().mean() + 1e-12) * torch.eye(n, dtype=torch.float64)


def with_condition(n: int, condition: float, seed: int) -> Tensor:
    """A random symmetric matrix ``[n, n]`` with eigenvalues spread evenly in logarithm from 1 down to 1/condition."""
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q = torch.linalg.qr(x).Q
    M = (Q * torch.logspace(0, -1, n, base=condition, dtype=torch.float64)) @ Q.T
    return (M + M.T) / 2


def random_weight(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mask(rows: int, columns: int, kind: str, seed: int, density: float = 0.5) -> Tensor:
    """A bool mask of pruned weights ``[rows, columns]``."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    if kind == "none":
        mask[:] = False
    if kind == "all":
        mask[:] = True
    if kind in ("row", "row and column"):
        mask[rows // 2] = True
    if kind in ("column", "row and column"):
        mask[:, columns // 2] = True
    if kind == "single":
        mask[:] = False
        mask[rows // 2, columns // 2] = True
    return mask


# rows, columns, kind of mask, kinds of G and A, seed: what `build` makes a problem of.
problems = st.tuples(
    st.integers(1, 6),
    st.integers(1, 7),
    st.sampled_from(MASK_KINDS),
    st.sampled_from(FACTOR_KINDS),
    st.sampled_from(FACTOR_KINDS),
    st.integers(0, 2**31),
)


def build(problem: tuple[int, int, str, str, str, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(weight, pruned, G, A)`` of one of :data:`problems`."""
    R, C, mask, kind_g, kind_a, seed = problem
    G, A = factor(R, kind_g, seed + 1), factor(C, kind_a, seed + 2)
    return random_weight(R, C, seed), random_mask(R, C, mask, seed + 3), G, A


def zeroing(weight: Tensor, pruned: Tensor) -> Tensor:
    """``Δ`` without any compensation."""
    return torch.where(pruned, -weight, torch.zeros_like(weight))


def typical(
    seed: int = 0, R: int = 8, C: int = 12, density: float = 0.5, kind: str = "deficient"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A problem ``(weight, pruned, G, A)`` that takes conjugate gradients some tens of iterations."""
    weight, pruned = random_weight(R, C, seed), random_mask(R, C, "random", seed + 3, density)
    return weight, pruned, factor(R, kind, seed + 1), factor(C, kind, seed + 2)


def assert_exactly_zero(weight: Tensor, pruned: Tensor, delta: Tensor) -> None:
    """The updated weight is +0.0, bit for bit, wherever it is pruned."""
    result = (weight + delta)[pruned]
    assert torch.equal(delta[pruned], -weight[pruned])
    assert result.eq(0).all() and not result.signbit().any()


def assert_never_increases(trace: list[float], rounding: float = 1e-9) -> None:
    assert all(later <= earlier * (1 + rounding) for earlier, later in pairwise(trace))
