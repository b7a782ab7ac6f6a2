"""The record of one pruning run: plain data that survives a round trip through JSON.

Losses and their increases are in nats per token. Weights are those of the decoder's linear layers; biases are
never pruned and never counted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llm_surgeon.data.record import DataRecord
from llm_surgeon.errors import InputError, NumericalError, one_line
from llm_surgeon.report.decode import decode, floats, reject_constant
from llm_surgeon.report.format import (
    duration,
    percent,
    perplexity_of,
    plural,
    published_name,
    signed,
    size_table,
    two_decimals,
)
from llm_surgeon.resources import human_bytes

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LayerReport:
    """One pruned linear layer: ``removed`` of its ``weights`` (``rows * columns``) are zero by pruning.

    ``depth`` is the index of its decoder block, ``kind`` its name inside the block.
    """

    name: str
    kind: str
    depth: int
    rows: int
    columns: int
    weights: int
    removed: int

    @property
    def sparsity(self) -> float:
        """``removed / weights``; 0 for an empty layer."""
        return self.removed / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class SolverTrace:
    """Convergence of the update of one layer.

    Attributes:
        layer: the layer's name.
        objective: predicted loss increase (nats per token) after 0, 1, 2, ... iterations on the kept weights.
        gap: bound or estimate of ``objective / optimum - 1`` at the end; ``None`` where there is none.
        bound: lower bound of the objective after 0, 1, 2, ... iterations on the pruned weights, which come first.
    """

    layer: str
    objective: list[float]
    gap: float | None = None
    bound: list[float] = field(default_factory=list)

    @property
    def iterations(self) -> int:
        return max(0, len(self.objective) - 1) + max(0, len(self.bound) - 1)


@dataclass(frozen=True)
class GradientStep:
    """A step along the natural gradient: its length, 0 where none helped, and what it lowers without and with it.

    That is the loss of held-out windows, or their divergence from the dense model, nats per token.
    """

    length: float
    loss_before: float
    loss_after: float


@dataclass
class ShotReport:
    """One round of estimate, select, update. Not frozen: the next round tells what this one really cost.

    Attributes:
        index: 1 for the first shot.
        target_sparsity, sparsity: asked for and reached after this shot, over all layers.
        threshold: cost up to which weights were removed, ``None`` where each layer had its own.
        loss_before: mean training loss, that of the calibration windows, before this shot; ``None`` when the method
            needs no passes.
        predicted_increase: the quadratic objective of the update, summed over layers, less what earlier
            shots were predicted to cost where the update begins at the dense weights again.
        measured_increase: the next shot's ``loss_before`` minus this one's, where both are known.
        seconds: wall time by phase ("curvature", "selection", "update", ...).
        solver: one trace per layer that was solved for.
        jitter: layer -> damping that had to be added beyond the configured one; usually empty.
        gradient_steps: what each step along the natural gradient did, where there were any.
        correction_rank: rank that the low-rank corrections absorbed so far, this shot's included, can add up to.
        layer_increases: parts of ``predicted_increase`` by layer, as far as they are known.
    """

    index: int
    target_sparsity: float
    sparsity: float
    threshold: float | None = None
    loss_before: float | None = None
    predicted_increase: float | None = None
    measured_increase: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    solver: list[SolverTrace] = field(default_factory=list)
    jitter: dict[str, float] = field(default_factory=dict)
    gradient_steps: list[GradientStep] = field(default_factory=list)
    correction_rank: int = 0
    layer_increases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean token loss of the dense and of the pruned model on text that pruning did not see: ``windows`` sequences.

    Perplexities are ``exp`` of the losses; ``tokens`` counts the real tokens of the windows.
    """

    windows: int
    tokens: int
    loss_before: float
    loss_after: float

    @property
    def increase(self) -> float:
        return self.loss_after - self.loss_before

    @property
    def perplexity_before(self) -> float:
        return perplexity_of(self.loss_before)

    @property
    def perplexity_after(self) -> float:
        return perplexity_of(self.loss_after)

    def describe(self) -> str:
        """``"27.18 → 41.30 (16 windows, 2,048 tokens)"``."""
        change = f"{two_decimals(self.perplexity_before)} → {two_decimals(self.perplexity_after)}"
        return f"{change} ({plural(self.windows, 'window')}, {plural(self.tokens, 'token')})"


