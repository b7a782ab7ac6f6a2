"""Trial and proof of a change of sizes: the model computes, decodes and loads as before, or is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.errors import NumericalError, UnsupportedModelError, first_line
from llm_surgeon.models.passes import evaluation_mode
from llm_surgeon.models.probe import TOKENS
from llm_surgeon.models.rebuild import reloaded
from llm_surgeon.models.state import ModelState

# Logits may differ by rounding, as sums are made over fewer (zero) terms.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_LOOSE = 0.1


def _probe_ids(model: PreTrainedModel) -> Tensor:
    """Token ids of two whole sequences."""
    embedding = model.get_input_embeddings().weight
    return torch.arange(2 * TOKENS, device=embedding.device).view(2, -1) % embedding.shape[0]


@torch.no_grad()
def probe_logits(model: PreTrainedModel) -> Tensor:
    """Logits of a few tokens, those a probe reads: of two whole sequences, and of two of which one is padded.

    Raises:
        UnsupportedModelError: the model's class does not run at its sizes.
    """
    ids = _probe_ids(model)
    mask = torch.ones_like(ids)
    mask[1, : TOKENS // 4] = 0  # attention takes other paths where there is a mask
    try:
        with evaluation_mode(model):
            whole = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model's own code says to sizes that it cannot run at
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run at these sizes: {first_line(error)}"
        ) from error
    return torch.cat([whole, padded])


@torch.no_grad()
def decodes(model: PreTrainedModel) -> bool:
    """True if the model gives the same logits token by token, as ``generate`` asks for them, as all at once.

    A model whose class has no such cache, or fails with it, does not.
    """
    ids, found = _probe_ids(model), []
    try:
        with evaluation_mode(model):
            whole = model(input_ids=ids, use_cache=False).logits
            cache = None
            for part in ids.split([TOKENS // 2] + [1] * (TOKENS - TOKENS // 2), dim=1):
                output = model(input_ids=part, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                found.append(output.logits)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the model's own code says: then it does not
        return False
    return cache is not None and same_logits(torch.cat(found, dim=1), whole, rounding=1e-5)


def check_reloads(model: PreTrainedModel) -> None:
    """Raise :class:`UnsupportedModelError` unless a saved copy of ``model`` loads and computes the same."""
    # Buffers such as rotary frequencies are made anew, in float32.
    if not same_logits(probe_logits(reloaded(model)), probe_logits(model), rounding=1e-5):
        raise UnsupportedModelError(
            f"{type(model).__name__} of these sizes cannot be loaded again: its class computes other logits"
        )


@contextmanager
def verified(model: PreTrainedModel, before: Tensor | None, message: str, rounding: float = 0.0) -> Iterator[None]:
    """Context manager of a change of sizes that leaves :func:`probe_logits` as ``before``, the cache right and the
    model fit to be saved.

    Without ``before`` logits are not compared.

    Raises:
        NumericalError: ``message``: the logits differ. UnsupportedModelError: the class cannot run, decode from its
            cache what it could before, or load at these sizes. The model is as it was in all cases.
    """
    could_decode, state = decodes(model), ModelState(model)
    try:
        yield
        after = probe_logits(model)
        if before is not None and not same_logits(after, before, rounding):
            raise NumericalError(message)
        if could_decode and not decodes(model):
            raise UnsupportedModelError(f"{type(model).__name__} does not generate at these sizes: its cache fails")
        check_reloads(model)
    except BaseException:
        state.restore()
        raise


def same_logits(x: Tensor, y: Tensor, rounding: float = 0.0) -> bool:
    """True if logits agree, up to the rounding of sums over fewer (zero) terms in their dtype, or ``rounding``."""
    difference = float((x - y).abs().max() / y.abs().max())
    return difference <= max(rounding, _TOLERANCE.get(y.dtype, _LOOSE))


@contextmanager
def undone(model: PreTrainedModel) -> Iterator[None]:
    """Context manager that takes a change of sizes back on exit."""
    state = ModelState(model)
    try:
        yield
    finally:
        state.restore()
