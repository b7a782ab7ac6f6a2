"""Trials of other ways to the same sparsity, measured as ``quality.py`` measures the methods.

    python bench/trials.py --models MODEL [MODEL ...] --data wikitext-2.zip --methods "surgeon joint, first-order"

``first-order``: ``W - s G⁻¹ ∇W A⁻¹`` in place of the dense ``W``, both of the last shot, with the step ``s`` of
``STEPS`` that has the least loss on 16 windows held out; no exchanges. ``validated damping``: each shot's damping
likewise. ``last exchanges``: in the last shot only. ``polished``: one more estimate and update at the end.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import quality
import torch
from torch import Tensor
from torch.nn import functional

import llm_surgeon.pruning
import llm_surgeon.shots
from llm_surgeon.capture import mean_loss
from llm_surgeon.data import Calibration
from llm_surgeon.factors import DampedFactor, DampedFactors
from llm_surgeon.models import PrunableLinear, evaluation_mode, run_model
from llm_surgeon.select import Selection
from llm_surgeon.shots import ShotLoop
from llm_surgeon.update import LayerUpdate, remove_and_compensate

STEPS = (0.0, 0.001, 0.003, 0.01, 0.03)
DAMPINGS = ((0.1, 0.01), (0.03, 0.01), (0.3, 0.01), (0.1, 0.003), (0.1, 0.03))
_HELD_OUT = 16


class _Trial(ShotLoop):
    """A loop whose ``compensate`` takes the place of ``remove_and_compensate``."""

    def _update(self, factors: DampedFactors | None) -> Any:
        llm_surgeon.shots.remove_and_compensate = self.compensate
        try:
            return super()._update(factors)
        finally:
            llm_surgeon.shots.remove_and_compensate = remove_and_compensate

    def compensate(
        self, weight: Tensor, selection: Selection, g: DampedFactor, a: DampedFactor, config: Any, name: str
    ) -> LayerUpdate:
        return remove_and_compensate(weight, selection, g, a, config, name)

    def held_out_loss(self) -> float:
        return mean_loss(self.model, self.held_out, self.batch_size)


class LastExchanges(_Trial):
    def compensate(
        self, weight: Tensor, selection: Selection, g: DampedFactor, a: DampedFactor, config: Any, name: str
    ) -> LayerUpdate:
        if len(self.reports) + 1 < config.shots:
            config = dataclasses.replace(config, exchanges=0)
        return remove_and_compensate(weight, selection, g, a, config, name)


class Polished(_Trial):
    def _shot(self, index: int) -> None:
        super()._shot(index)
        if index == self.config.shots:
            super()._shot(index)


class _Validated(_Trial):
    """The last windows are held out of the curvature."""

    def __init__(self, model: Any, decoder: Any, calibration: Calibration, config: Any, progress: Any) -> None:
        ids = calibration.input_ids
        self.held_out = Calibration.of(ids[-_HELD_OUT:])
        super().__init__(model, decoder, Calibration.of(ids[:-_HELD_OUT]), config, progress)


class FirstOrder(_Validated):
    def _around(self, linear: PrunableLinear, weight: Tensor) -> Tensor:
        return weight

    def _update(self, factors: DampedFactors | None) -> Any:
        self.gradients = self._gradients()
        before = {linear.name: linear.matrix().clone() for linear in self.decoder.linears}
        self.step = 0.0
        result = super()._update(factors)
        plain = {linear.name: linear.matrix().clone() for linear in self.decoder.linears}
        selections = self.selections
        self.step = 1.0
        for linear in self.decoder.linears:
            linear.write(before[linear.name])
        super()._update(factors)
        full = {linear.name: linear.matrix().clone() for linear in self.decoder.linears}
        self.selections = selections
        losses = {step: self._loss_at(plain, full, step) for step in STEPS}
        best = min(losses, key=lambda step: losses[step])
        print({step: f"{loss:.4f}" for step, loss in losses.items()}, flush=True)
        self._loss_at(plain, full, best)
        return result

    def _loss_at(self, plain: dict[str, Tensor], full: dict[str, Tensor], step: float) -> float:
        for linear in self.decoder.linears:  # both solve the same masked problem, so does what lies between
            linear.write(plain[linear.name].lerp(full[linear.name], step))
        return self.held_out_loss()

    def compensate(
        self, weight: Tensor, selection: Selection, g: DampedFactor, a: DampedFactor, config: Any, name: str
    ) -> LayerUpdate:
        moved = weight - self.step * (g.inverse @ self.gradients[name] @ a.inverse)
        new = remove_and_compensate(moved, selection, g, a, config, name)
        return dataclasses.replace(new, delta=new.weight - weight)

    def _gradients(self) -> dict[str, Tensor]:
        """``∇W`` (with the bias) of the mean loss of every linear."""
        parameters = [p for linear in self.decoder.linears for p in linear.module.parameters(recurse=False)]
        total, tokens = [torch.zeros_like(p) for p in parameters], 0
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        self.model.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        with evaluation_mode(self.model), torch.enable_grad():
            for ids, mask in self.calibration.batches(self.batch_size, self.device):
                logits = run_model(self.model, ids, mask).logits[:, :-1].flatten(0, 1)
                loss = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
                for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
                    sum_ += gradient
                tokens += logits.shape[0]
        for p, flag in flags:
            p.requires_grad_(flag)
        found = {id(p): sum_ / tokens for p, sum_ in zip(parameters, total, strict=True)}
        gradients = {}
        for linear in self.decoder.linears:
            gradients[linear.name] = found[id(linear.module.weight)]
            if linear.has_bias:
                bias = found[id(linear.module.bias)][:, None]
                gradients[linear.name] = torch.cat([gradients[linear.name], bias], dim=1)
        return gradients


class ValidatedDamping(_Validated):
    def _shot(self, index: int) -> None:
        config, selections, reports = self.config, self.selections, list(self.reports)
        before = {linear.name: linear.matrix().clone() for linear in self.decoder.linears}
        estimated = super()._estimate(index)
        self._estimate = lambda _: estimated  # type: ignore[method-assign]
        found = []
        for damp_g, damp_a in DAMPINGS:
            self.config = dataclasses.replace(config, damp_g=damp_g, damp_a=damp_a)
            self.selections, self.reports = selections, list(reports)
            for linear in self.decoder.linears:
                linear.write(before[linear.name])
            super()._shot(index)
            after = [linear.matrix().clone() for linear in self.decoder.linears]
            found.append((self.held_out_loss(), after, self.selections, self.reports))
        best = min(range(len(found)), key=lambda i: found[i][0])
        print({d: f"{f[0]:.4f}" for d, f in zip(DAMPINGS, found, strict=True)}, flush=True)
        self.config, (_, weights, self.selections, self.reports) = config, found[best]
        for linear, weight in zip(self.decoder.linears, weights, strict=True):
            linear.write(weight)
        del self._estimate


LOOPS: dict[str, tuple[type[ShotLoop], int]] = {  # and rounds of exchanges
    "last exchanges 2": (LastExchanges, 2),
    "polished": (Polished, 1),
    "first-order": (FirstOrder, 0),
    "validated damping": (ValidatedDamping, 1),
}
for _name, (_, _rounds) in LOOPS.items():
    quality.METHODS[f"surgeon joint, {_name}"] = {"method": "surgeon", "update": "joint", "exchanges": _rounds}
_measured = quality.run


def run(trial: dict[str, Any], *arguments: str) -> dict[str, Any]:
    llm_surgeon.pruning.ShotLoop = LOOPS.get(trial["method"].partition(", ")[2], (ShotLoop, 0))[0]  # type: ignore[misc]
    try:
        return _measured(trial, *arguments)
    finally:
        llm_surgeon.pruning.ShotLoop = ShotLoop  # type: ignore[misc]


quality.run = run

if __name__ == "__main__":
    quality.main()