@dataclass(frozen=True)
class Sample:
    """How the dense and the pruned model continue a ``prompt``, each by the most likely token."""

    prompt: str
    before: str
    after: str


@dataclass
class PruneReport:
    """Record of a pruning run: what was pruned, how, and what it cost.

    Attributes:
        config: the resolved options (:class:`llm_surgeon.config.prune.PruneConfig` as a dict).
        versions: see :func:`collect_versions`.
        model: what was pruned: a hub id or a path.
        device: where it ran.
        parameters: parameters of the whole model, before pruning.
        started: ISO 8601 time.
        seconds, peak_memory_bytes: of the whole run; 0 bytes where the peak is not known.
        layers, shots: in execution order.
        sizes: of structures that leave the model, entries "before" and "after", each with "parameters", "macs" (of all
            linears for one token), "bytes" of weights and "seconds" of a forward pass over one calibration sequence
            (the median; "seconds_low" and "seconds_high" are the quartiles).
        custom_code: the model needs the code that its checkpoint carries.
        data: what it was calibrated on, what low-rank corrections learned from, and what it was evaluated on: entries
            "calibration", "lora_data" and "eval_data"; none where token ids were given.
        revision: commit of the hub repository that the model came from; ``None`` for a folder.
        held_out: the losses on windows of the calibration text that were held out; ``None`` where none were.
        evaluation: those on a text of their own; ``None`` where there was none.
        samples: continuations of such text.
        disk: bytes of the stored weights, "before" and "after".
        warnings: sentences on what makes the result doubtful, see :func:`llm_surgeon.report.warnings.warnings_of`.
        command: the command line, word by word, where one was given.
        history: what was done to the model after pruning, a sentence each.
    """

    config: dict[str, Any]
    versions: dict[str, str]
    model: str
    device: str
    parameters: int
    started: str
    seconds: float
    peak_memory_bytes: int
    layers: list[LayerReport]
    shots: list[ShotReport]
    sizes: dict[str, dict[str, float]] = field(default_factory=dict)
    custom_code: bool = False
    data: dict[str, DataRecord] = field(default_factory=dict)
    revision: str | None = None
    held_out: HeldOutLoss | None = None
    evaluation: HeldOutLoss | None = None
    samples: list[Sample] = field(default_factory=list)
    disk: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    history: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def removed(self) -> int:
        return sum(layer.removed for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Removed weights over all weights of all layers; 0 without any."""
        return self.removed / self.weights if self.weights else 0.0

    @property
    def weighing(self) -> str | None:
        """Sentence on how tokens counted where a linear was aimed at the dense model; ``None`` where none was."""
        weighed = self.config.get("token_weights")
        aimed = self.config.get("update") == "sequential" or self.config.get("reconstruct")
        if not aimed or weighed is None:
            return None
        return f"Tokens of the calibration windows {'were weighed by their gradients' if weighed else 'counted alike'}."

    @property
    def layer_increases(self) -> dict[str, float]:
        """Predicted increases by layer, of all shots together."""
        totals: dict[str, float] = {}
        for shot in self.shots:
            for name, increase in shot.layer_increases.items():
                totals[name] = totals.get(name, 0.0) + increase
        return totals

    @property
    def measured_increase(self) -> float | None:
        """Rise of the training loss over all shots; ``None`` unless each was measured."""
        return _total([shot.measured_increase for shot in self.shots])

    @property
    def predicted_increase(self) -> float | None:
        """The shots' predicted increases together; ``None`` unless each has one."""
        return _total([shot.predicted_increase for shot in self.shots])

    def sparsity_by(self, attribute: str) -> dict[Any, float]:
        """Sparsity of every group of layers that share ``attribute`` ("kind" or "depth"), in execution order."""
        totals: dict[Any, tuple[int, int]] = {}
        for layer in self.layers:
            weights, removed = totals.get(getattr(layer, attribute), (0, 0))
            totals[getattr(layer, attribute)] = (weights + layer.weights, removed + layer.removed)
        return {group: removed / weights if weights else 0.0 for group, (weights, removed) in totals.items()}

    def to_json(self) -> str:
        """The report as indented JSON; NaN or infinity anywhere is a :class:`NumericalError` that names the field."""
        data = dataclasses.asdict(self)
        for where, value in floats(data, ""):
            if not math.isfinite(value):
                raise NumericalError(f"report field {where} is {value}")
        return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> PruneReport:
        """Read :meth:`to_json`'s output; :class:`InputError` names what is wrong with any other text."""
        try:
            data = json.loads(text, parse_constant=reject_constant)
            json.dumps(data, ensure_ascii=False).encode("utf-8")  # fails on halves of surrogate pairs
        except RecursionError as error:
            raise InputError("the report is nested too deeply") from error
        except ValueError as error:  # also a number of thousands of digits, and text that is not Unicode
            raise InputError(f"the report is not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise InputError(f"the report must be a JSON object, not {type(data).__name__}")
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(
                f"the report has schema_version {version!r}, but this version of llm_surgeon reads {SCHEMA_VERSION}"
            )
        data.pop("perplexity", None)  # of reports before there was an evaluation
        report: PruneReport = decode(cls, data, "report")
        _check_sizes(report.sizes)
        return report

    @classmethod
    def read(cls, path: str | Path) -> PruneReport:
        """The report in the file ``path``; :class:`InputError` where it is damaged."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"report {str(path)!r} cannot be read: {one_line(error)}") from error
        except InputError as error:
            raise InputError(f"report {str(path)!r} is damaged: {error}") from error

    def summary(self) -> str:
        """A few lines for the terminal: what was done, each shot's predicted and measured cost, samples."""
        options = f"structure {self.config.get('structure')}, update {self.config.get('update')}"
        peak = f", peak memory {human_bytes(self.peak_memory_bytes)}" if self.peak_memory_bytes else ""
        lines = [
            f"Pruned {self.model} with {self.config.get('method')} ({options}) on {self.device}",
            f"Removed {self.removed:,} of {self.weights:,} weights ({percent(self.sparsity)}) in "
            f"{plural(len(self.layers), 'layer')}, {plural(len(self.shots), 'shot')}, {duration(self.seconds)}{peak}",
        ]
        if self.weighing is not None:
            lines.append(self.weighing)
        lines += [f"Warning: {warning}" for warning in self.warnings]
        if self.shots:
            lines.append("shot  sparsity  predicted   measured   (increase of the training loss, nats per token)")
        if any(shot.correction_rank for shot in self.shots):
            ranks = ", ".join(str(shot.correction_rank) for shot in self.shots)
            lines[-1] = f"Low-rank corrections absorbed after each shot, rank so far: {ranks}\n{lines[-1]}"
        if any(shot.gradient_steps for shot in self.shots):
            gains = ", ".join(
                signed(sum(s.loss_after - s.loss_before for s in shot.gradient_steps)) for shot in self.shots
            )
            lowered = "divergence" if self.config.get("gradient_target") == "dense" else "loss"
            lines[-1] = f"Gradient steps after each shot, held-out {lowered}: {gains}\n{lines[-1]}"
        for shot in self.shots:
            predicted, measured = signed(shot.predicted_increase), signed(shot.measured_increase)
            lines.append(f"{shot.index:>4}  {percent(shot.sparsity):>8}  {predicted:>9}  {measured:>9}")
        if self.sizes:
            lines += [" ".join(f"{cell:>12}" for cell in row) for row in size_table(self.sizes)]
        for sample in self.samples:
            prompt, before, after = (" ".join(part.split()) for part in (sample.prompt, sample.before, sample.after))
            lines += [f"> {prompt} …", f"  before: {before}", f"  after:  {after}"]
        return "\n".join(lines)

    def quality(self) -> list[str]:
        """Sentences on perplexity before and after, the one on what is most telling last."""
        lines = [] if self.held_out is None else [f"Perplexity on held-out text: {self.held_out.describe()}"]
        if self.evaluation is not None:
            record = self.data.get("eval_data")
            text = "evaluation text" if record is None else published_name(record.source)
            lines.append(f"Perplexity on {text}: {self.evaluation.describe()}")
        return lines


def collect_versions() -> dict[str, str]:
    """Versions a result depends on: python, torch, transformers, surgeon_kernels, and cuda where torch has it."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "surgeon_kernels"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"  # run from a source tree
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions


def _total(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _check_sizes(sizes: dict[str, dict[str, float]]) -> None:
    """Raise :class:`InputError` unless both states have all figures, above 0, as a ratio of them is shown."""
    for state in ("before", "after") if sizes else ():
        for name in ("parameters", "macs", "bytes", "seconds"):
            if not sizes.get(state, {}).get(name, 0.0) > 0.0:
                raise InputError(f"report.sizes.{state}.{name} must be a number greater than 0")
