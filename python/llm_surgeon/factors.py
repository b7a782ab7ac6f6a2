"""Damped factors of one layer at a time, with their inverses."""

from __future__ import annotations

from llm_surgeon.capture import Curvature
from llm_surgeon.config import PruneConfig
from llm_surgeon.errors import NumericalError
from llm_surgeon.models import PrunableLinear
from surgeon_kernels import DampedInverse, NotPositiveDefiniteError, spd_inverse


class DampedFactors:
    """``G + λ_G mean(diag G) I`` and ``A + λ_A mean(diag A) I`` of a layer, inverted when asked for.

    Only the last ``A`` is kept: linears that share their input follow each other, so each ``A`` is inverted once.
    """

    def __init__(self, curvature: Curvature, config: PruneConfig) -> None:
        self._curvature, self._config = curvature, config
        self._last_a: tuple[tuple[str, bool], DampedInverse] | None = None
        self.jitter: dict[str, float] = {}  # layer -> largest jitter a factorisation needed

    def of(self, linear: PrunableLinear) -> tuple[DampedInverse, DampedInverse]:
        """Damped ``G`` and ``A`` of ``linear`` with their inverses.

        Raises:
            NumericalError: a factor is not positive definite; the message names the layer.
        """
        assert self._config.damp_g is not None
        G, A = self._curvature.factors(linear)
        assert G is not None
        key = (linear.input_group, linear.has_bias)
        try:
            g = spd_inverse(G, self._config.damp_g, name=f"G of {linear.name}")
            if self._last_a is None or self._last_a[0] != key:
                self._last_a = (key, spd_inverse(A, self._config.damp_a, name=f"A of {linear.name}"))
        except NotPositiveDefiniteError as error:
            raise NumericalError(str(error)) from error
        a = self._last_a[1]
        self.note_jitter(linear, max(g.jitter, a.jitter))
        return g, a

    def note_jitter(self, linear: PrunableLinear, jitter: float) -> None:
        """Record the jitter that a factorisation for ``linear`` needed, for the report."""
        if jitter > 0.0:
            self.jitter[linear.name] = max(jitter, self.jitter.get(linear.name, 0.0))
