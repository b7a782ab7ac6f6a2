"""The record of the text that windows were drawn from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_surgeon.data.chat import has_template
from llm_surgeon.data.documents import Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataRecord:
    """The text that windows were drawn from.

    Attributes:
        source: as it was given: ``"wikitext2"``, a hub data set or a path.
        split: ``"calibration"`` or ``"evaluation"``.
        field: the field of its rows that was read; ``None`` for plain text.
        rendering: how conversations became text: ``"chat template"`` or ``"plain"``; ``None`` where there were none.
        sha256: of the text in UTF-8.
        tokens: of the whole text, BOS included.
        windows, distinct_windows: how many were drawn, and how many of these differ in where they begin.
        seqlen: tokens of a window.
    """

    source: str
    split: str
    sha256: str
    tokens: int
    windows: int
    distinct_windows: int
    seqlen: int
    field: str | None = None
    rendering: str | None = None


def data_record(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    sha256: str,
    ids: Tensor,
    windows: Tensor,
    *,
    passes: int = 1,
) -> DataRecord:
    """The record of ``windows`` ``[n, seqlen]`` that were drawn from ``ids``, the tokens of ``documents``.

    Says in the log where the windows go over the text more than ``passes`` times.
    """
    record = DataRecord(
        documents.source,
        documents.split,
        sha256,
        tokens=len(ids),
        windows=len(windows),
        distinct_windows=_distinct(windows),
        seqlen=windows.shape[1],
        field=", ".join(documents.fields) or None,
        rendering=("chat template" if has_template(tokenizer) else "plain") if documents.chat else None,
    )
    if (sentence := too_little_text(record, passes)) is not None:
        _logger.warning("%s", sentence)
    return record


def _distinct(windows: Tensor) -> int:
    """Number of int64 ``windows`` ``[n, seqlen]`` that differ.

    Told apart by random sums modulo 2^64, which different ones have alike once in 2^64 pairs: sorting the windows would
    take their memory twice more.
    """
    limit, generator = 2**63, torch.Generator().manual_seed(0)
    weights = torch.randint(-limit, limit - 1, (windows.shape[1],), generator=generator)
    return len(torch.mv(windows, weights).unique())


def too_little_text(record: DataRecord, passes: int = 1) -> str | None:
    """A sentence where the windows hold more than ``passes`` times the tokens of the text they were drawn from."""
    if record.windows * record.seqlen <= passes * record.tokens:
        return None
    return (
        f"{record.windows} windows of {record.seqlen} tokens are drawn from the {record.tokens} tokens of "
        f"{record.source!r}: {record.distinct_windows} distinct windows, pass more text"
    )
