"""How to recover a pruned model: one typed, frozen, validated value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_surgeon.checks import (
    LARGEST_COUNT,
    require_choice,
    require_int,
    require_known,
    require_number,
    require_positive_int,
)
from llm_surgeon.errors import InputError

if TYPE_CHECKING:
    from llm_surgeon.models.decoder import Decoder

METHODS = ("lora", "full")
_HELD_OUT_WINDOWS = 64
LARGEST_SEED = 2**32 - 1  # numpy's generators, which Trainer seeds, take no more

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


@dataclass(frozen=True)
class RecoverConfig:
    """Every option of a recovery run; validated when built.

    Attributes:
        method: ``"lora"`` trains a low-rank correction of every linear layer and absorbs it at the end; ``"full"``
            trains every parameter. Both leave pruned weights exactly zero.
        steps: optimizer steps (AdamW); the learning rate falls to zero along a cosine.
        batch_size: sequences a step.
        micro_batch_size: sequences at once (left out: about 16384 tokens); gradients are accumulated over a step.
        seqlen: tokens a sequence.
        learning_rate: its peak (left out: 2e-3 for ``"lora"``, 5e-4 for ``"full"``).
        warmup_steps: steps in which it rises from zero (left out: a twentieth of ``steps``).
        weight_decay: of AdamW.
        rank, alpha, dropout: LoRA: a correction is ``alpha / rank · B A`` with B ``[R, rank]`` and A ``[rank, C]``.
        temperature: with a teacher, the loss is ``T² KL(teacher ‖ student)`` of logits divided by T.
        eval_every: steps between evaluations of the held-out loss (left out: a tenth of ``steps``).
        eval_windows: held-out sequences of each, where a text is split (left out: 64, or fewer where all evaluations
            together, the ones before and after the training included, would see more sequences than the training).
        patience: evaluations without improvement before training stops; the best state is kept in any case.
        seed: of batches, dropout and LoRA's initial values.
    """

    method: str = "lora"
    steps: int = 200
    batch_size: int = 32
    micro_batch_size: int | None = None
    seqlen: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    temperature: float = 1.0
    eval_every: int | None = None
    eval_windows: int | None = None
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("method", self.method, METHODS)
        for name in ("steps", "batch_size", "rank", "patience"):
            require_positive_int(name, getattr(self, name))
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 2e-3 if self.method == "lora" else 5e-4)
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", self.steps // 20)
        if self.eval_every is None:
            object.__setattr__(self, "eval_every", max(1, self.steps // 10))
        require_positive_int("eval_every", self.eval_every)
        for name in ("micro_batch_size", "seqlen", "eval_windows"):
            if getattr(self, name) is not None:
                require_positive_int(name, getattr(self, name))
        for name in ("learning_rate", "alpha", "temperature"):
            require_number(name, getattr(self, name), 0.0, float("inf"))
        require_number("weight_decay", self.weight_decay, 0.0, float("inf"), low_allowed=True)
        require_number("dropout", self.dropout, 0.0, 1.0, low_allowed=True)
        require_int("warmup_steps", self.warmup_steps, 0, LARGEST_COUNT)
        assert self.warmup_steps is not None
        if self.warmup_steps >= self.steps:
            raise InputError(f"warmup_steps {self.warmup_steps} leave nothing of the {self.steps} steps: take fewer")
        require_int("seed", self.seed, 0, LARGEST_SEED)
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise InputError(f"batch_size {self.batch_size} is not divisible by micro_batch_size {micro}")

    @property
    def held_out_windows(self) -> int:
        """``eval_windows``, or what it stands for where it was left out."""
        if self.eval_windows is not None:
            return self.eval_windows
        assert self.eval_every is not None
        evaluations = -(-self.steps // self.eval_every) + 2
        return max(1, min(_HELD_OUT_WINDOWS, self.steps * self.batch_size // evaluations))

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> RecoverConfig:
        """Build from plain data, over the preset that its ``preset`` names, if any."""
        given = dict(options)
        name = given.pop("preset", None)
        if name is not None:
            require_choice("preset", name, tuple(PRESETS))
        require_known(given, [field.name for field in dataclasses.fields(cls)])
        return cls(**{**PRESETS.get(name or "", {}), **given})


def check_rank(decoder: Decoder, rank: int, name: str) -> None:
    """Refuse a rank, the option ``name``, that no layer can have: it is only a slip, and takes any amount of memory."""
    most = max(min(linear.rows, linear.columns) for linear in decoder.linears)
    if rank > most:
        raise InputError(f"{name} {rank} is more than the rank of every layer, at most {most}")
