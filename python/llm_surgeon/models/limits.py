"""The sequences that a model takes: how long, and of which tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llm_surgeon.checks import require_positive_int
from llm_surgeon.errors import InputError


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's decoder: its own, or the one inside that of a model of several modalities."""
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def positions(model: nn.Module) -> int | None:
    """Tokens in the longest sequence that the (text part of the) model takes; ``None`` where it does not say."""
    longest = getattr(text_config(model), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None


def choose_seqlen(wanted: int | None, model: nn.Module) -> int:
    """Tokens in a window: ``wanted``, or else 2048 or the model's own limit; :class:`InputError` if it takes fewer."""
    longest = positions(model)
    if wanted is None:
        return min(2048, longest or 2048)
    require_positive_int("seqlen", wanted)
    if longest is not None and wanted > longest:
        raise InputError(f"seqlen {wanted} is longer than the {longest} positions of the model")
    return wanted


def require_fit(ids: Tensor, model: nn.Module, name: str) -> None:
    """Raise :class:`InputError` where ``ids`` ``[n, seqlen]`` hold tokens or positions that ``model`` lacks."""
    embeddings = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    if (largest := int(ids.max())) >= embeddings:
        raise InputError(f"{name} hold token id {largest}, and the model has {embeddings} embeddings")
    longest = positions(model)
    if longest is not None and ids.shape[1] > longest:
        raise InputError(f"{name} have {ids.shape[1]} tokens, and the model has {longest} positions")
