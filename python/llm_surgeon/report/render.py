"""A :class:`PruneReport` as one self-contained HTML page, and as a model card for the Hugging Face hub."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure

from llm_surgeon.config.methods import method
from llm_surgeon.config.structure import Structure
from llm_surgeon.data.record import DataRecord
from llm_surgeon.errors import InputError
from llm_surgeon.report import format as text
from llm_surgeon.report import plots
from llm_surgeon.report.heat_map import heat_map
from llm_surgeon.report.options import with_effect
from llm_surgeon.report.schema import HeldOutLoss, PruneReport
from llm_surgeon.resources import human_bytes

_DATA = {
    "calibration": "Calibration text",
    "lora_data": "Text of the low-rank corrections",
    "eval_data": "Evaluation text",
}


def render_html(report: PruneReport) -> str:
    """One HTML page with inline styles and figures: it loads nothing and runs no script."""
    context = _context(report) | {
        "heat": heat_map(report),
        "predicted_in_all": sum(report.layer_increases.values()),
        "next_steps": _next_steps(report),
        "figures": _figures(report),
        "solver": _figure(3, plots.convergence_figure(report), "Convergence of the solver", _solver_caption(report)),
    }
    return _environment().get_template("report.html.j2").render(context)


def render_model_card(report: PruneReport, base_model: str) -> str:
    """A README.md for the pruned model: YAML front matter, what was removed, what it cost, how to load it.

    ``base_model`` goes into the front matter only when it is a hub id such as ``facebook/opt-125m``; of a local
    path only the last part is shown.
    """
    on_hub = is_hub_id(base_model)
    shown = base_model if on_hub else text.base_name(base_model)
    results = _eval_results(report)
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "sparse", "llm-surgeon"],
        model_name=f"{shown}, {text.percent(report.sparsity)} pruned" if results else None,
        eval_results=results or None,
    )
    context = _context(report) | {
        "front_matter": yaml.safe_dump(data.to_dict(), sort_keys=False, allow_unicode=True),
        "config_yaml": yaml.safe_dump(
            with_effect(report.config) | _data_options(report), sort_keys=False, allow_unicode=True
        ),
        "name": shown,
    }
    return _environment().get_template("model_card.md.j2").render(context)


def _eval_results(report: PruneReport) -> list[EvalResult]:
    """Perplexities after pruning, for the hub's index of results."""
    results = []
    for use, losses in (("eval_data", report.evaluation), ("calibration", report.held_out)):
        record = report.data.get(use)
        if losses is None or record is None or not math.isfinite(losses.perplexity_after):
            continue
        held_out = "" if use == "eval_data" else ", held-out windows"
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=text.published_name(record.source),
                dataset_name=f"{text.published_name(record.source)}{held_out}",
                metric_type="perplexity",
                metric_name=f"perplexity, {losses.perplexity_before:.2f} before pruning",
                metric_value=round(losses.perplexity_after, 4),
            )
        )
    return results


def _data_options(report: PruneReport) -> dict[str, str]:
    """The options that name the data: without them ``--config`` would take others. Of a path the last part."""
    options = {name: text.published_name(record.source) for name, record in report.data.items()}
    fields = {record.field for record in report.data.values()}
    field = fields.pop() if len(fields) == 1 else None
    return options | ({} if field is None else {"text_field": field})


