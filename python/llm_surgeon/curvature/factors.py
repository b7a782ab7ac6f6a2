"""Damped factors of one layer at a time, with their inverses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.estimate import Curvature
from llm_surgeon.errors import NumericalError
from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.models.offload import Prefetcher
from llm_surgeon.models.passes import to_list
from surgeon_kernels import (
    NotPositiveDefiniteError,
    SymmetricAccumulator,
    inverse_and_diagonal,
    inverse_diagonal,
    leading_vectors,
    mean_diagonal,
    spd_inverse,
    unchecked_inverse,
)
from surgeon_kernels.linalg.kron_product import fits_split, kron_product, kron_product_split

_Key = tuple[str, str, bool]  # "G" or "A", name of the linear or of the input group, with the bias's column


@contextmanager
def numerical_errors(of: str = "") -> Iterator[None]:
    """Context manager in which a matrix without a Cholesky factor is a :class:`NumericalError`, told with ``of``."""
    try:
        yield
    except NotPositiveDefiniteError as error:
        raise NumericalError(f"{of}: {error}" if of else str(error)) from error


class DampedFactor:
    """``M + shift I`` of a factor ``M`` ``[n, n]``, and its inverse when it is asked for.

    Attributes:
        damped: ``M + shift I``, in the memory of ``M``.
        shift: ``(damping + jitter) mean(diag M)``, a scalar on M's device.
        jitter: what a factorisation needed beyond the damping.
    """

    def __init__(
        self, M: Tensor, damping: float, jitter: float = 0.0, inverse: SymmetricAccumulator | None = None
    ) -> None:
        """``inverse``, if it is known, is that of the damped factor."""
        self._inverse = inverse
        self.shift = (damping + jitter) * mean_diagonal(M)
        self.jitter = jitter
        M.diagonal().add_(self.shift)
        self.damped = M

    @classmethod
    def checked(cls, M: Tensor, damping: float, name: str) -> DampedFactor:
        """A factor that is factorised at once, with the jitter that this needs: the host waits for the device.

        Raises:
            NumericalError: no jitter makes it positive definite; the message names ``name``.
        """
        with numerical_errors():
            solved = spd_inverse(M, damping, name=name)
        factor = cls(M, damping, solved.jitter)
        factor.inverse = solved.inverse
        return factor

    @cached_property
    def inverse(self) -> Tensor:
        """``(M + shift I)⁻¹``; does not check that there is one, to avoid a host sync."""
        return unchecked_inverse(self.damped) if self._inverse is None else self._inverse.full()

    @cached_property
    def leading(self) -> Tensor:
        """:func:`~surgeon_kernels.leading_vectors` of the damped factor."""
        return leading_vectors(self.damped, self.inverse)

    def undamped(self) -> Tensor:
        """``M`` as a new matrix."""
        M = self.damped.clone()
        M.diagonal().sub_(self.shift)
        return M


class KroneckerFactors(NamedTuple):
    """Curvature ``F ≈ G ⊗ A`` of one linear ``[R, C']``, both factors damped: ``F vec(X)`` is ``G X A``.

    Attributes:
        g: ``G`` ``[R, R]``; a: ``A`` ``[C', C']``, C' = C + 1 where the linear has a bias. Linears that share their
            input share ``a``.
    """

    g: DampedFactor
    a: DampedFactor

    @property
    def damped(self) -> tuple[Tensor, Tensor]:
        """``G`` and ``A``, damped."""
        return self.g.damped, self.a.damped

    @property
    def inverses(self) -> tuple[Tensor, Tensor]:
        """``G⁻¹`` and ``A⁻¹`` of the damped factors, computed when first asked for."""
        return self.g.inverse, self.a.inverse

    def leading(self) -> tuple[Tensor, Tensor]:
        """Leading vectors of ``G`` and ``A``, computed when first asked for."""
        return self.g.leading, self.a.leading

    @property
    def diagonals(self) -> tuple[Tensor, Tensor]:
        """``diag(G)`` ``[R]`` and ``diag(A)`` ``[C']`` of the damped factors, views."""
        return self.g.damped.diagonal(), self.a.damped.diagonal()

    @property
    def inverse_diagonals(self) -> tuple[Tensor, Tensor]:
        """``diag(G⁻¹)`` ``[R]`` and ``diag(A⁻¹)`` ``[C']``, views of the inverses."""
        return self.g.inverse.diagonal(), self.a.inverse.diagonal()

    def product(self, X: Tensor) -> Tensor:
        """``G X A`` with the damped factors, ``X`` and the result ``[R, C']``."""
        return kron_product(self.g.damped, X, self.a.damped)

    def inverse_product(self, X: Tensor) -> Tensor:
        """``G⁻¹ X A⁻¹`` with the damped factors' inverses."""
        return kron_product(self.g.inverse, X, self.a.inverse)

    def predicted_increase(self, delta: Tensor) -> Tensor:
        """``½ tr(Δᵀ G Δ A)`` without damping, nats per token: float64, on the device.

        For the report alone: on a GPU the operands of its products are rounded to 11 bits.
        """
        G, A = self.g.undamped(), self.a.undamped()
        if fits_split(delta):
            product = kron_product_split(G, delta, A, scales=self.diagonals, parts=1)
        else:
            product = G @ delta @ A
        return 0.5 * (delta * product).sum(dtype=torch.float64)


class DampedFactors:
    """``G + λ_G mean(diag G) I`` and ``A + λ_A mean(diag A) I`` of every layer, a layer at a time.

    The diagonals of all inverses are computed at once, when first asked for: that is when factorisations are checked
    and their jitter is found, with one wait for the device. What follows takes the jitter as known. Curvature that
    lies in main memory is copied to ``device`` a layer ahead. Of the factors themselves only the last ``A`` is kept:
    linears that share their input follow each other. With ``keep_inverses`` the inverses are computed with their
    diagonals and kept as the factors are, half of each; else they are computed anew for a layer's turn.
    """

    def __init__(
        self,
        curvature: Curvature,
        config: PruneConfig,
        linears: list[PrunableLinear],
        device: torch.device,
        *,
        keep_inverses: bool = False,
    ) -> None:
        self._curvature, self._config, self._linears, self.device = curvature, config, linears, device
        self._keep_inverses = keep_inverses
        self._inverses: dict[_Key, SymmetricAccumulator] = {}
        self._following = dict(zip((linear.name for linear in linears), linears[1:], strict=False))
        self._prefetcher = Prefetcher(device)
        self._last_a: tuple[_Key, DampedFactor] | None = None
        self._diagonals: dict[_Key, Tensor] | None = None
        self._jitter: dict[_Key, float] = {}
        self.jitter: dict[str, float] = {}  # layer -> largest jitter a factorisation needed

    def of(self, linear: PrunableLinear) -> KroneckerFactors:
        """Both factors of ``linear``, where gradients were captured.

        Raises:
            NumericalError: a factor is not positive definite; the message names the layer.
        """
        if self._config.method_record.compensates:
            self._factorised()
        return self._load(linear)

    def diagonals(self, linear: PrunableLinear) -> tuple[Tensor | None, Tensor]:
        """``diag(G)`` ``[R]``, None where gradients were not captured, and ``diag(A)`` ``[C']`` without damping."""
        G, A = self._curvature.factors(linear)
        g = None if G is None else G.diagonal().to(self.device, copy=True)  # no views of the factors
        return g, A.diagonal().to(self.device, copy=True)

    def inverse_diagonals(self, linear: PrunableLinear) -> tuple[Tensor, Tensor]:
        """``diag(G⁻¹)`` ``[R]`` and ``diag(A⁻¹)`` ``[C']`` of the damped factors; raises as :meth:`of`."""
        diagonals = self._factorised()
        return diagonals[_key_g(linear)], diagonals[_key_a(linear)]

    def note_jitter(self, linear: PrunableLinear, jitter: float) -> None:
        """Record the jitter that a factorisation for ``linear`` needed, for the report."""
        if jitter > 0.0:
            self.jitter[linear.name] = max(jitter, self.jitter.get(linear.name, 0.0))

    def _factorised(self) -> dict[_Key, Tensor]:
        """The diagonals of all inverses; with the first call come the jitters."""
        if self._diagonals is None:
            self._diagonals = self._factorise()
        return self._diagonals

    def _factorise(self) -> dict[_Key, Tensor]:
        diagonals: dict[_Key, Tensor] = {}
        good: list[Tensor] = []
        owners: list[tuple[_Key, PrunableLinear]] = []
        for linear in self._linears:
            for key, factor in zip((_key_g(linear), _key_a(linear)), self._load(linear), strict=True):
                if key not in diagonals:
                    if self._keep_inverses:
                        inverse, diagonals[key], fine = inverse_and_diagonal(factor.damped)
                        self._inverses[key] = SymmetricAccumulator.of(inverse)
                        del inverse  # frees it before the next factor is loaded
                    else:
                        diagonals[key], fine = inverse_diagonal(factor.damped)
                    good.append(fine)
                    owners.append((key, linear))
        for (key, linear), fine in zip(owners, to_list(good), strict=True):
            if not fine:
                diagonals[key] = self._escalate(key, linear)
        for linear in self._linears:
            self.note_jitter(linear, max(self._jitter.get(key, 0.0) for key in (_key_g(linear), _key_a(linear))))
        self._last_a = None  # damped before its jitter was known
        return diagonals

    def _escalate(self, key: _Key, linear: PrunableLinear) -> Tensor:
        """Find the jitter that a factor needs; the diagonal of its inverse then."""
        G, A = self._curvature.factors(linear)
        M, damping = (G, self._config.damp_g) if key[0] == "G" else (A, self._config.damp_a)
        assert M is not None
        factor = DampedFactor.checked(M.to(self.device), damping, f"{key[0]} of {linear.name}")
        self._jitter[key] = factor.jitter
        if self._keep_inverses:
            self._inverses[key] = SymmetricAccumulator.of(factor.inverse)
        return factor.inverse.diagonal().clone()

    def _load(self, linear: PrunableLinear) -> KroneckerFactors:
        key = _key_a(linear)
        held = self._last_a is not None and self._last_a[0] == key
        G, *others = self._fetch(linear, with_a=not held)
        g = self._damped(G.full(), _key_g(linear))
        if not held:
            size = linear.columns + linear.has_bias
            self._last_a = None  # frees it before the next one is made
            self._last_a = (key, self._damped(others[0].full()[:size, :size], key))
        assert self._last_a is not None
        return KroneckerFactors(g, self._last_a[1])

    def _damped(self, total: Tensor, key: _Key) -> DampedFactor:
        damping = self._config.damp_g if key[0] == "G" else self._config.damp_a
        M = total.div_(self._curvature.tokens)
        return DampedFactor(M, damping, self._jitter.get(key, 0.0), self._inverses.get(key))

    def _fetch(self, linear: PrunableLinear, *, with_a: bool) -> list[SymmetricAccumulator]:
        """The sums ``G`` and, ``with_a``, ``A`` on the device; the next linear's are on their way then."""
        sums = self._sums(linear, with_a=with_a)
        if all(part.device == self.device for part in sums):
            return sums
        copies = self._prefetcher.take((linear.name, with_a), [part.storage for part in sums])
        following = self._following.get(linear.name, self._linears[0])
        with_a = _key_a(following) != _key_a(linear)
        ahead = self._sums(following, with_a=with_a)
        self._prefetcher.start((following.name, with_a), [part.storage for part in ahead])
        return [SymmetricAccumulator(part.n, copy) for part, copy in zip(sums, copies, strict=True)]

    def _sums(self, linear: PrunableLinear, *, with_a: bool) -> list[SymmetricAccumulator]:
        A, G = self._curvature.sums(linear)
        return [G, A] if with_a else [G]


def _key_g(linear: PrunableLinear) -> _Key:
    return "G", linear.name, False


def _key_a(linear: PrunableLinear) -> _Key:
    return "A", linear.input_group, linear.has_bias
