"""Training of what pruning left, with its state on disk where it is to go on after an interruption."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.distributed import ALONE
from llm_surgeon.errors import NumericalError
from llm_surgeon.interrupts import uninterrupted
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.passes import autocast, compute_dtype, dtype_of_products, mean_loss, to_list
from llm_surgeon.models.state import ModelState
from llm_surgeon.progress import Progress
from llm_surgeon.recovery.masters import float32_masters
from llm_surgeon.recovery.objective import TokenLoss
from llm_surgeon.recovery.optimizers import NaturalGradient, Preconditioner, adamw, preconditioners
from llm_surgeon.recovery.state import latest_checkpoint, save_checkpoint

_logger = logging.getLogger(__name__)

_LARGEST_NORM = 1.0  # gradients that are larger together are cut down to it
_TRIAL_RATES = (1 / 3, 1.0, 3.0)
_TRIALS_SHARE = 1 / 4  # of the time, at most: an estimate


class Objective(Protocol):
    """Loss of a batch, for autograd to go back through."""

    def __call__(self, model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor: ...


def train(
    model: nn.Module,
    windows: Calibration,
    held_out: Calibration | None,
    config: RecoverConfig,
    folder: Path | None = None,
    *,
    objective: Objective | None = None,
    seconds: float | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place on ``windows``, gone through in random order, and leave it in its best state.

    Computes with bfloat16 products on a GPU that has them, with float32 weights. The learning rate rises and falls with
    the share that is done, of the steps or of the time, whichever is more.

    Args:
        held_out: sequences whose loss decides which state is best and when to stop; ``None``: train to the end.
        folder: where the first rank keeps the state at every evaluation, for ``resume`` to go on; ``None``: nowhere.
        objective: the loss; left out, that of the tokens.
        seconds: that all may take, trials of learning rates included, beside the last evaluation.

    Returns:
        For every evaluation its ``step``, the ``learning_rate`` of that step, the mean ``loss`` since the one before,
        and the held-out ``eval_loss`` (with ``ema`` also ``average_loss``). Before that, for every trial, ``step`` 0,
        its ``trial_rate`` and the held-out ``trial_loss``, which one that diverged lacks.

    Raises:
        NumericalError: a loss that is not a number; InputError: ``folder`` cannot be written.
    """
    before = ModelState(model)
    full = nullcontext() if config.lora else float32_masters(model)
    try:
        with full:
            training = _Training(model, windows, held_out, config, objective or TokenLoss(), seconds)
            return training.run(folder, resume, progress or Progress())
    finally:
        before.restore_around_weights()


