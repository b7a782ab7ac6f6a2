"""The token sequences of a run: what curvature is estimated on, what corrections learn from, what is held out.

Held out are windows for losses, before and after, and windows for the lengths of gradient steps. Losses are measured
on windows of an evaluation text, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.distributed import ALONE, Ranks
from llm_surgeon.errors import InputError
from llm_surgeon.models.limits import require_fit


@dataclass(frozen=True)
class Windows:
    """Copies of the sequences that a caller gave.

    Tensors made under ``torch.inference_mode`` may not be kept for backward passes; copies may.
    """

    calibration: Calibration
    correction: Calibration | None
    held_out: Calibration | None
    steps: Calibration | None
    evaluation: Calibration | None

    @classmethod
    def of(
        cls,
        config: PruneConfig,
        calibration: Any,
        correction: Any = None,
        held_out: Any = None,
        steps: Any = None,
        evaluation: Any = None,
        ranks: Ranks = ALONE,
    ) -> Windows:
        """Read what :meth:`Calibration.of` takes, for ``ranks`` to share.

        Raises:
            InputError: sequences are malformed, or of no use.
        """
        if correction is not None and not config.lora_rank:
            raise InputError("data for low-rank corrections mean nothing without lora_rank")
        own, *others = (
            None if value is None else _own(Calibration.of(value), ranks)
            for value in (calibration, correction, held_out, steps, evaluation)
        )
        assert own is not None
        found = cls(own, *others)
        count, given = config.gradient_samples, None if found.steps is None else len(found.steps.input_ids)
        if given is not None and count not in (None, given):
            raise InputError(
                f"gradient_samples {count} are not the {given} windows that were given for the lengths of gradient "
                "steps: leave one of them out"
            )
        return found

    def require_fit(self, model: Any, config: PruneConfig) -> None:
        """Raise :class:`InputError` where ``config`` has no use for sequences, or ``model`` lacks what they hold."""
        if self.steps is not None and not config.gradient_steps:
            raise InputError("windows for the lengths of gradient steps mean nothing without gradient_steps: give them")
        uses = {
            "calibration": self.calibration,
            "held-out": self.held_out,
            "correction": self.correction,
            "gradient step": self.steps,
            "evaluation": self.evaluation,
        }
        for use, windows in uses.items():
            if windows is not None:
                require_fit(windows.input_ids, model, f"{use} sequences")


def _own(windows: Calibration, ranks: Ranks) -> Calibration:
    mask = windows.attention_mask
    return Calibration(windows.input_ids.clone(), None if mask is None else mask.clone(), ranks)
