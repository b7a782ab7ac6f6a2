"""A pruning run, shot by shot (Algorithm 1 of LLM Surgeon): schedule, phases, losses, corrections and reports."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Literal

from llm_surgeon.checkpoint.states import State
from llm_surgeon.models.offload import offloaded
from llm_surgeon.models.passes import to_list
from llm_surgeon.report.decode import decode
from llm_surgeon.report.schema import ShotReport
from llm_surgeon.shots.retries import measured
from llm_surgeon.shots.run import Run, Shot, Shots

_logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """Findings of :func:`run_shots`.

    Attributes:
        shots: a report for every shot.
        losses: of the calibration windows, nats per token, before every shot and after the last.
        held_out, evaluation: the losses of these windows before and after, or none.
        last: no shot is left.
        seconds: of interrupted runs, as far as they are gone on from.
    """

    shots: list[ShotReport]
    losses: list[float]
    held_out: list[float]
    evaluation: list[float]
    last: bool = False
    seconds: float = 0.0


def run_shots(shots: Shots, run: Run, before_update: Callable[[], object] = lambda: None) -> Outcome:
    """Carry out every shot, all but ``shots.finish()``; ``before_update`` is called whenever weights will change.

    Raises:
        NumericalError: NaN or infinity, or a factor that is not positive definite; the layer is named.
    """
    outcome, started = Outcome([], [], [], []), time.perf_counter()
    with ExitStack() as resources, ExitStack() as home:
        if run.config.offloads:
            home.enter_context(offloaded(run.model, run.decoder, run.plan.device))
        shots.begin(resources)
        begun = run.states.last_shot()
        if begun is None:
            _measure_unseen(run, outcome)
        else:
            before_update()
            shots.restore(State(begun.tensors, begun.note["shots"]))
            outcome = decode(Outcome, begun.note["outcome"], "outcome")
            _logger.info("goes on after shot %d", len(outcome.shots))
        for shot in _schedule(run, outcome):
            outcome.losses.append(_carry_out(shots, run, shot, before_update))
            outcome.shots.append(shot.report)
            outcome.last = shot.last
            if run.states.keeps:
                state, seconds = shots.state(), outcome.seconds + time.perf_counter() - started
                note = {"shots": state.note, "outcome": asdict(replace(outcome, seconds=seconds))}
                run.states.put_shot(shot.index, State(state.tensors, note))
        with shots.pruned():
            shot = Shot(len(outcome.shots), 1.0, True, outcome.shots[-1], run.progress)
            shot.phase("measure loss")
            outcome.losses.append(run.loss())
            shot.end_phase()
            run.progress.shots_done()
            _measure_unseen(run, outcome)
        run.states.settle()
    for report, (before, after) in zip(outcome.shots, pairwise(outcome.losses), strict=True):
        report.measured_increase = after - before
    return outcome


def _schedule(run: Run, outcome: Outcome) -> Iterator[Shot]:
    """The shots left: after shot t of T the fraction ``1 - (1 - t/T)^schedule`` of what the run removes is gone."""
    config = run.config
    run.progress.shots(config.shots)
    while not outcome.last:
        index = len(outcome.shots) + 1
        run.progress.shot(index)
        # Where the number of shots turned out larger than it seemed, everything may be gone.
        left = max(0.0, 1.0 - index / config.shots)
        fraction = 1.0 - left**config.schedule
        report = ShotReport(index, config.removed_fraction * fraction, 0.0)
        yield Shot(index, fraction, index == config.shots, report, run.progress)


def _carry_out(shots: Shots, run: Run, shot: Shot, before_update: Callable[[], object]) -> float:
    """One shot; the loss before it."""
    config, report = run.config, shot.report
    shot.phase("curvature")
    loss = measured(run, lambda: shots.measure(shot))
    shot.phase("selection")
    shots.select(shot)
    shot.phase("update")
    before_update()
    run.states.settle()
    shots.update(shot)
    if config.lora_rank:
        shot.phase("correction")
        from llm_surgeon.recovery.correct import correct  # brings peft: only where it is used

        data = run.calibration if run.correction_data is None else run.correction_data
        correct(run.model, run.decoder, data, config, shot.index, run.progress)
    shot.end_phase()
    removed = sum(to_list([selection.pruned.count_nonzero() for selection in shots.selections]))
    report.sparsity = removed / sum(selection.pruned.numel() for selection in shots.selections)
    report.loss_before, report.correction_rank = loss, shot.index * config.lora_rank
    return loss


def _measure_unseen(run: Run, outcome: Outcome) -> None:
    _measure(run, outcome.held_out, "held_out")
    _measure(run, outcome.evaluation, "evaluation")


def _measure(run: Run, losses: list[float], name: Literal["held_out", "evaluation"]) -> None:
    """Add the loss of windows of ``run`` to ``losses``."""
    if getattr(run, name) is not None:
        run.progress.phase(f"{name.replace('_', '-')} loss")
        if losses:  # of the same windows
            losses.append(run.loss(getattr(run, name)))
        else:
            losses.append(measured(run, lambda: run.loss(getattr(run, name)), name))
