"""Read the text to calibrate on or to evaluate on: from the Hugging Face hub or from a local file."""

from __future__ import annotations

import gzip
import io
import itertools
import lzma
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import huggingface_hub.constants

from llm_surgeon.data.chat import Conversation, has_template, render
from llm_surgeon.data.rows import (
    TEXT_KINDS,
    Document,
    Row,
    csv_documents,
    csv_rows,
    decode,
    documents_of_rows,
    json_rows,
    jsonl_rows,
    parquet_documents,
    require_text,
    too_large,
)
from llm_surgeon.errors import InputError, one_line
from llm_surgeon.resources import available_memory, hub_reachable, human_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("calibration", "evaluation")
HUB_NAMES = ("wikitext2", "c4")
C4_DOCUMENTS = 2000  # about a million tokens
HUB_CHARACTERS = 2**24  # of other hub data sets, the largest of which hold terabytes: about four million tokens

# What a compressed file may unpack to. Prose shrinks to a third, logs to a thirtieth; a bomb to a thousandth and less.
MAX_RATIO = 100  # times its own size,
ALWAYS_ALLOWED = 2**26  # or these bytes,
MAX_UNPACKED = 2**34  # but never more than these;
MAX_MEMBERS = 10_000  # files of a zip that are read;
MEMORY_SHARE = 4  # and any file a quarter of the available memory, for a str takes up to four bytes a character.

_PLAIN = (".txt", ".raw")
_KINDS = (*_PLAIN, ".jsonl", ".json", ".csv", ".parquet")
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
        fields, items = ["text"], _read_known(name, split)
    elif (path := _file(name)) is not None:
        fields, items = _read_file(path, name, split, text_field)
    elif (match := _HUB_SET.fullmatch(name)) and not _kind(match["name"]):
        fields, items = _read_hub(name, match["name"], match["config"], match["split"], split, text_field)
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


