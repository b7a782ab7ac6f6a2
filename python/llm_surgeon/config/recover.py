"""Options of a recovery: one typed, frozen, validated value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llm_surgeon.checks import LARGEST_COUNT, require_choice
from llm_surgeon.config.fields import check_options, count, number, option, options, present_names
from llm_surgeon.errors import InputError

_HELD_OUT_WINDOWS = 64
_MICRO_TOKENS = 16384
LARGEST_SEED = 2**32 - 1

# LLM-Pruner (Ma et al., NeurIPS 2023): its post-training; the steps are its 2 epochs of 50 thousand instructions.
PRESETS: dict[str, dict[str, Any]] = {
    "llm-pruner": {
        "method": "lora",
        "rank": 8,
        "alpha": 16.0,
        "dropout": 0.05,
        "learning_rate": 1e-4,
        "batch_size": 64,
        "seqlen": 256,
        "steps": 1550,
        "warmup_steps": 100,
    }
}


@options
@dataclass(frozen=True)
class RecoverConfig:
    """Every option of a recovery run; validated when built, and what was left out filled in.

    What is ``None`` after that depends on the model or the machine.
    """

    method: Literal["lora", "full"] = option(
        "lora", "A low-rank correction of every linear that is absorbed at the end, or every parameter is trained"
    )
    # The learning rate falls to zero along a cosine.
    steps: int = option(None, "Optimizer steps: 200, or with minutes as many as fit.", count())
    minutes: float | None = option(None, "Minutes that it may take; the learning rate falls to zero by then.", number())
    batch_size: int = option(32, "Sequences a step.", count())
    micro_batch_size: int | None = option(
        None, "Sequences at once: about 16384 tokens; gradients are accumulated.", count()
    )
    # Left out, a run fills it in once the model is known.
    seqlen: int = option(None, "Tokens a sequence: 512 or the model's limit.", count())
    learning_rate: float = option(None, "Peak learning rate: 2e-3 for lora, 5e-4 for full.", number())
    trial_steps: int = option(
        0,
        "Steps of a trial each of a third, one and three times the learning rate, of which the best is taken, within a "
        "quarter of minutes; 0: none.",
        count(0),
    )
    warmup_steps: int = option(None, "Steps it takes to rise: steps / 20.", count(0))
    optimizer: Literal["adamw", "natural"] = option(
        "adamw",
        "Full training: AdamW, or for linears the natural gradient, by the curvature of the model at the start",
    )
    ema: float = option(
        0.0,
        "Decay a step of a mean of the weights; it is kept where the held-out loss says so; 0: none.",
        number(0.0, 1.0, low_allowed=True),
    )
    weight_decay: float = option(0.0, "AdamW's.", number(low_allowed=True))
    rank: int = option(16, "LoRA: rank of a correction.", count())
    alpha: float = option(32.0, "LoRA: a correction is alpha / rank · B A, with B [R, rank] and A [rank, C].", number())
    dropout: float = option(0.0, "LoRA: dropout before A.", number(0.0, 1.0, low_allowed=True))
    temperature: float = option(1.0, "Distillation: T of T² KL(teacher ‖ student), logits divided by T.", number())
    block_weight: float = option(
        0.0, "Distillation: weight of the blocks' outputs, mean |h - h*|² / |h*|².", number(low_allowed=True)
    )
    label_weight: float = option(
        0.0, "Distillation: share of the tokens' own cross-entropy.", number(0.0, 1.0, low_allowed=True)
    )
    eval_every: int = option(None, "Steps between held-out losses: steps / 10.", count())
    # Fewer where all evaluations together, the ones before and after the training included, would see more sequences
    # than the training.
    eval_windows: int | None = option(None, "Held-out sequences of each: 64, fewer in short trainings.", count())
    patience: int = option(5, "Evaluations without improvement before stopping; the best state is kept.", count())
    seed: int = option(0, "Seed of batches, dropout and initial values.", count(0, LARGEST_SEED))

    def __post_init__(self) -> None:
        check_options(self)
        self._fill("steps", 200 if self.minutes is None else LARGEST_COUNT)
        self._fill("learning_rate", 2e-3 if self.lora else 5e-4)
        self._fill("warmup_steps", self.steps // 20)
        self._fill("eval_every", max(1, self.steps // 10))
        if self.lora and self.optimizer == "natural":
            raise InputError("optimizer 'natural' needs method 'full'")
        if self.warmup_steps >= self.steps:
            raise InputError(f"warmup_steps {self.warmup_steps} leave nothing of the {self.steps} steps: take fewer")
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise InputError(f"batch_size {self.batch_size} is not divisible by micro_batch_size {micro}")

    def _fill(self, name: str, value: float) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    @property
    def lora(self) -> bool:
        """True where low-rank corrections are trained, rather than the parameters themselves."""
        return self.method == "lora"

    @property
    def held_out_windows(self) -> int:
        """``eval_windows``, or what it stands for where it was left out."""
        if self.eval_windows is not None:
            return self.eval_windows
        evaluations = -(-self.steps // self.eval_every) + 2
        return max(1, min(_HELD_OUT_WINDOWS, self.steps * self.batch_size // evaluations))

    def windows_at_once(self, seqlen: int) -> int:
        """``micro_batch_size``, or the largest divisor of ``batch_size`` that holds at most 16384 tokens."""
        sizes = range(1, self.batch_size + 1)
        fitting = [size for size in sizes if self.batch_size % size == 0 and size * seqlen <= _MICRO_TOKENS]
        return self.micro_batch_size or max(fitting, default=1)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> RecoverConfig:
        """Build from plain data, over the preset that its ``preset`` names, if any."""
        given = dict(options)
        name = given.pop("preset", None)
        if name is not None:
            require_choice("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS.get(name or "", {}), **present_names(cls, given)})
