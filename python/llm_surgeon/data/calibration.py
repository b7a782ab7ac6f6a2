"""Calibration sequences, and windows of a stream of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_surgeon.data.documents import read_text
from llm_surgeon.data.tokens import tokenize
from llm_surgeon.distributed import ALONE, Ranks
from llm_surgeon.errors import InputError
from llm_surgeon.resources import require_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token sequences of one length; checked when built.

    Attributes:
        input_ids: int64 ``[samples, seqlen]`` (any integer dtype is converted).
        attention_mask: bool ``[samples, seqlen]``, False = padding; ``None`` (also what a mask without padding
            becomes) = every token is real.
        ranks: that share passes over the sequences: each goes through its own, and sums are those of all.

    Raises:
        InputError: no sequences, not integers, negative ids, another shape, or fewer than two tokens in a sequence.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        ids, mask = self.input_ids, self.attention_mask
        require_windows(ids, "calibration input_ids")
        object.__setattr__(self, "input_ids", ids.long())
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, not {shape}")
        mask = mask.bool()
        short = (mask.sum(1) < 2).nonzero()
        if len(short):
            raise InputError(f"calibration sequence {int(short[0])} has fewer than 2 tokens that are not padding")
        object.__setattr__(self, "attention_mask", None if bool(mask.all()) else mask)

    @classmethod
    def of(cls, value: Any) -> Calibration:
        """``value`` as a calibration set.

        Args:
            value: a :class:`Calibration`, an integer tensor ``[samples, seqlen]``, or mappings with ``input_ids``
                and maybe ``attention_mask``: each a row ``[T]`` or a batch ``[b, T]`` (tensors or lists, such as a
                tokenizer or a ``DataLoader`` gives), padded here to the longest T on the right.
        """
        if isinstance(value, Calibration):
            return value
        if isinstance(value, Tensor):
            return cls(value)
        items = [value] if isinstance(value, Mapping) else value
        if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
            raise InputError(
                "calibration must be a Calibration, an integer tensor [samples, seqlen] or mappings with input_ids, "
                f"not {type(value).__name__}"
            )
        ids: list[Tensor] = []
        masks: list[Tensor] = []
        for index, item in enumerate(items):
            if not isinstance(item, Mapping) or "input_ids" not in item:
                raise InputError(f"calibration item {index} is not a mapping with input_ids")
            rows = _rows(item["input_ids"], f"input_ids of calibration item {index}")
            mask = item.get("attention_mask")
            if mask is None:
                mask = torch.ones_like(rows)
            mask = _rows(mask, f"attention_mask of calibration item {index}")
            if mask.shape != rows.shape:
                raise InputError(f"attention_mask of calibration item {index} has another shape than its input_ids")
            ids.extend(rows)
            masks.extend(mask)
        if not ids:
            raise InputError("calibration holds no sequences")
        pad = torch.nn.utils.rnn.pad_sequence
        return cls(pad(ids, batch_first=True), pad(masks, batch_first=True).bool())

    @classmethod
    def from_text(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        data: str | Path,
        *,
        samples: int = 128,
        seqlen: int = 2048,
        seed: int = 0,
        text_field: str | None = None,
    ) -> Calibration:
        """Windows ``[samples, seqlen]`` of a text, drawn uniformly with ``seed`` as ``surgeon prune`` does it.

        Args:
            data: a file (.txt, .jsonl, .json, .csv, .parquet, .gz, .zip), ``"wikitext2"``, ``"c4"`` or a data set of
                the hub, ``owner/name[:configuration[:split]]``.
            text_field: of rows what is read; left out, ``text`` or conversations.

        Raises:
            InputError: there is no such text, or it is shorter than a window.
        """
        text = read_text(data, "calibration", text_field=text_field, tokenizer=tokenizer)
        return calibration_windows(tokenize(text, tokenizer), samples, seqlen, seed)

    def counts(self) -> tuple[int, int]:
        """Numbers of sequences and of their tokens that are not padding."""
        real = self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())
        return len(self.input_ids), real

    def without(self, positions: Sequence[int]) -> Calibration:
        """All sequences but those at ``positions``."""
        kept = [row for row in range(len(self.input_ids)) if row not in set(positions)]
        mask = None if self.attention_mask is None else self.attention_mask[kept]
        return Calibration(self.input_ids[kept], mask, self.ranks)

    @property
    def own(self) -> slice:
        """The sequences that this rank goes through."""
        return self.ranks.share(len(self.input_ids))

    def parts(self, batch_size: int) -> Iterator[slice]:
        """The batches of :meth:`batches`, as ranges of sequences."""
        own = self.own
        for start in range(own.start, own.stop, batch_size):
            yield slice(start, min(start + batch_size, own.stop))

    def batches(self, batch_size: int, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """``(input_ids, attention_mask)`` of at most ``batch_size`` of the rank's sequences at a time, on a device."""
        for part in self.parts(batch_size):
            mask = None if self.attention_mask is None else self.attention_mask[part].to(device)
            yield self.input_ids[part].to(device), mask


