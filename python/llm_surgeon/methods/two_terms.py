"""The nearest sum of two Kronecker products to each layer's curvature, by power iteration in hooked passes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.estimate import Curvature
from llm_surgeon.curvature.factors import numerical_errors
from llm_surgeon.methods.select import Selection
from llm_surgeon.methods.update import LayerUpdate
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from surgeon_kernels import WeightCosts, damp, joint_update
from surgeon_kernels.linalg.kronecker_sum import KroneckerSum, orthonormal

_ROUNDS = 2


class TwoTermCurvature:
    """``F ≈ G₁ ⊗ A₁ + G₂ ⊗ A₂`` of every layer, the nearest in the Frobenius norm as far as the iteration came.

    With ``R(F) = (1/N) Σ (g gᵀ)(a aᵀ)`` as a matrix between the spaces of ``[R, R]`` and ``[C, C]`` matrices, the best
    sum is the part of its two largest singular values. Starting from ``G`` and ``G²``, made orthonormal, a pass over
    the data computes ``A_k = (1/N) Σ (gᵀ G_k g) a aᵀ`` of every layer and, from those made orthonormal, another one
    ``G_k = (1/N) Σ (aᵀ A_k a) g gᵀ``: power iteration on both sides, two rounds. The first pair stays positive.

    Costs and solver use the first pair damped as usual and the second, where the sum would not be positive, scaled down
    (:class:`~surgeon_kernels.linalg.kronecker_sum.KroneckerSum`). All of it stays in float32 and in memory: this is for
    studies of models that fit several times over.
    """

    def __init__(
        self, decoder: Decoder, config: PruneConfig, curvature: Curvature, estimate: Callable[[], Curvature]
    ) -> None:
        """``curvature`` as estimated once; ``estimate`` goes over the same data, with the same labels, again."""
        self._config, self._decoder = config, decoder
        Gs: dict[str, Tensor] = {}
        for linear in decoder.linears:
            G, _ = curvature.factors(linear)
            assert G is not None
            Gs[linear.name] = torch.stack([G, G @ G])
        for _ in range(_ROUNDS):
            As = _orthonormal(self._pass(_orthonormal(Gs), estimate, of_inputs=True))
            Gs = self._pass(As, estimate, of_inputs=False)
        self._pairs = {name: (Gs[name], As[name]) for name in As}

    def _pass(
        self, known: dict[str, Tensor], estimate: Callable[[], Curvature], *, of_inputs: bool
    ) -> dict[str, Tensor]:
        with _weighted_sums(self._decoder.linears, known, of_inputs=of_inputs) as sums:
            tokens = estimate().tokens
        return {name: pair / tokens for name, pair in sums.items()}

    def of(self, linear: PrunableLinear) -> KroneckerSum:
        """The damped sum of ``linear``.

        Raises:
            NumericalError: the first pair is not positive definite even when it is damped.
        """
        G, A = self._pairs[linear.name]
        first = damp(G[0], self._config.damp_g), damp(A[0], self._config.damp_a)
        with numerical_errors():
            return KroneckerSum((first[0], G[1]), (first[1], A[1]), name=linear.name)

    def costs(self, linear: PrunableLinear) -> WeightCosts:
        """Cost ``½ W² / [F⁻¹]`` of each weight, ``[R, C]`` (no bias column)."""
        return WeightCosts((0.5 * linear.matrix() ** 2 / self.of(linear).inverse_diagonal())[:, : linear.columns])

    def compensate(self, linear: PrunableLinear, weight: Tensor, selection: Selection) -> LayerUpdate:
        """Zero what is selected, and move the others of ``weight`` ``[R, C']`` to the joint optimum under the sum."""
        config, pruned = self._config, selection.with_bias(weight.shape[1])
        first, second = self.of(linear).terms
        solved = joint_update(
            weight, pruned, *first, second=second, tolerance=config.tolerance, max_iterations=config.max_iterations
        )
        new = (weight + solved.delta).masked_fill(pruned, 0.0)
        gap = solved.gap if math.isfinite(solved.gap) else None
        return LayerUpdate(new, solved.delta, selection, solved.objective, solved.bound, gap)


def _orthonormal(pairs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: orthonormal(pair) for name, pair in pairs.items()}


@contextlib.contextmanager
def _weighted_sums(
    linears: list[PrunableLinear], known: dict[str, Tensor], *, of_inputs: bool
) -> Iterator[dict[str, Tensor]]:
    """Context manager; passes add up ``Σ (gᵀ M_k g) a aᵀ`` ``[2, C', C']`` or ``Σ (aᵀ M_k a) g gᵀ`` ``[2, R, R]``.

    Padded positions have no gradient and add nothing.
    """
    sums: dict[str, Tensor] = {}
    for linear in linears:
        n = linear.columns + linear.has_bias if of_inputs else linear.rows
        sums[linear.name] = known[linear.name].new_zeros(2, n, n)

    def record(linear: PrunableLinear, x: Tensor, y: Tensor) -> None:
        a = x.detach().flatten(0, -2).to(sums[linear.name].dtype)
        if linear.has_bias:
            a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)

        def add(gradient: Tensor) -> None:
            g = gradient.flatten(0, -2).to(a.dtype)
            given, other = (g, a) if of_inputs else (a, g)
            for M, total in zip(known[linear.name], sums[linear.name], strict=True):
                weights = ((given @ M) * given).sum(dim=1)
                total.addmm_((other * weights[:, None]).T, other)

        y.register_hook(add)

    handles = [
        linear.module.register_forward_hook(lambda _, args, y, linear=linear: record(linear, args[0], y))
        for linear in linears
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
