"""Interleaved low-rank corrections (LLM Surgeon, section 3.6): trained after a shot, absorbed before the next."""

from __future__ import annotations

from torch import nn

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.config.recover import LARGEST_SEED, RecoverConfig
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.progress import Progress
from llm_surgeon.recovery.lora import low_rank_corrections
from llm_surgeon.recovery.training import train
from llm_surgeon.recovery.zeros import check_zeros, zero_masks

_BATCH_TOKENS = 4096


def correct(
    model: nn.Module,
    decoder: Decoder,
    calibration: Calibration,
    config: PruneConfig,
    shot: int,
    progress: Progress,
) -> None:
    """Train a correction of rank ``config.lora_rank`` of every linear layer on the calibration data and absorb it.

    ``W ← W + M ∘ (2 B A)``, M the pattern of W's nonzero weights; the loss is the tokens' own, and there is no held-out
    data: the steps are few. Every shot sees other batches.

    Raises:
        NumericalError: the loss is not a number.
    """
    masks = zero_masks(decoder)
    settings = RecoverConfig(
        rank=config.lora_rank,
        alpha=2.0 * config.lora_rank,
        steps=config.lora_steps,
        learning_rate=config.lora_learning_rate,
        batch_size=max(1, _BATCH_TOKENS // calibration.input_ids.shape[1]),
        seed=(config.seed + shot) % (LARGEST_SEED + 1),
    )
    with low_rank_corrections(
        model, decoder, settings.rank, settings.alpha, settings.dropout, settings.seed
    ) as corrected:
        train(corrected, calibration, None, settings, progress=progress)
    check_zeros(masks)