def calibration_windows(ids: Tensor, samples: int, seqlen: int, seed: int) -> Calibration:
    """``samples`` windows of ``seqlen`` tokens of the stream ``ids``, starts drawn uniformly with ``seed``.

    Raises:
        InputError: the stream is shorter than a window, or the windows are too many for the memory.
    """
    require_length(ids, seqlen)
    starts = window_starts(len(ids), samples, seqlen, seed)
    return Calibration(ids.unfold(0, seqlen, 1)[starts])


def window_starts(length: int, samples: int, seqlen: int, seed: int) -> Tensor:
    """Starts of the windows of :func:`calibration_windows` in a stream of ``length`` tokens, int64 ``[samples]``."""
    require_room(samples, seqlen)
    return torch.randint(length - seqlen + 1, (samples,), generator=torch.Generator().manual_seed(seed))


def require_room(samples: int, seqlen: int) -> None:
    """Raise :class:`InputError` where ``samples`` windows of ``seqlen`` int64 tokens do not fit the memory."""
    require_memory(8 * samples * (seqlen + 1), "cpu", f"{samples} windows of {seqlen} tokens")


def evaluation_windows(ids: Tensor, seqlen: int) -> Tensor:
    """The stream cut into non-overlapping windows ``[len(ids) // seqlen, seqlen]``, the tail dropped."""
    require_length(ids, seqlen)
    count = len(ids) // seqlen
    return ids[: count * seqlen].view(count, seqlen)


def require_windows(ids: Any, name: str) -> None:
    """Raise :class:`InputError` unless ``ids`` is an integer tensor of at least one row of two or more token ids."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"{name} must be a tensor of integers, not {kind}")
    if ids.dim() != 2:
        raise InputError(f"{name} must be [sequences, tokens], not of shape {tuple(ids.shape)}")
    if not len(ids) or ids.shape[1] < 2:
        raise InputError(f"{name} needs a sequence of at least 2 tokens, not shape {tuple(ids.shape)}")
    if int(ids.min()) < 0:
        raise InputError(f"{name} holds the negative token id {int(ids.min())}")


def require_length(ids: Tensor, seqlen: int) -> None:
    """Raise :class:`InputError` unless the stream holds a window."""
    if len(ids) < seqlen:
        raise InputError(
            f"the text has {len(ids)} tokens and one sequence needs {seqlen}: pass more text or less seqlen"
        )


def _rows(value: Any, name: str) -> Tensor:
    """A row ``[T]`` or a batch ``[b, T]``, a tensor or lists, as ``[b, T]`` integers."""
    try:
        tensor = torch.atleast_2d(torch.as_tensor(value))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is not a rectangular array of integers: {error}") from error
    if tensor.is_floating_point() or tensor.dim() > 2:
        raise InputError(f"{name} must be integers [T] or [b, T], not {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.long()