def is_hub_id(name: str) -> bool:
    """True where ``name`` can be a Hugging Face hub id and is not a local path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def speed_sentence(sizes: dict[str, dict[str, float]]) -> str | None:
    """Compare the latency of a smaller model with the dense one's in a sentence, as far as ``sizes`` tell.

    The quartiles of the two, measured in turns, must lie apart for a difference; ``None`` where there are none.
    """
    before, after = sizes.get("before", {}), sizes.get("after", {})
    if not all({"seconds_low", "seconds_high"} <= set(state) for state in (before, after)):
        return None
    if after["seconds_high"] < before["seconds_low"]:
        return f"It is faster here: a forward pass took {before['seconds'] / after['seconds']:.2f}× as long before."
    if after["seconds_low"] > before["seconds_high"]:
        return f"It is slower here: a forward pass takes {after['seconds'] / before['seconds']:.2f}× as long as before."
    return "No difference in latency was measured: it lies within the noise of the measurement."


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("llm_surgeon.report"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    formats = (text.percent, text.signed, text.compact, text.duration, human_bytes, text.plural, text.two_decimals)
    environment.filters.update({function.__name__: function for function in formats})
    return environment


def _context(report: PruneReport) -> dict[str, Any]:
    measured = [shot for shot in report.shots if shot.measured_increase is not None]
    name = report.model if is_hub_id(report.model) else text.base_name(report.model)
    structure = str(report.config.get("structure"))
    title, paper = describe_method(str(report.config.get("method")))
    predicted = [shot.predicted_increase for shot in measured if shot.predicted_increase is not None]
    return {
        "report": report,
        "name": name,
        "command": text.command_line(report.command),
        "speed": speed_sentence(report.sizes),
        "data": [(_DATA.get(use, use), _describe_data(record)) for use, record in report.data.items()],
        "method": title,
        "paper": paper,
        "structure": describe_structure(structure),
        "packs": (record := _record(structure)) is not None and record.packs,
        "options": with_effect(report.config),
        "uneven": _uneven(report),
        "kinds": report.sparsity_by("kind") if _uneven(report) else {},
        "unseen": _unseen(report),
        "measured_shots": len(measured),
        "measured": sum(shot.measured_increase or 0.0 for shot in measured),
        # Beside the measured total only if it is a total over the same shots.
        "predicted": sum(predicted) if len(predicted) == len(measured) else None,
        "costs": any(shot.loss_before is not None or shot.predicted_increase is not None for shot in report.shots),
        "corrections": max((shot.correction_rank for shot in report.shots), default=0),
        "phases": list(dict.fromkeys(phase for shot in report.shots for phase in shot.seconds)),
        "jitter": [(shot.index, layer, value) for shot in report.shots for layer, value in shot.jitter.items()],
        "sizes": text.size_table(report.sizes) if report.sizes else [],
        "missing": text.MISSING,
    }


def _unseen(report: PruneReport) -> list[tuple[str, HeldOutLoss]]:
    """Losses on text that pruning did not see, the most telling ones first, with the names of the texts."""
    record = report.data.get("eval_data")
    name = "evaluation text" if record is None else text.published_name(record.source)
    found = ((name, report.evaluation), ("held-out text", report.held_out))
    return [(name, losses) for name, losses in found if losses is not None]


def _describe_data(record: DataRecord) -> str:
    """``"chat.jsonl, field messages as chat template: 64 windows of 128 tokens (2 distinct) out of 243, sha256 …"``."""
    field = "" if record.field is None else f", field {record.field}"
    rendered = "" if record.rendering is None else f" as {record.rendering}"
    distinct = "" if record.distinct_windows == record.windows else f" ({record.distinct_windows:,} distinct)"
    return (
        f"{text.published_name(record.source)}{field}{rendered}: {text.plural(record.windows, 'window')} of "
        f"{text.plural(record.seqlen, 'token')}{distinct} out of {record.tokens:,}, sha256 {record.sha256}"
    )


def describe_method(name: str) -> tuple[str, str]:
    """Title and paper of a ``method``; its name alone, where a report tells of one that is not installed here."""
    try:
        record = method(name)
    except InputError:
        return name, ""
    return record.title or name, record.paper


def describe_structure(structure: str) -> str:
    """Say what a ``structure`` option removes."""
    record = _record(structure)
    return structure if record is None else record.title or structure


def _figures(report: PruneReport) -> list[tuple[Markup, str, str]]:
    """``(svg, short description, caption)`` of every figure that has something to show."""
    also = " and on held-out text" if report.held_out and len(report.shots) == 1 else ""
    figures = [
        _figure(
            1,
            plots.prediction_figure(report),
            "Predicted and measured loss increase of each shot",
            "What each shot was expected to cost, from the curvature of the loss, and what it then cost, "
            f"measured on the calibration windows (training loss){also}.",
        ),
        _figure(
            2,
            plots.sparsity_figure(report) if _uneven(report) else None,
            "Sparsity by decoder block and by kind of layer",
            "Where the weights were removed; the dashed line marks the decoder as a whole.",
        ),
    ]
    return [figure for figure in figures if figure is not None]


def _figure(number: int, figure: Figure | None, description: str, caption: str) -> tuple[Markup, str, str] | None:
    return None if figure is None else (Markup(plots.to_svg(figure, f"figure{number}")), description, caption)


def _uneven(report: PruneReport) -> bool:
    """True where layers lost different shares of their weights: of N:M there would be nothing but equal bars."""
    return len({round(layer.sparsity, 3) for layer in report.layers}) > 1


def _record(structure: str) -> Structure | None:
    """The structure of that name; ``None`` of one that is not registered here."""
    try:
        return Structure.parse(structure)
    except InputError:
        return None


def _next_steps(report: PruneReport) -> list[tuple[str, str]]:
    """Commands that make more of the model, and what they do; none of one that something was done to already."""
    structure = _record(str(report.config.get("structure")))
    if report.history or structure is None:
        return []
    steps = [
        ("surgeon recover OUT RECOVERED --teacher MODEL", "Train what is left, from the dense model's predictions.")
    ]
    if structure.packs:
        steps.append(("surgeon pack OUT PACKED", "Smaller on disk and in memory, and faster on NVIDIA GPUs."))
    elif structure.name == "rows-columns":
        steps.append(("surgeon compact OUT SMALLER", "Take whole rows and columns of zeros out of the matrices."))
    return steps


def _solver_caption(report: PruneReport) -> str:
    return (
        "How far each layer's predicted cost still was above its final value while the remaining weights "
        f"were adjusted.{_gap_sentence(report)}"
    )


def _gap_sentence(report: PruneReport) -> str:
    solved = [shot for shot in report.shots if any(trace.gap is not None for trace in shot.solver)]
    if not solved:
        return ""
    gap, layer = max((trace.gap, trace.layer) for trace in solved[-1].solver if trace.gap is not None)
    return f" The layer furthest from its optimum ({layer}) ended an estimated {100 * gap:.2g}% above it."