def _file(name: str) -> Path | None:
    """The regular file called ``name``, ``None`` where there is nothing; folders, pipes and devices are refused."""
    try:
        path = Path(name).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a NUL in the name
        raise InputError(f"text {name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"text {name!r} is a folder: pass the path of {TEXT_KINDS}")
    if not stat.S_ISREG(mode):  # reading could wait, or go on, for ever
        raise InputError(f"text {name!r} is no regular file but a pipe or a device: write it to a file first")
    return path


def _read_file(path: Path, name: str, split: str, text_field: str | None) -> tuple[list[str], list[Document]]:
    try:
        size = path.stat().st_size
        if path.suffix.lower() == ".zip":
            return _read_zip(path, name, size, split, text_field)
        if not _kind(path.name):
            raise InputError(f"text {name!r} is of an unknown kind: pass the path of {TEXT_KINDS}")
        return _parse(name, lambda: path.open("rb"), size, text_field)
    except OSError as error:
        raise InputError(f"text {name!r} cannot be read: {error.strerror or error}") from error


def _read_zip(path: Path, name: str, size: int, split: str, text_field: str | None) -> tuple[list[str], list[Document]]:
    fields: list[str] = []
    items: list[Document] = []
    try:
        with zipfile.ZipFile(path) as archive:
            # Of members with the same name the last one counts, as for all who unpack them.
            members = {info.filename: info for info in archive.infolist() if _is_text_member(info.filename)}
            names = _members_of(split, sorted(members))
            if not names:
                raise InputError(f"zip file {name!r} holds no file to read: pass the path of {TEXT_KINDS}")
            if len(names) > MAX_MEMBERS:
                raise InputError(f"zip file {name!r} holds {len(names)} files to read, more than {MAX_MEMBERS}")
            # No member yields more than it says here.
            unpacked = sum(members[member].file_size for member in names)
            if unpacked > (most := _most(size)):
                raise InputError(too_large(name, most))
            for member in names:
                opened = partial(archive.open, members[member])
                found, documents = _parse(f"{name}/{member}", opened, members[member].file_size, text_field)
                fields += found
                items += documents
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise InputError(f"zip file {name!r} is damaged: {error}") from error
    except RuntimeError as error:  # encrypted, or a compression this Python lacks
        raise InputError(f"zip file {name!r} cannot be read: {error}") from error
    return fields, items


def _is_text_member(name: str) -> bool:
    hidden = name.startswith("__MACOSX/") or Path(name).name.startswith(".")
    return not hidden and not name.endswith("/") and bool(_kind(name))


def _members_of(split: str, names: list[str]) -> list[str]:
    """Members of one split by their stem, ``wiki.train`` or ``test-00000-of-00001`` say; else all."""
    endings = ("train",) if split == "calibration" else ("test", "valid|validation")
    for ending in endings:
        pattern = re.compile(rf"(?:.*[^a-z])?(?:{ending})(?:-\d+-of-\d+)?", re.DOTALL)
        found = [name for name in names if pattern.fullmatch(Path(name.lower().removesuffix(".gz")).stem)]
        if found:
            return found
    return names


def _kind(name: str) -> str | None:
    """The suffix that says how a file is read, below a ``.gz``; ``None`` for any other."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in _KINDS else None


def _parse(
    name: str, open_stream: Callable[[], Any], size: int, text_field: str | None
) -> tuple[list[str], list[Document]]:
    """The field, if any, and the documents of a file of ``size`` bytes, which may be opened more than once."""
    most, kind, opened = _most(size), _kind(name), open_stream
    if name.lower().endswith(".gz"):

        def opened() -> BinaryIO:
            return cast(BinaryIO, io.BufferedReader(_Unpacked(open_stream(), name, most)))

    elif size > most:
        raise InputError(f"text {name!r} of {human_bytes(size)} is too large for the memory here")
    try:
        if kind in _PLAIN:
            if text_field is not None:
                raise InputError(f"text {name!r} has no field {text_field!r}: it is plain text")
            with opened() as stream:
                return [], [decode(stream.read(), name)]
        if kind == ".parquet":
            with opened() as stream:
                # What is unpacked on the way cannot be sought in, or only slowly.
                file = stream if isinstance(stream, io.BufferedReader) and stream.seekable() else None
                field, items = parquet_documents(file or io.BytesIO(stream.read()), name, text_field, most)
        else:
            assert kind is not None
            reader, documents = _READERS[kind]
            field, items = documents(lambda: _rows(opened, reader, name), name, text_field)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        if opened is open_stream:  # of the zip around it
            raise
        raise InputError(f"gzip file {name!r} is damaged: {error}") from error
    return [] if field is None else [field], items


def _most(size: int) -> int:
    """Bytes that a file of ``size`` bytes may unpack to."""
    return min(max(MAX_RATIO * size, ALWAYS_ALLOWED), MAX_UNPACKED, available_memory("cpu") // MEMORY_SHARE)


def _rows(opened: Callable[[], Any], reader: Callable[[BinaryIO, str], Iterator[Row]], name: str) -> Iterator[Row]:
    with opened() as stream:
        yield from reader(stream, name)


class _Unpacked(io.RawIOBase):
    """Content of the gzip file ``packed``, up to ``most`` bytes; :class:`InputError` beyond."""

    def __init__(self, packed: BinaryIO, name: str, most: int) -> None:
        self._packed, self._file, self._name = packed, gzip.GzipFile(fileobj=packed), name
        self._most, self._read = most, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._read += count
        if self._read > self._most:
            raise InputError(too_large(self._name, self._most))
        return count

    def close(self) -> None:
        self._packed.close()
        super().close()


def _read_known(name: str, split: str) -> list[Document]:
    calibration = split == "calibration"
    with _hub(name) as load_dataset:
        if name == "wikitext2":
            part = "train" if calibration else "test"
            return list(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)["text"])
        part = "train" if calibration else "validation"
        rows = load_dataset("allenai/c4", "en", split=part, streaming=True)
        return [row["text"] for row in itertools.islice(rows, C4_DOCUMENTS)]


def _read_hub(
    source: str, name: str, config: str | None, part: str | None, split: str, text_field: str | None
) -> tuple[list[str], list[Document]]:
    with _hub(source, f"no file {source!r}, and ") as load_dataset:
        # Streamed, so that no more is downloaded than is read; the cache holds whole data sets only.
        parts = load_dataset(name, config or None, streaming=not huggingface_hub.constants.HF_HUB_OFFLINE)
        usual = ("train",) if split == "calibration" else ("test", "validation")
        chosen = next((each for each in ([part] if part else usual) if each in parts), None)
        if chosen is None:
            wanted = f"split {part!r}" if part else f"split {' or '.join(usual)}"
            raise InputError(f"{source!r} has no {wanted}: its splits are {', '.join(map(str, parts))}")
        rows = list(_first_rows(parts[chosen]))
    labelled = [(f"row {number} of {source!r}", row) for number, row in enumerate(rows, 1)]
    field, items = documents_of_rows(lambda: labelled, source, text_field)
    return [] if field is None else [field], items


def _first_rows(rows: Any) -> Iterator[Mapping[str, Any]]:
    characters = 0
    for row in rows:
        yield row
        characters += sum(len(str(value)) for value in row.values())
        if characters > HUB_CHARACTERS:
            return


@contextmanager
def _hub(name: str, missing: str = "") -> Iterator[Callable[..., Any]]:
    """``datasets.load_dataset``; what goes wrong inside the block becomes an :class:`InputError` about ``name``."""
    sentence = f"{missing}cannot read {name!r} from the Hugging Face hub: pass {TEXT_KINDS} instead"
    if not huggingface_hub.constants.HF_HUB_OFFLINE and not hub_reachable():
        raise InputError(f"{sentence} (no network; HF_HUB_OFFLINE=1 reads the local cache)")
    try:
        from datasets import load_dataset

        yield load_dataset
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{sentence} (it takes the package datasets: {error})") from error
    except Exception as error:  # builders, file systems and clients each raise what they please
        raise InputError(f"{sentence} ({one_line(error)})") from error


_READERS: dict[str, tuple[Callable[[BinaryIO, str], Iterator[Row]], Callable[..., Any]]] = {
    ".jsonl": (jsonl_rows, documents_of_rows),
    ".json": (json_rows, documents_of_rows),
    ".csv": (csv_rows, csv_documents),
}
