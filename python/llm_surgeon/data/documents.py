"""Documents to calibrate on or to evaluate on, from the Hugging Face hub or from a local file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm_surgeon.data.chat import Conversation, has_template, render
from llm_surgeon.data.files import file_kind, local_file, read_file
from llm_surgeon.data.hub import HUB_NAMES, read_hub, read_known
from llm_surgeon.data.rows import (
    TEXT_KINDS,
    Document,
    require_text,
)
from llm_surgeon.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("calibration", "evaluation")
_HUB_SET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[^:/]*)(?::(?P<split>[^:/]*))?)?")


@dataclass(frozen=True)
class Documents:
    """Documents of a source: plain text and conversations, which are text only once a tokenizer's template is known.

    Attributes:
        source: as it was given.
        split: ``"calibration"`` or ``"evaluation"``.
        fields: names of the fields that were read, one a file; none for plain text.
        items: in order.
    """

    source: str
    split: str
    fields: tuple[str, ...]
    items: list[Document]

    @property
    def chat(self) -> bool:
        """True where there are conversations among them."""
        return any(isinstance(item, Conversation) for item in self.items)

    def text(self, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        r"""All in one, joined by a blank line (``"\n\n"``); conversations by the chat template follow each other as
        they are, for the template marks where each ends."""
        texts = [item if isinstance(item, str) else render(item, tokenizer) for item in self.items]
        if self.chat:
            texts = [require_text(text, f"a conversation of {self.source!r}") for text in texts]
        templated = has_template(tokenizer) and all(isinstance(item, Conversation) for item in self.items)
        text = ("" if templated else "\n\n").join(texts)
        if not text.strip():
            raise InputError(f"text {self.source!r} is empty")
        return text


def read_documents(source: str | Path, split: str, text_field: str | None = None) -> Documents:
    """The documents to calibrate on or to evaluate on.

    Args:
        source: one of

            - ``"wikitext2"``: WikiText-2 raw from the Hugging Face hub, split train or test;
            - ``"c4"``: the first 2000 English documents of C4 from the hub, split train or validation;
            - ``"owner/name"``, ``"owner/name:configuration"``, ``"owner/name:configuration:split"`` or
              ``"owner/name::split"``: any other data set of the hub, of which at most the first 16 million characters
              are read; where no split is named, train, or test (else validation) for evaluation. No code of a data set
              ever runs. With ``HF_HUB_OFFLINE=1`` the local cache is read;
            - a path to ``.txt`` (or WikiText's ``.raw``) as it is; to ``.jsonl``, ``.json`` (an array of objects, or
              lines), ``.csv`` or ``.parquet`` with one document per row; to one of these in ``.gz``; or to a ``.zip``
              of such files, of which calibration reads those whose stem ends in ``train``, evaluation those ending in
              ``test``, else in ``valid`` or ``validation``, and both read all, in order of their names, where there
              are no such files.

            Rows are read by one field for a whole file: ``text``, else the conversations in ``messages`` or
            ``conversations`` (messages with ``role`` and ``content`` or with ``from`` and ``value``), else the only
            field with strings where all others hold numbers. Null is left out; a row that lacks the field is refused.
        split: ``"calibration"`` or ``"evaluation"``.
        text_field: the field to read instead.

    Raises:
        InputError: there is no such source; it is damaged, empty, not text, or larger than the limits above.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    name = str(source)
    if name in HUB_NAMES:
        if text_field not in (None, "text"):
            raise InputError(f"{name!r} has no field {text_field!r}, only 'text'")
        fields, items = ["text"], read_known(name, split)
    elif (path := local_file(name)) is not None:
        fields, items = read_file(path, name, split, text_field)
    elif (match := _HUB_SET.fullmatch(name)) and not file_kind(match["name"]):
        fields, items = read_hub(name, match["name"], match["config"], match["split"], split, text_field)
    else:
        names = ", ".join(map(repr, HUB_NAMES))
        raise InputError(f"no text {name!r}: pass {names}, a data set of the hub (owner/name) or {TEXT_KINDS}")
    if all(isinstance(item, str) and not item.strip() for item in items):
        raise InputError(f"text {name!r} is empty")
    return Documents(name, split, tuple(dict.fromkeys(fields)), items)


def read_text(
    source: str | Path,
    split: str,
    *,
    text_field: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """The text of :func:`read_documents`; conversations by the chat template of ``tokenizer``, where it has one."""
    return read_documents(source, split, text_field).text(tokenizer)
