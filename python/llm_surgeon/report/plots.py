"""The report's figures, drawn without pyplot so that nothing global is touched.

Each function returns a :class:`matplotlib.figure.Figure`, or ``None`` where the report has nothing to show.
"""

from __future__ import annotations

import io
import re

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from llm_surgeon.report.format import percent, signed
from llm_surgeon.report.schema import PruneReport, SolverTrace

# Okabe and Ito's blue and vermilion: told apart by every common kind of colour vision, and in grey.
BLUE, VERMILION = "#0072B2", "#D55E00"
INK, MUTED, GRID = "#2b2b2b", "#6b6b6b", "#e6e6e6"
# Below this relative excess the solver's curve is rounding noise.
SMALLEST_EXCESS = 1e-5

_STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#b5b5b5",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#b5b5b5",
    "ytick.color": "#b5b5b5",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "font.size": 10,
    "text.parse_math": False,  # layer names are not formulas
    "text.usetex": False,
    "svg.fonttype": "none",  # text stays text: it can be selected, searched and read aloud
    "svg.hashsalt": "llm_surgeon",  # the same report gives the same bytes
}


@matplotlib.rc_context(_STYLE)
def sparsity_figure(report: PruneReport) -> Figure | None:
    """Sparsity of each decoder block (left) and of each kind of layer (right), weighted by layer size."""
    if report.weights == 0:
        return None
    depths, kinds = report.sparsity_by("depth"), report.sparsity_by("kind")
    top = min(1.0, 1.15 * max(*depths.values(), *kinds.values(), 0.05))

    size = (9, max(3.1, 1.0 + 0.3 * len(kinds)))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.05))
    left, right = figure.subplots(1, 2)
    left.bar(list(depths), list(depths.values()), width=0.72, color=BLUE)
    left.set(title="By decoder block", xlabel="decoder block", ylabel="weights removed", ylim=(0, top))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    left.grid(axis="y")
    left.axhline(report.sparsity, color=INK, linewidth=1, linestyle=(0, (4, 3)))

    positions = range(len(kinds))
    bars = right.barh(positions, list(kinds.values()), height=0.66, color=BLUE)
    # A white box, so that the dashed line does not strike a number through.
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    labels = [percent(value) for value in kinds.values()]
    right.bar_label(bars, labels, padding=4, color=INK, fontsize=9.5, bbox=box)
    right.set_yticks(positions, list(kinds))
    right.invert_yaxis()  # first in the block, first on the page
    right.set(title="By kind of layer", xlabel="weights removed", xlim=(0, 1.1 * top))
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    right.grid(axis="x")
    right.axvline(report.sparsity, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
    right.tick_params(axis="y", length=0)
    return figure


@matplotlib.rc_context(_STYLE)
def prediction_figure(report: PruneReport) -> Figure | None:
    """Predicted and measured loss increase of each shot; ``None`` unless some shot knows both.

    Of a single shot, bars: predicted, measured, and measured on held-out text where there was any.
    """
    if all(shot.predicted_increase is None or shot.measured_increase is None for shot in report.shots):
        return None
    if len(report.shots) == 1:
        return _single_shot_figure(report)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    series = (("predicted", BLUE, "o", "-"), ("measured", VERMILION, "s", (0, (5, 2))))
    for label, color, marker, style in series:
        points = [(shot.index, getattr(shot, f"{label}_increase")) for shot in report.shots]
        known = [(index, value) for index, value in points if value is not None]
        axes.plot(*zip(*known, strict=True), label=label, color=color, marker=marker, linestyle=style, markersize=5)
    axes.set(title="Cost of each shot", xlabel="shot", ylabel="loss increase (nats per token)")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    axes.legend()
    return figure


def _single_shot_figure(report: PruneReport) -> Figure:
    bars = [("predicted", report.predicted_increase, BLUE), ("training loss", report.measured_increase, VERMILION)]
    if report.held_out is not None:
        bars.append(("held-out loss", report.held_out.increase, VERMILION))
    names, values, colors = zip(*bars, strict=True)
    figure = Figure(figsize=(9, 0.9 + 0.5 * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(range(len(bars)), values, height=0.6, color=colors)
    axes.bar_label(drawn, [signed(value) for value in values], padding=4, color=INK, fontsize=9.5)
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)  # room for the labels
    axes.axvline(0.0, color=INK, linewidth=1)
    axes.set(title="Cost of the shot", xlabel="loss increase (nats per token)")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    return figure


@matplotlib.rc_context(_STYLE)
def convergence_figure(report: PruneReport) -> Figure | None:
    """Relative distance to the final objective by iteration, one line per layer of the last solved shot.

    First that of the lower bound, below it, then that of the objective, above it.
    A layer that has stopped counts as 0 in the median, which is drawn for as long as it is positive.
    """
    shot = next((shot for shot in reversed(report.shots) if any(t.iterations for t in shot.solver)), None)
    if shot is None:
        return None
    # A layer with nothing to remove has an objective of 0 throughout: there is no ratio to draw.
    curves = [_distances(trace) for trace in shot.solver if trace.iterations and trace.objective[-1] > 0]
    if not any((curve > 0).any() for curve in curves):
        return None

    padded = np.zeros((len(curves), max(map(len, curves))))
    for row, curve in zip(padded, curves, strict=True):
        row[: len(curve)] = curve
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        label = "one layer" if number == 0 else None
        axes.plot(_positive(curve), color=BLUE, alpha=0.35, linewidth=0.8, label=label)
    axes.plot(_positive(np.median(padded, axis=0)), color=VERMILION, linewidth=2.2, label="median")
    axes.set(
        title=f"Solver convergence in shot {shot.index}", xlabel="iteration", ylabel="distance to the final objective"
    )
    _percent_log_axis(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    axes.legend()
    return figure


def _distances(trace: SolverTrace) -> np.ndarray:
    bound, objective = np.array(trace.bound[:-1]), np.array(trace.objective)
    return np.concatenate([1 - bound / objective[-1], objective / objective[-1] - 1])


@matplotlib.rc_context(_STYLE)
def to_svg(figure: Figure, prefix: str) -> str:
    """The figure as an ``<svg>`` element to put into HTML; ``prefix`` keeps its ids apart from other figures'."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)


def _positive(curve: np.ndarray) -> np.ndarray:
    """``curve`` with NaN, which is not drawn, where a log scale has no place for it."""
    return np.where(curve > 0, curve, np.nan)


def _percent_log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, SMALLEST_EXCESS), max(high, 2 * SMALLEST_EXCESS))
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.yaxis.set_minor_formatter(NullFormatter())
