"""The figures carry the report's numbers."""

import dataclasses

import numpy as np
import pytest
from matplotlib import rcParams

from llm_surgeon.report import plots
from llm_surgeon.report.schema import HeldOutLoss, ShotReport, SolverTrace
from tests.surgeon.reports import DOWN, QUERY, Page, magnitude_report, surgeon_report


def test_sparsity_figure_draws_both_groupings():
    left, right = plots.sparsity_figure(surgeon_report()).axes
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in left.patches] == [
        (pytest.approx(0), 0.35),
        (pytest.approx(1), 0.65),
    ]
    assert [bar.get_width() for bar in right.patches] == [0.4, 320 / 600]
    assert [label.get_text() for label in right.get_yticklabels()] == [QUERY, DOWN]
    assert right.yaxis_inverted()  # the first layer of a block on top
    assert [label.get_text() for label in right.texts] == ["40.0%", "53.3%"]
    assert left.lines[0].get_ydata() == [0.5, 0.5] and right.lines[0].get_xdata() == [0.5, 0.5]
    assert left.get_ylim()[0] == 0 and right.get_xlim()[0] == 0


def test_prediction_figure_draws_what_is_known():
    report = surgeon_report()
    report.shots.append(ShotReport(3, 0.6, 0.6, predicted_increase=0.07))
    (axes,) = plots.prediction_figure(report).axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(lines["predicted"].get_xydata(), [[1, 0.0123], [2, 0.0456], [3, 0.07]])
    np.testing.assert_array_equal(lines["measured"].get_xydata(), [[1, 0.015], [2, 0.05]])
    assert axes.get_ylabel() == "loss increase (nats per token)"
    assert axes.get_ylim()[0] == 0


def test_prediction_figure_of_a_single_shot_has_bars():
    report = surgeon_report()
    report.shots = report.shots[:1]
    (axes,) = plots.prediction_figure(report).axes
    assert [bar.get_width() for bar in axes.patches] == [0.0123, 0.015]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["predicted", "training loss"]
    report.held_out = HeldOutLoss(4, 400, 3.0, 3.5)
    (axes,) = plots.prediction_figure(report).axes
    assert [bar.get_width() for bar in axes.patches] == [0.0123, 0.015, 0.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["predicted", "training loss", "held-out loss"]
    assert [label.get_text() for label in axes.texts] == ["+0.0123", "+0.0150", "+0.5000"]
    assert axes.get_xlabel() == "loss increase (nats per token)"


def test_prediction_figure_shows_a_loss_that_fell():
    report = surgeon_report()
    report.shots[0].measured_increase = -0.02
    (axes,) = plots.prediction_figure(report).axes
    assert axes.get_ylim()[0] < -0.02


def test_convergence_figure_draws_the_relative_excess():
    report = surgeon_report()
    report.shots[1].solver.append(SolverTrace("a", [1.9, 1.2, 1.1, 1.0]))
    (axes,) = plots.convergence_figure(report).axes
    *layers, median = axes.lines
    assert [line.get_label() for line in (layers[0], median)] == ["one layer", "median"]
    assert axes.get_yscale() == "log"
    np.testing.assert_allclose(layers[0].get_ydata(), [1.0, 0.25, 0.1, np.nan], rtol=1e-12)
    np.testing.assert_allclose(layers[1].get_ydata(), [0.5, 0.1, np.nan], rtol=1e-12)
    np.testing.assert_allclose(layers[2].get_ydata(), [0.9, 0.2, 0.1, np.nan], rtol=1e-12)
    assert len(layers) == 3  # nothing of the layers without iterations or without cost
    # A layer that has stopped counts as 0: median of 0.1, 0 and 0.1 at iteration 2.
    np.testing.assert_allclose(median.get_ydata(), [0.9, 0.2, 0.1, np.nan], rtol=1e-12)
    assert "shot 2" in axes.get_title(loc="left")


def test_convergence_figure_takes_the_last_shot_that_was_solved():
    report = surgeon_report()
    report.shots[0].solver = [SolverTrace("a", [9.0, 1.0])]
    report.shots[1].solver = [SolverTrace("a", [1.0])]
    (axes,) = plots.convergence_figure(report).axes
    assert "shot 1" in axes.get_title(loc="left")
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [8.0, np.nan])


def test_no_figure_where_there_is_nothing_to_show():
    report = magnitude_report()
    assert plots.prediction_figure(report) is None and plots.convergence_figure(report) is None
    report.shots = [ShotReport(1, 0.5, 0.5, measured_increase=0.1, solver=[SolverTrace("a", [0.0, 0.0])])]
    assert plots.prediction_figure(report) is None and plots.convergence_figure(report) is None
    report.shots[0].solver = [SolverTrace("a", [2.0, 2.0])]  # already at its final value
    assert plots.convergence_figure(report) is None
    report.layers = []
    assert plots.sparsity_figure(report) is None


def test_svg_is_an_element_with_its_own_ids_and_reproducible():
    report = surgeon_report()
    before = dict(rcParams)
    svg = plots.to_svg(plots.sparsity_figure(report), "first")
    assert dict(rcParams) == before
    assert svg.startswith("<svg") and "<metadata" not in svg
    ids = Page(svg).ids
    assert ids and all(each.startswith("first-") for each in ids)
    assert "url(#first-" in svg and QUERY in svg
    assert svg == plots.to_svg(plots.sparsity_figure(report), "first")


def test_names_are_not_formulas():
    report = surgeon_report()
    report.layers[0] = dataclasses.replace(report.layers[0], kind="$x^2$ <b>")
    assert "$x^2$ <b>" in Page(plots.to_svg(plots.sparsity_figure(report), "a")).text
