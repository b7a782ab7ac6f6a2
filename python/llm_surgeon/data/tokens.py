"""Token ids of text, in little memory."""

from __future__ import annotations

import hashlib
import logging
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_surgeon.data.chat import has_template
from llm_surgeon.data.documents import Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

# Characters that are tokenized at once, for which a tokenizer takes about 150 bytes each;
_PIECE = 2**16
# those before a piece that are tokenized with it again, and around a cut to judge it by;
_CONTEXT = 2**10
# cuts that are tried before the rest of a text is taken at once, and pieces before the whole text is.
_CUTS, _RETRIES = 64, 8


def token_stream(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, str]:
    """Ids of the documents' text, see :func:`tokenize`, and the text's SHA-256 in hexadecimal digits.

    Says in the log which field was read, and how conversations became text.
    """
    if documents.fields:
        how = ""
        if documents.chat:
            template = has_template(tokenizer)
            how = (
                ", conversations by the chat template"
                if template
                else ", conversations as 'User: …' paragraphs, for the tokenizer has no chat template"
            )
        _logger.info("%r is read by its field %s%s", documents.source, ", ".join(map(repr, documents.fields)), how)
    text = documents.text(tokenizer)
    digest = hashlib.sha256()
    for start in range(0, len(text), _PIECE):
        digest.update(text[start : start + _PIECE].encode("utf-8"))
    return tokenize(text, tokenizer), digest.hexdigest()


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The ids of the whole text, int64 ``[n]``: one BOS in front (where the tokenizer has one), no other specials.

    A BOS that a chat template put in front already is that one. Long texts are tokenized piece by piece, to the same
    ids in little memory: a piece is tokenized behind the end of the one before, whose ids are then taken off, and cut
    where these agree in both, see :func:`_next_cut`. A text without such places is tokenized at once.
    """
    pieces = _pieces(text, tokenizer)
    if pieces is None:
        pieces = [_encode(text, tokenizer)]
    bos = tokenizer.bos_token_id
    if bos is not None and not (len(pieces[0]) and int(pieces[0][0]) == bos):
        pieces.insert(0, torch.tensor([bos], dtype=torch.int32))
    ids = torch.empty(sum(map(len, pieces)), dtype=torch.int64)
    torch.cat(pieces, out=ids)
    return ids


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    # verbose=False: the stream is cut into windows later, so its length deserves no warning.
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return torch.tensor(tokenizer(text, add_special_tokens=False, **options)["input_ids"], dtype=torch.int32)


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Tensor] | None:
    """Ids of consecutive pieces of ``text``; ``None`` where a piece and the context it follows do not agree."""
    pieces: list[Tensor] = []
    start, context = 0, torch.empty(0, dtype=torch.int32)  # the piece's place and the ids of what is before it
    while start < len(text) or not pieces:
        behind, place = max(0, start - _CONTEXT), start + _PIECE
        for _ in range(_RETRIES):
            end, following = _next_cut(text, place, tokenizer)
            ids = _encode(text[behind:end], tokenizer)
            seen = following[len(following) // 2 :]
            if torch.equal(ids[len(ids) - len(seen) :], seen):
                break
            place = end + _CONTEXT
        else:
            return None
        if not torch.equal(ids[: len(context)], context):
            return None
        pieces.append(ids[len(context) :])
        start, context = end, following
    return pieces


def _next_cut(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, Tensor]:
    """A place from ``start`` on where no token is cut, and the ids of the context before it.

    Whether a token ends at a place depends on what is near it alone, for pre-tokenizers scan from left to right and
    merges stay inside words. So it ends there if it does so in the text around it: if the ids of what is before the
    place are the first ids of that and what is behind it. Ends and beginnings of words are tried.
    """
    candidates = re.compile(r"(?<=\w)(?=\s)|(?<=\s)(?=\w)").finditer(text, start, max(start, len(text) - _CONTEXT))
    for _, match in zip(range(_CUTS), candidates, strict=False):
        end = match.end()
        context = _encode(text[end - _CONTEXT : end], tokenizer)
        around = _encode(text[end - _CONTEXT : end + _CONTEXT], tokenizer)
        if len(context) > 8 and torch.equal(around[: len(context)], context):
            return end, context
    return len(text), torch.empty(0, dtype=torch.int32)
