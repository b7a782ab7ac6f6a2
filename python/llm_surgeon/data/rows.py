"""Documents out of rows: JSON lines, JSON arrays, CSV and parquet, each read by one field for a whole file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from llm_surgeon.data.chat import Conversation
from llm_surgeon.errors import InputError, one_line

TEXT_KINDS = "a .txt, .jsonl, .json, .csv, .parquet, .gz or .zip file"
CHAT_FIELDS = ("messages", "conversations")
# Beside them, in some data: the first message of the conversation.
_SYSTEM_FIELD = "system"
_PARQUET_ROWS = 256  # decoded at once
# Fields that name a document, or sort it: docid, file_name, sha256, lang …
_NAMES = re.compile(
    r"(?:.*[_-])?(?:\w*id|ur[il]|name|title|file(name)?|path|source|hash|(?:sha|md)\d*|key|label|category|lang(uage)?|split)",
    re.IGNORECASE,
)
_KINDS = {str: "string", type(None): "null", list: "list", dict: "object"}
# A row of a file: its name in messages, and its fields.
Row = tuple[str, Mapping[str, Any]]
Document = str | Conversation


def documents_of_rows(
    rows: Callable[[], Iterable[Row]],
    name: str,
    wanted: str | None = None,
    kind: Callable[[Any], str] = lambda value: _KINDS.get(type(value), "number"),
) -> tuple[str | None, list[Document]]:
    """The field that was read and a document a row, those without text (null) left out.

    The field is ``wanted``; or else the first of ``text``, ``messages`` and ``conversations`` that every row has, the
    first of them that any row has, or the only field with strings where all others hold numbers or truth values.

    Args:
        rows: called twice: the whole file's fields are known before the first document is taken.
        kind: of a value: ``"string"``, ``"number"``, ``"list"``, ``"object"`` or ``"null"``.

    Raises:
        InputError: there is no such field; a row lacks it or holds something else there.
    """
    kinds: dict[str, set[str]] = {}
    present: Counter[str] = Counter()
    total = 0
    for _, row in rows():
        total += 1
        present.update(row.keys())
        for key, value in row.items():
            kinds.setdefault(key, set()).add(kind(value))
    if not total:
        return None, []
    field = choose_field(kinds, {key for key, count in present.items() if count == total}, name, wanted)
    return field, take(rows(), field, field == wanted)


def take(rows: Iterable[Row], field: str, wanted: bool) -> list[Document]:
    """Contents of ``field`` in each of ``rows``; a list is a conversation, where it is ``wanted`` or a chat field."""
    documents: list[Document] = []
    for where, row in rows:
        if field not in row:
            raise InputError(f"{where} has no field {field!r}")
        value = row[field]
        if isinstance(value, str) and (wanted or field not in CHAT_FIELDS):
            documents.append(require_text(value, where))
        elif field in CHAT_FIELDS or (wanted and isinstance(value, list)):
            if value:
                documents.append(Conversation.of(value, where, row.get(_SYSTEM_FIELD)))
        elif value is not None:
            raise InputError(f"field {field!r} of {where} is no text but of type {type(value).__name__}")
    return documents


def choose_field(kinds: Mapping[str, set[str]], everywhere: Collection[str], name: str, wanted: str | None) -> str:
    """The field to read, see :func:`documents_of_rows`; ``everywhere`` are the fields of every row."""
    found = ", ".join(sorted(kinds)[:20]) or "none"
    if wanted is not None:
        if wanted not in kinds:
            raise InputError(f"{name!r} has no field {wanted!r} (found {found})")
        return wanted
    usual = ("text", *CHAT_FIELDS)
    for field in (*(field for field in usual if field in everywhere), *usual):
        if field in kinds:
            return field
    strings = [field for field, of in kinds.items() if "string" in of]
    nested = any(of & {"list", "object"} for of in kinds.values())
    # Names, addresses and classes beside nothing that could be text are not the text either.
    if len(strings) != 1 or nested or _NAMES.fullmatch(strings[0]):
        raise InputError(
            f"{name!r} has no field 'text', 'messages' or 'conversations' and not exactly one field with text "
            f"(found {found}): name the field to read, --text-field"
        )
    return strings[0]


def jsonl_rows(stream: BinaryIO, name: str) -> Iterator[Row]:
    """An object a line."""
    # Lines end at "\n" alone: a JSON string may hold U+2028 and its like.
    for number, line in enumerate(stream, 1):
        where = f"line {number} of {name!r}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{where} is not valid UTF-8 at its byte {error.start}") from error
        if text.strip():
            yield where, _row(_parse(json.loads, text, where), where)


def json_rows(stream: BinaryIO, name: str) -> Iterator[Row]:
    """An array of objects; or else JSON lines, which are often named so."""
    text = decode(stream.read(), name)
    space = re.compile(r"[ \t\r\n]*")
    start = _skip(space, text, 0)
    if not text.startswith("[", start):
        yield from jsonl_rows(io.BytesIO(text.encode("utf-8")), name)
        return
    # One object after the other: all of them at once would take many times the memory of their text.
    decoder = json.JSONDecoder()
    position, number = _skip(space, text, start + 1), 0
    while not (number == 0 and text.startswith("]", position)):
        number += 1
        where = f"row {number} of {name!r}"
        value, position = _parse(lambda at: decoder.raw_decode(text, at), position, where)
        yield where, _row(value, where)
        position = _skip(space, text, position)
        if text.startswith("]", position):
            break
        if not text.startswith(",", position):
            raise InputError(f"{name!r} is not valid JSON after its row {number}")
        position = _skip(space, text, position + 1)
    if text[position + 1 :].strip():
        raise InputError(f"{name!r} is not valid JSON: something follows its array")


def csv_documents(
    rows: Callable[[], Iterable[Row]], name: str, wanted: str | None
) -> tuple[str | None, list[Document]]:
    """:func:`documents_of_rows` of :func:`csv_rows`, of which a cell that reads as a number counts as one."""
    limit = csv.field_size_limit(2**31 - 1)  # the largest anywhere; of the whole process: put back
    try:
        return documents_of_rows(rows, name, wanted, _cell_kind)
    finally:
        csv.field_size_limit(limit)


def csv_rows(stream: BinaryIO, name: str) -> Iterator[Row]:
    """Rows of cells separated by commas (RFC 4180) below a header; an empty cell is null."""
    reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise InputError(f"the header of {name!r} holds a field twice")
        for number, cells in enumerate(reader, 1):
            where = f"row {number} of {name!r}"
            if cells and len(cells) != len(header):
                raise InputError(f"{where} has {len(cells)} cells and the header {len(header)}")
            if cells:
                yield where, {field: cell or None for field, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise InputError(f"{name!r} is not valid CSV at line {reader.line_num}: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"text {name!r} is not valid UTF-8 after line {reader.line_num}") from error


def parquet_documents(stream: BinaryIO, name: str, wanted: str | None, most: int) -> tuple[str | None, list[Document]]:
    """The field that was read of a parquet file and its documents; at most ``most`` bytes of them."""
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(stream)
        kinds = {field.name: {_arrow_kind(field.type)} for field in file.schema_arrow}
        field = choose_field(kinds, kinds, name, wanted)
        documents = take(_parquet_rows(file, field, name, most), field, field == wanted)
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"parquet file {name!r} is damaged: {one_line(error)}") from error
    return field, documents


def _parquet_rows(file: Any, field: str, name: str, most: int) -> Iterator[Row]:
    number = size = 0
    names = [field, *({_SYSTEM_FIELD} & set(file.schema_arrow.names) if field in CHAT_FIELDS else ())]
    for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=names, use_threads=False):
        size += batch.nbytes
        if size > most:
            raise InputError(too_large(name, most))
        for row in batch.to_pylist():
            number += 1
            yield f"row {number} of {name!r}", row


def decode(data: bytes, name: str) -> str:
    """UTF-8 with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"text {name!r} is not valid UTF-8 at byte {error.start}") from error


def require_text(text: str, where: str) -> str:
    """``text``; :class:`InputError` where it is none: half of a surrogate pair, which JSON can spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half of a surrogate pair at its character {error.start}: no text") from error
    return text


def too_large(name: str, most: int) -> str:
    """The sentence for a file that unpacks to more than ``most`` bytes."""
    return f"{name!r} unpacks to more than {most:,} bytes, too many for its size or for the memory here"


def _arrow_kind(kind: Any) -> str:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "string"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return "list"
    return "object" if types.is_nested(kind) else "number"


def _cell_kind(cell: str | None) -> str:
    if cell is None:
        return "null"
    try:
        float(cell)
    except ValueError:
        return "string"
    return "number"


def _row(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} is no object with fields but of type {type(value).__name__}")
    return value


def _skip(space: re.Pattern[str], text: str, position: int) -> int:
    match = space.match(text, position)
    return match.end() if match else position


def _parse(parse: Callable[[Any], Any], argument: Any, where: str) -> Any:
    try:
        return parse(argument)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not valid JSON: {error.msg}") from error
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{where} holds a number that cannot be read: {str(error).split(';')[0]}") from error
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply") from error
