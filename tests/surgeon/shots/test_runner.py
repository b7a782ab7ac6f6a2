"""The runner: schedule, phases, losses and reports around a shot object."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llm_surgeon import Calibration, PruneConfig
from llm_surgeon.methods.select import Selection
from llm_surgeon.progress import Progress
from llm_surgeon.shots.run import Run
from llm_surgeon.shots.runner import run_shots


class Log(Progress):
    def __init__(self):
        self.lines = []

    def shots(self, total):
        self.lines.append(f"{total} shots")

    def shot(self, index):
        self.lines.append(f"shot {index}")

    def shots_done(self):
        self.lines.append("no more shots")

    def phase(self, name):
        self.lines.append(name)


class FakeShots:
    """Prunes a quarter of four weights a shot; its losses are 1, 2, 3, ..."""

    def __init__(self, log, shots=None):
        self.log, self.shots, self.selections = log.lines, shots, []
        self.fractions, self.loss = [], 0.0

    def begin(self, resources):
        resources.callback(self.log.append, "closed")
        self.selections = [Selection(torch.zeros(2, 2, dtype=torch.bool))]

    @contextmanager
    def pruned(self):
        self.log.append("as pruned")
        yield

    def measure(self, shot):
        self.loss += 1.0
        return self.loss

    def select(self, shot):
        self.fractions.append(shot.fraction)
        self.selections[0].pruned.view(-1)[: shot.index] = True
        if self.shots is not None:
            shot.last = shot.index == self.shots

    def update(self, shot):
        self.log.append("changed")
        if shot.last:
            shot.phase("polish")

    def finish(self):
        raise AssertionError("the runner leaves this to its caller")


def run_of(log, monkeypatch, held_out=None, evaluation=None, **options):
    """A run of a model without weights: the mean loss after the last shot is 10, of others 7."""

    def mean_loss(model, windows, batch_size, dtype):
        assert batch_size == (1 if windows.input_ids.shape[1] == 4 else 2)  # as many tokens at once
        return 10.0 if windows.input_ids.shape[1] == 4 else 7.0

    monkeypatch.setattr("llm_surgeon.shots.run.mean_loss", mean_loss)
    config = PruneConfig(structure="unstructured", method="magnitude", sparsity=0.8, **options)
    plan = SimpleNamespace(batch_size=1, device=torch.device("cpu"))
    calibration, others = (
        Calibration(torch.zeros(2, 4, dtype=torch.long)),
        {"held_out": held_out, "evaluation": evaluation},
    )
    return Run(nn.Module(), None, calibration, config, plan, log, **others)


def test_every_shot_is_measured_selected_and_updated_in_phases(monkeypatch):
    log = Log()
    shots = FakeShots(log)
    held_out = Calibration(torch.zeros(3, 2, dtype=torch.long))
    outcome = run_shots(
        shots, run_of(log, monkeypatch, held_out, held_out, shots=2), lambda: log.lines.append("copied")
    )
    phases = ["curvature", "selection", "update", "copied", "changed"]
    assert log.lines == [
        "held-out loss", "evaluation loss", "2 shots", "shot 1", *phases, "shot 2", *phases, "polish",
        "as pruned", "measure loss", "no more shots", "held-out loss", "evaluation loss",
        "closed",
    ]  # fmt: skip
    first, last = outcome.shots
    assert list(first.seconds) == ["curvature", "selection", "update"]
    assert list(last.seconds) == [*first.seconds, "polish", "measure loss"]
    assert all(seconds >= 0.0 for seconds in last.seconds.values())
    assert (first.loss_before, first.measured_increase) == (1.0, 1.0)
    assert (last.loss_before, last.measured_increase) == (2.0, 8.0)
    assert (first.sparsity, last.sparsity) == (0.25, 0.5)
    assert outcome.held_out == outcome.evaluation == [7.0, 7.0]


@pytest.mark.parametrize("schedule, fractions", [(1.0, [0.25, 0.5, 0.75, 1.0]), (2.0, [0.4375, 0.75, 0.9375, 1.0])])
def test_the_schedule_says_what_is_gone_after_each_shot(monkeypatch, schedule, fractions):
    log = Log()
    shots = FakeShots(log)
    outcome = run_shots(shots, run_of(log, monkeypatch, shots=4, schedule=schedule))
    assert shots.fractions == pytest.approx(fractions)
    assert [shot.target_sparsity for shot in outcome.shots] == pytest.approx([0.8 * each for each in fractions])
    assert [shot.index for shot in outcome.shots] == [1, 2, 3, 4] and outcome.held_out == []


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_structure_can_end_earlier_or_later_than_planned(monkeypatch, number):
    log = Log()
    shots = FakeShots(log, number)
    outcome = run_shots(shots, run_of(log, monkeypatch, shots=2))
    assert len(outcome.shots) == number
    assert shots.fractions == [0.5, 1.0, 1.0, 1.0][:number]
    assert outcome.shots[-1].measured_increase == 10.0 - number


def test_what_is_held_is_closed_when_a_shot_fails(monkeypatch):
    log = Log()
    shots = FakeShots(log)
    monkeypatch.setattr(shots, "update", lambda shot: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_shots(shots, run_of(log, monkeypatch, shots=2))
    assert log.lines[-1] == "closed"
