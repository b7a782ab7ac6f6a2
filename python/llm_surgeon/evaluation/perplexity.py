"""Perplexity of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_surgeon.checkpoint import load_model, require_model
from llm_surgeon.checks import require_positive_int
from llm_surgeon.data.calibration import evaluation_windows, require_windows
from llm_surgeon.data.documents import read_documents
from llm_surgeon.data.tokens import token_stream
from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.isolation import plain_arithmetic
from llm_surgeon.models.checks import check_causal
from llm_surgeon.models.limits import choose_seqlen, require_fit
from llm_surgeon.models.passes import evaluation_mode
from llm_surgeon.models.wrappers import unwrapped
from llm_surgeon.resources import choose_device

_BATCH_TOKENS = 4096
# Positions whose logits are held in float32 at once.
_CHUNK = 1024


def load_for_evaluation(
    source: str,
    data: str,
    seqlen: int | None,
    device: str | None,
    trust_remote_code: bool,
    dtype: torch.dtype = torch.float32,
    *,
    limit: int | None = None,
    text_field: str | None = None,
) -> tuple[nn.Module, Tensor]:
    """The checkpoint ``source``, dense or packed, and windows of ``data``'s test part, for :func:`perplexity`.

    Args:
        limit: only the first so many windows.
        text_field: see :func:`~llm_surgeon.data.documents.read_documents`.
    """
    require_model(source)
    documents = read_documents(data, "evaluation", text_field)
    model, tokenizer, _ = load_model(
        source, dtype, choose_device(device), trust_remote_code=trust_remote_code, packed=True
    )
    with evaluation_mode(model):
        check_causal(model)
    ids, _ = token_stream(documents, tokenizer)
    return model, evaluation_windows(ids, choose_seqlen(seqlen, model))[:limit]


@plain_arithmetic()
@torch.no_grad()  # not inference_mode: what a model caches in a forward pass must stay usable for gradients later
def perplexity(
    model: Any,
    windows: Tensor,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """``exp(mean token cross-entropy)``, each window predicting its own tokens 2..seqlen.

    Log-probabilities are computed in float32 from the model's logits and summed in float64. The model runs in
    evaluation mode, without autocast; its training flags are put back.

    Args:
        windows: integer token ids ``[n, seqlen]``, see :func:`~llm_surgeon.data.calibration.evaluation_windows`.
        batch_size: windows per forward pass (left out: about 4096 tokens).
        progress: called as ``progress(windows_done, windows)``.

    Raises:
        InputError: no windows, token ids or positions that the model does not know, or no causal language model.
        NumericalError: NaN or infinity in a window's loss; the message names the window.
    """
    require_windows(windows, "evaluation windows")
    inner, largest = unwrapped(model), int(windows.max())
    require_fit(windows, inner, "evaluation windows")
    device = inner.get_input_embeddings().weight.device
    count, seqlen = windows.shape
    if batch_size is None:
        batch_size = max(1, _BATCH_TOKENS // seqlen)
    require_positive_int("batch_size", batch_size)
    total = 0.0
    with evaluation_mode(model):
        known = check_causal(inner)
        if largest >= known:
            raise InputError(f"evaluation windows hold token id {largest}, and the model's output head has {known}")
        for start in range(0, count, batch_size):
            ids = windows[start : start + batch_size].to(device).long()
            logits = model(input_ids=ids, use_cache=False).logits
            losses = [_window_loss(row, window) for row, window in zip(logits, ids, strict=True)]
            for index, loss in enumerate(torch.stack(losses).tolist(), start):
                if not math.isfinite(loss):
                    raise NumericalError(f"NaN or infinity in the loss of evaluation window {index} of {count}")
                total += loss
            if progress is not None:
                progress(min(start + batch_size, count), count)
    mean = total / (count * (seqlen - 1))
    return math.exp(mean) if mean < 700 else math.inf


def _window_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed cross-entropy of tokens 1.. of one window, float64 scalar."""
    labels = ids[1:].to(logits.device)
    chunks = zip(logits[:-1].split(_CHUNK), labels.split(_CHUNK), strict=True)
    return torch.stack([F.cross_entropy(x.float(), y, reduction="none").double().sum() for x, y in chunks]).sum()
