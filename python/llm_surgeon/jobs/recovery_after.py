"""Recovery of a checkpoint that was pruned in the same job."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from llm_surgeon.checkpoint import Output, StoredForm
from llm_surgeon.checks import require_number
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.config.recover import LARGEST_SEED, RecoverConfig
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.data.documents import Documents
from llm_surgeon.distributed import ALONE, Ranks
from llm_surgeon.errors import InputError
from llm_surgeon.jobs.derived import Derived
from llm_surgeon.jobs.recover import load_teacher, recovery_text, training_record, windows_for
from llm_surgeon.models.limits import require_fit
from llm_surgeon.models.passes import mean_loss
from llm_surgeon.progress import Progress
from llm_surgeon.recovery.recover import check_recoverable, recover
from llm_surgeon.report.card import Records
from llm_surgeon.report.format import perplexity_of, published_name, two_decimals

_logger = logging.getLogger(__name__)

# Tokens of a training sequence, of at most as many as there are in a calibration window.
_SEQLEN = 512


def check_minutes(minutes: float, config: PruneConfig) -> None:
    """Raise :class:`InputError` where no recovery of so many ``minutes`` can follow a pruning by ``config``."""
    require_number("recover_minutes", minutes, 0.0, math.inf)
    if config.offloads:
        raise InputError("recover_minutes needs the whole model on one device: leave offload out")


class RecoveryAfter:
    """Training of what a pruning leaves, by distillation from the dense model: checked, its windows drawn.

    Attributes:
        config: the options.
    """

    def __init__(
        self,
        minutes: float,
        config: PruneConfig,
        model: nn.Module,
        tokenizer: Any,
        *,
        text: Documents,
        sha256: str,
        ids: Tensor,
        apart: Tensor,
        held_out: Calibration | None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Check all that can be, of options ``config`` of the pruning of ``model`` by the ``text``.

        Args:
            sha256: of the text's characters; ids: its tokens ``[tokens]``.
            apart: bool ``[tokens]``, True at those of the windows ``held_out``.
            ranks: that share the training.

        Raises:
            InputError: the text is too short, or the model cannot be trained.
        """
        if held_out is None:
            raise InputError(
                f"recover_minutes needs {8 * config.seqlen} tokens of text, of which some are held out: there are "
                f"{len(ids)}"
            )
        seqlen, seed = min(_SEQLEN, config.seqlen), config.seed % (LARGEST_SEED + 1)
        self.config = RecoverConfig(method="full", minutes=minutes, seqlen=seqlen, seed=seed)
        check_recoverable(model, None, self.config)
        windows = windows_for(self.config, ids, apart)
        self._held_out, self._windows = (dataclasses.replace(each, ranks=ranks) for each in (held_out, windows))
        require_fit(self._windows.input_ids, model, "training sequences")
        self._source = text.source
        self._record = training_record(text, tokenizer, sha256, ids, self._windows.input_ids)

    def run(
        self,
        source: str,
        model: nn.Module,
        tokenizer: Any,
        form: StoredForm,
        output: Output | None,
        *,
        windows_at_once: int,
        device: torch.device,
        trust_remote_code: bool,
        evaluation: tuple[str, Calibration] | None = None,
        progress: Progress | None,
    ) -> str:
        """Train what was pruned of ``source`` and written to ``output``, and write it in its place.

        Args:
            evaluation: name of a text and windows of it, neither trained on nor what chose the best state, that the
                perplexity is measured on afterwards.

        Returns:
            What was done, as the model card tells it.
        """
        config = dataclasses.replace(self.config, micro_batch_size=windows_at_once)
        try:
            dense = load_teacher(source, tokenizer, device, trust_remote_code)
            done = recover(model, self._windows, self._held_out, teacher=dense, config=config, progress=progress)
            done = dataclasses.replace(done, data={"training": self._record})
            told = recovery_text(config, done, self._source, source)
            if evaluation is not None:
                name, windows = evaluation[0], dataclasses.replace(evaluation[1], ranks=self._windows.ranks)
                at_once = max(1, windows_at_once * config.seqlen // windows.input_ids.shape[1])
                after = two_decimals(perplexity_of(mean_loss(model, windows, at_once)))
                told += f" Perplexity on `{published_name(name)}` after it: {after}."
            if output is not None:
                written = dataclasses.replace(output, overwrite=True)
                made = Derived(source, written, Records.read(output.path), model, tokenizer, form)
                made.save("recovered", told, files={"surgeon_recovery.json": done.to_json()})
        except BaseException:
            if output is not None:
                _logger.warning("the recovery did not end: %s holds the pruned model", output.given)
            raise
        return told