class _Training:
    """A training under way."""

    def __init__(
        self,
        model: nn.Module,
        windows: Calibration,
        held_out: Calibration | None,
        config: RecoverConfig,
        objective: Objective,
        seconds: float | None,
    ) -> None:
        self._begun = time.perf_counter()
        self._model, self._windows, self._held_out = model, windows, held_out
        self._ranks, enough = windows.ranks, config.batch_size >= windows.ranks.count
        self._sharing = self._ranks if enough else ALONE  # of few windows a step every rank takes all
        self._config, self._objective, self._seconds = config, objective, self._ranks.agreed(seconds)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._device = next(model.parameters()).device
        self._dtype = dtype_of_products(self._device)
        self._micro = config.windows_at_once(windows.input_ids.shape[1])
        self._order = _Order(len(windows.input_ids), config.seed)
        self._step, self._evaluations, self._worse = 0, 0, 0
        self._steps_noted = 0  # as many of their losses are not in the log yet
        self._last_step = 0.0  # its seconds
        self._learning_rate = config.learning_rate
        self._log: list[dict[str, float]] = []
        self._losses: list[Tensor] = []
        self._best: dict[str, Tensor] | None = None
        self._best_loss, self._least_loss = math.inf, math.inf  # the weights to begin with count, and do not
        self._average = self._copy() if config.ema and held_out is not None else None
        self._optimizers: list[Optimizer] = []

    def run(self, folder: Path | None, resume: bool, progress: Progress) -> list[dict[str, float]]:
        config = self._config
        state = None if folder is None or not resume else self._read(folder)
        if state is None and self._held_out is not None:
            measured = self._elapsed
            self._best, self._best_loss = self._copy(), self._held_out_loss(self._held_out)
            if config.trial_steps:
                self._choose_learning_rate(self._best, self._held_out, self._elapsed - measured, progress)
        self._optimizers = self._make_optimizers()
        if self._seconds is not None:  # what is left of them
            self._seconds, self._begun = self._seconds - self._elapsed, time.perf_counter()
        if state is not None:
            self._load(state)
        self._take_steps(folder, progress)
        if self._best is not None:
            self._write(self._best)
        self._take_first_ranks()
        return self._log

    def _take_steps(self, folder: Path | None, progress: Progress) -> None:
        """Train until the steps are done, the time is over or the held-out loss does not fall any more."""
        config = self._config
        self._model.train()
        while (done := self._done()) < config.steps and self._worse < config.patience:
            rate, begun = self._learning_rate * share_of_peak(done, config), time.perf_counter()
            self._take_step(rate)
            self._last_step = self._ranks.agreed(time.perf_counter() - begun)
            done = self._done()
            if self._seconds is None:
                progress.step(self._step, config.steps)
            else:
                progress.step(int(self._elapsed), int(self._seconds), "seconds")
            due = int(done // config.eval_every)
            if due > self._evaluations or done >= config.steps:
                self._evaluations = due
                self._evaluate(rate)
                if folder is not None and self._held_out is not None:
                    state = self._state()  # which asks all ranks for the time
                    if self._ranks.first:
                        save_checkpoint(folder, self._step, state)

    @property
    def _elapsed(self) -> float:
        return self._ranks.agreed(time.perf_counter() - self._begun)

    def _done(self) -> float:
        """Steps that are done, or that stand for the time that is over where that is more; all, where it ends before
        another one would.
        """
        if self._seconds is None:
            return self._step
        elapsed = self._elapsed
        spent = 1.0 if elapsed + self._last_step > self._seconds else elapsed / max(self._seconds, 1e-9)
        return max(self._step, self._config.steps * min(spent, 1.0))

    def _take_step(self, rate: float) -> None:
        config = self._config
        torch.manual_seed((config.seed + self._step) % 2**32)  # of dropout: going on from any step gives the same
        rows = self._order.rows(self._step, config.batch_size)
        for part in rows[self._sharing.share(len(rows))].split(self._micro):
            ids, mask = self._batch(part)
            with autocast(self._device, self._dtype):
                loss = self._objective(self._model, ids, mask) / (len(rows) / len(part))
            loss.backward()
            self._losses.append(loss.detach())
        for parameter in self._trained.values():
            if parameter.grad is not None:
                self._sharing.sum_(parameter.grad)
        torch.nn.utils.clip_grad_norm_(self._trained.values(), _LARGEST_NORM)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        self._step += 1
        self._steps_noted += 1
        if self._average is not None:
            decay = min(config.ema, self._step / (self._step + 10))  # the first weights are forgotten soon
            values = [p.detach() for p in self._trained.values()]
            torch._foreach_lerp_(list(self._average.values()), values, 1 - decay)

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Windows on the device, which the host does not wait for."""

        def moved(values: Tensor) -> Tensor:
            chosen = values[rows.to(values.device)]
            if self._device.type == "cuda" and chosen.device.type == "cpu":
                chosen = chosen.pin_memory()
            return chosen.to(self._device, non_blocking=True)

        mask = self._windows.attention_mask
        return moved(self._windows.input_ids), None if mask is None else moved(mask)

    def _evaluate(self, rate: float) -> None:
        """Note the losses, and keep the weights, or their mean, where they are the best so far."""
        loss = self._ranks.agreed(self._sharing.total(sum(to_list(self._losses)))) / self._steps_noted
        entry = {"step": self._step, "learning_rate": rate, "loss": loss}
        self._losses.clear()
        self._steps_noted = 0
        self._log.append(entry)
        if not math.isfinite(entry["loss"]):
            raise self._no_number("loss")
        if self._held_out is None:
            return
        entry["eval_loss"] = self._held_out_loss(self._held_out)
        better = self._keep_if_best(entry["eval_loss"])
        if self._average is not None:
            own = self._copy()
            try:
                self._write(self._average)
                entry["average_loss"] = self._held_out_loss(self._held_out)
                better |= self._keep_if_best(entry["average_loss"])
            finally:
                uninterrupted(partial(self._write, own))
        self._worse = 0 if better else self._worse + 1

    def _keep_if_best(self, loss: float) -> bool:
        """Keep the weights if they are the best so far, those at the start included; True if the training had none."""
        if loss < self._best_loss:
            self._best, self._best_loss = self._copy(), loss
        better = loss < self._least_loss
        self._least_loss = min(loss, self._least_loss)
        return better

    def _held_out_loss(self, held_out: Calibration) -> float:
        self._take_first_ranks()
        base = self._base()
        try:
            return mean_loss(base, held_out, self._micro, compute_dtype("auto", base, self._device))
        except NumericalError as error:
            raise self._no_number("eval_loss") from error

    def _take_first_ranks(self) -> None:
        """Take rank 0's weights, where every rank trains by itself: passes on a GPU need not repeat to the bit."""
        if self._sharing is not self._ranks:
            for parameter in self._trained.values():
                self._ranks.broadcast_(parameter.detach())

    def _no_number(self, name: str) -> NumericalError:
        return NumericalError(f"the {name} is not a number after {self._step} steps: lower learning_rate")

    def _choose_learning_rate(
        self, start: dict[str, Tensor], held_out: Calibration, evaluation: float, progress: Progress
    ) -> None:
        """Take the best of some learning rates, each tried from the weights ``start`` on the same windows.

        Args:
            evaluation: seconds of a held-out loss.
        """
        seconds = None
        if self._seconds is not None:
            seconds = _TRIALS_SHARE * self._seconds / len(_TRIAL_RATES) - evaluation
            if seconds <= 0.0:
                _logger.warning("the time is too short for trials of learning rates: there are none")
                return
        losses = {}
        for rate in (factor * self._config.learning_rate for factor in _TRIAL_RATES):
            progress.phase(f"trial of learning rate {rate:.2g}")
            try:
                losses[rate] = self._trial_loss(rate, held_out, seconds, progress)
            except NumericalError:
                losses[rate] = math.inf
            finally:
                uninterrupted(partial(self._write, start))
            # No loss where it was no number: reports are JSON, which knows none.
            finite = {"trial_loss": losses[rate]} if math.isfinite(losses[rate]) else {}
            self._log.append({"step": 0, "trial_rate": rate, **finite})
        self._learning_rate = min(losses, key=lambda rate: losses[rate])
        progress.phase("training")

    def _trial_loss(self, rate: float, held_out: Calibration, seconds: float | None, progress: Progress) -> float:
        """Train with a learning rate for the steps of a trial, or as many as ``seconds`` allow: the held-out loss."""
        steps = self._config.trial_steps
        settings = dataclasses.replace(
            self._config, learning_rate=rate, steps=steps, eval_every=steps, warmup_steps=steps // 5, trial_steps=0,
            minutes=None, ema=0.0,
        )  # fmt: skip
        trial = _Training(self._model, self._windows, None, settings, self._objective, seconds)
        trial._optimizers = self._make_optimizers()
        trial._take_steps(None, progress)
        return trial._held_out_loss(held_out)

    def _make_optimizers(self) -> list[Optimizer]:
        config, others = self._config, dict.fromkeys(self._trained.values())
        found: list[Optimizer] = []
        if config.optimizer == "natural":
            found.append(NaturalGradient(self._preconditioners, config.learning_rate))
            others = dict.fromkeys(p for p in others if p not in self._preconditioners)
        return [*found, adamw(others, config)] if others else found

    @cached_property
    def _preconditioners(self) -> dict[nn.Parameter, Preconditioner]:
        """Those of the weights at the start, which trials share."""
        base, config = self._base(), self._config
        return preconditioners(base, find_decoder(base), self._windows, self._micro, self._dtype, config.seed)

    def _base(self) -> Any:
        """The model itself, without adapters around it."""
        return self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model  # type: ignore[operator]

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._trained.items():
            parameter.copy_(values[name])

    def _state(self) -> dict[str, Any]:
        """All that going on takes: tensors, numbers, and lists and dictionaries of these."""
        return {
            "weights": {name: parameter.detach() for name, parameter in self._trained.items()},
            "best": self._best,
            "average": self._average,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "numbers": {
                name: getattr(self, name) for name in
                ("_step", "_evaluations", "_worse", "_learning_rate", "_best_loss", "_least_loss", "_log", "_seconds")
            },
            "elapsed": self._elapsed,
        }  # fmt: skip

    def _read(self, folder: Path) -> dict[str, Any] | None:
        """The newest state that rank 0 finds in ``folder``, on every rank."""
        path = latest_checkpoint(folder) if self._ranks.first else None
        if not self._ranks.agreed(path is not None):
            return None
        read = partial(torch.load, map_location=self._device, weights_only=True)
        return next(self._ranks.spread([path], lambda _: 0, read))

    def _load(self, state: dict[str, Any]) -> None:
        self._write(state["weights"])
        self._best, self._average = state["best"], state["average"]
        for optimizer, its_state in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        vars(self).update(state["numbers"])
        self._begun = time.perf_counter() - state["elapsed"]


class _Order:
    """Windows in random order, in another one each time that all have been."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._round, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def rows(self, step: int, batch_size: int) -> Tensor:
        """Rows of the batch of ``step`` (from 0), int64 ``[batch_size]``."""
        return torch.stack([self._row(index) for index in range(step * batch_size, (step + 1) * batch_size)])

    def _row(self, index: int) -> Tensor:
        if index // self._count != self._round:
            self._round = index // self._count
            generator = torch.Generator().manual_seed(self._seed + self._round)
            self._permutation = torch.randperm(self._count, generator=generator)
        return self._permutation[index % self._count]


def share_of_peak(done: float, config: RecoverConfig) -> float:
    """Learning rate after ``done`` steps as a share of the peak: a straight rise, and half a cosine down to zero."""
    if done < config.warmup_steps:
        return done / config.warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (done - config.warmup_steps) / (config.steps - config.warmup_steps)))
