"""A pruning run, shot by shot (Algorithm 1 of LLM Surgeon): schedule, phases, losses, corrections and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

from llm_surgeon.models.offload import offloaded
from llm_surgeon.models.passes import to_list
from llm_surgeon.report.schema import ShotReport
from llm_surgeon.shots.run import Run, Shot, Shots


@dataclass
class Outcome:
    """Findings of :func:`run_shots`: a report for every shot, and the held-out losses before and after, or none."""

    shots: list[ShotReport]
    held_out: list[float]


def run_shots(shots: Shots, run: Run, before_update: Callable[[], object] = lambda: None) -> Outcome:
    """Carry out every shot, all but ``shots.finish()``; ``before_update`` is called whenever weights will change.

    Raises:
        NumericalError: NaN or infinity, or a factor that is not positive definite; the layer is named.
    """
    outcome, losses = Outcome([], []), []
    with ExitStack() as resources, ExitStack() as home:
        if run.config.offloads:
            home.enter_context(offloaded(run.model, run.decoder, run.plan.device))
        shots.begin(resources)
        _measure_held_out(run, outcome)
        for shot in _schedule(run):
            losses.append(_carry_out(shots, run, shot, before_update))
            outcome.shots.append(shot.report)
        with shots.pruned():
            shot.phase("measure loss")
            losses.append(run.loss())
            shot.end_phase()
            run.progress.shots_done()
            _measure_held_out(run, outcome)
    for report, (before, after) in zip(outcome.shots, pairwise(losses), strict=True):
        report.measured_increase = after - before
    return outcome


def _schedule(run: Run) -> Iterator[Shot]:
    """The shots: after shot t of T the fraction ``1 - (1 - t/T)^schedule`` of what the run removes is gone."""
    config = run.config
    run.progress.shots(config.shots)
    index, last = 0, False
    while not last:
        index += 1
        run.progress.shot(index)
        # Where the number of shots turned out larger than it seemed, everything may be gone.
        left = max(0.0, 1.0 - index / config.shots)
        fraction = 1.0 - left**config.schedule
        report = ShotReport(index, config.sparsity * fraction, 0.0)
        shot = Shot(index, fraction, index == config.shots, report, run.progress)
        yield shot
        last = shot.last


def _carry_out(shots: Shots, run: Run, shot: Shot, before_update: Callable[[], object]) -> float:
    """One shot; the loss before it."""
    config, report = run.config, shot.report
    shot.phase("curvature")
    loss = shots.measure(shot)
    shot.phase("selection")
    shots.select(shot)
    shot.phase("update")
    before_update()
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


def _measure_held_out(run: Run, outcome: Outcome) -> None:
    if run.held_out is not None:
        run.progress.phase("held-out loss")
        outcome.held_out.append(run.loss(run.held_out))
