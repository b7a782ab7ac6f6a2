"""Curvature of a shot: estimated, damped, and the costs that it gives."""

from __future__ import annotations

import functools

from torch import Tensor

from llm_surgeon.curvature.estimate import Curvature
from llm_surgeon.curvature.factors import DampedFactors, KroneckerFactors
from llm_surgeon.methods.costs import element_costs, row_column_costs
from llm_surgeon.methods.two_terms import TwoTermCurvature
from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.models.offload import PinnedMemory
from llm_surgeon.shots.run import Run
from surgeon_kernels import WeightCosts


class ShotCurvature:
    """Curvature as the run's method needs it, estimated anew in every shot.

    Attributes:
        factors: damped factors of the shot under way; ``None`` where there are none.
        estimated: what a sequential update takes, which needs no ``A``; ``None`` for others.
        two_terms: with ``kron_rank`` 2 the sums of two Kronecker products.
    """

    def __init__(self, run: Run, memory: PinnedMemory) -> None:
        """``memory`` takes the factors of a shot, where they do not stay on the device."""
        self._run, self._method, self._memory = run, run.config.method_record, memory
        self.factors: DampedFactors | None = None
        self.estimated: Curvature | None = None
        self.two_terms: TwoTermCurvature | None = None

    def estimate(self, index: int, *, sweeps: bool, selects: bool) -> float:
        """Estimate the curvature of shot ``index``; the mean loss of the calibration windows.

        Args:
            sweeps: the shot's update is sequential.
            selects: costs are asked for.
        """
        run, config = self._run, self._run.config
        if not self._method.curvature:
            return run.loss()
        self._memory.reuse()
        norms = sweeps and run.token_weights
        found = self._estimate(index, inputs=selects, squared_norms=norms)
        if sweeps:
            self.estimated = found
        if not selects:
            return found.loss
        keep = run.plan.inverses_bytes > 0
        self.factors = DampedFactors(found, config, run.own_linears, run.plan.device, keep_inverses=keep)
        if config.kron_rank == 2:
            self.two_terms = TwoTermCurvature(run.decoder, config, found, functools.partial(self._estimate, index))
        return found.loss

    def costs(self) -> list[WeightCosts]:
        """Cost of removing each weight of every linear, ``[R, C]``."""
        linears = self._run.decoder.linears
        found = zip(linears, self._run.each_linear(self._cost_factors), strict=True)
        return [WeightCosts(*own) if len(own) == 1 else WeightCosts(linear.weight, *own) for linear, own in found]

    def _cost_factors(self, linear: PrunableLinear) -> tuple[Tensor, ...]:
        """Costs of a linear, or ``g`` and ``a`` of :class:`WeightCosts`: all but its weight."""
        if self.two_terms is not None:
            costs = self.two_terms.costs(linear)
        else:
            costs = element_costs(linear, self._method, self.factors)
        return (costs.weight,) if costs.g is None or costs.a is None else (costs.g, costs.a)

    def line_costs(self, linear: PrunableLinear) -> tuple[Tensor, Tensor]:
        """Cost of removing each row, ``[R]``, and each column, ``[C]``."""
        return row_column_costs(linear, self._method, self.factors)

    def factors_of(self, linear: PrunableLinear) -> KroneckerFactors | None:
        """Both factors of a linear; ``None`` where the method estimates none, or A alone."""
        return self.factors.of(linear) if self.factors is not None and self._method.gradients else None

    def after_update(self) -> DampedFactors:
        """Factors for gradient steps: the shot's; after a sequential update its ``G``, with ``A`` of pruned inputs."""
        run, config = self._run, self._run.config
        if self.factors is not None:
            return self.factors
        assert self.estimated is not None
        inputs = self._estimate(1, gradients=False)
        found, keep = self.estimated.with_inputs_of(inputs), run.plan.inverses_bytes > 0
        return DampedFactors(found, config, run.own_linears, run.plan.device, keep_inverses=keep)

    def free(self) -> None:
        """Let go of the shot's curvature."""
        self.factors = self.estimated = self.two_terms = None

    def _estimate(
        self, index: int, *, gradients: bool = True, inputs: bool = True, squared_norms: bool = False
    ) -> Curvature:
        config, plan = self._run.config, self._run.plan
        kept_apart = config.offloads or config.curvature_layers is not None
        return self._run.curvature(
            index,  # sampled labels are fresh in every shot
            gradients=gradients and self._method.gradients,
            inputs=inputs,
            squared_norms=squared_norms,
            blocks_per_pass=plan.blocks_per_pass,
            store=self._memory.store if kept_apart else None,
            owners=self._run.owners,
        )
