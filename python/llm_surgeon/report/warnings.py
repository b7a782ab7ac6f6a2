"""Sentences on what makes the result of a pruning run doubtful."""

from __future__ import annotations

from llm_surgeon.config.methods import method
from llm_surgeon.report.schema import PruneReport

# Measured is called far above predicted from so many times the prediction on, and so many nats beyond it.
_RATIO, _NATS = 3.0, 0.05
# Tokens for every input of the widest layer: its second moments A [C, C] are of full rank from one on, and well
# determined only from several on.
_TOKENS_PER_INPUT = 8


def warnings_of(report: PruneReport, tokens: int) -> list[str]:
    """Sentences on what ``report``'s figures say against the result.

    - The calibration text has fewer than 8 ``tokens`` for every input of the widest layer.
    - The loss rose by more than 3 times what was predicted, and by more than 0.05 nats beyond it.
    - The loss on held-out text rose by more than 3 times what the training loss rose by, and by more than
      0.05 nats beyond it: what was learned from the windows does not carry over.
    """
    found = []
    widest = max((layer.columns for layer in report.layers), default=0)
    used = method(report.config.get("method"))
    reads = used.needs != "nothing" and used.comparison != "row"  # A, of which rows take its diagonal alone
    if reads and tokens < _TOKENS_PER_INPUT * widest:
        found.append(
            f"{tokens:,} calibration tokens are few for layers of {widest:,} inputs: take "
            f"{_TOKENS_PER_INPUT * widest:,} at least (samples × seqlen)."
        )
    measured, predicted = report.measured_increase, report.predicted_increase
    if measured is not None and predicted is not None and _far_above(measured, predicted):
        found.append(
            f"The training loss rose by {measured:.3f} nats per token where {predicted:.3f} were predicted: the "
            "curvature does not describe changes as large as these."
        )
    held_out = report.held_out or report.evaluation
    if held_out is not None and measured is not None and _far_above(held_out.increase, measured):
        found.append(
            f"The loss changed by {held_out.increase:+.3f} nats per token on held-out text, and the training "
            f"loss by {measured:+.3f}: the weights were fitted to the calibration windows; take more of them."
        )
    return found


def _far_above(value: float, reference: float) -> bool:
    return value > _RATIO * reference and value > reference + _NATS
