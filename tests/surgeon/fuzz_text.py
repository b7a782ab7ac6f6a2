"""Random text files: each gives text, or is refused in a sentence; whole, damaged, and of no format at all."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import pyarrow
from hypothesis import strategies as st
from pyarrow import parquet

from llm_surgeon import InputError
from llm_surgeon.data.documents import read_documents

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".zip", ".jsonl.gz", ".csv.gz", ".parquet.gz", ".txt.gz")

_texts = st.text(max_size=12)
_messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "pirate", None, 3]),
            "content": st.one_of(
                _texts, st.none(), st.lists(st.one_of(_texts, st.just({"type": "text", "text": "t"})))
            ),
            "from": st.sampled_from(["human", "gpt", "observation", ""]),
            "value": st.one_of(_texts, st.integers()),
        },
    ),
    max_size=3,
)
_values = st.one_of(_texts, st.none(), st.integers(-(10**30), 10**30), st.booleans(), _messages, st.floats())
_rows = st.lists(
    st.dictionaries(
        st.sampled_from(["text", "messages", "conversations", "id", "content", "n", ""]), _values, max_size=3
    ),
    max_size=4,
)
_odd_lines = st.sampled_from(
    [
        "[" * 3000,
        '{"text": ' * 500,
        '{"text": ' + "9" * 5000 + "}",
        '{"text": "\\ud800"}',
        '"',
        "\ufeff{}",
        "\x00",
        '{"text"',
    ]
)


def _jsonl(rows: list[dict[str, object]]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def _csv(rows: list[dict[str, object]]) -> bytes:
    return "\n".join(
        ",".join(f'"{value}"' if n % 2 else str(value) for n, value in enumerate(row.values())) for row in rows
    ).encode("utf-8", "surrogatepass")


def _parquet(rows: list[dict[str, object]]) -> bytes:
    buffer = io.BytesIO()
    columns = {key: [str(row.get(key)) for row in rows] for row in rows for key in row}
    parquet.write_table(pyarrow.table(columns or {"text": ["t"]}), buffer)
    return buffer.getvalue()


def _zip(rows: list[dict[str, object]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../train.jsonl", _jsonl(rows))
        archive.writestr("test.csv.gz", gzip.compress(_csv(rows)))
    return buffer.getvalue()


_whole = st.one_of(
    _rows.map(_jsonl),
    _rows.map(lambda rows: json.dumps(rows).encode()),
    _rows.map(_csv),
    _rows.map(_parquet),
    _rows.map(_zip),
    st.lists(st.one_of(_odd_lines, _rows.map(json.dumps)), max_size=3).map(lambda lines: "\n".join(lines).encode()),
)
_packed = st.one_of(_whole, _whole.map(gzip.compress))
# Bytes that are put in the place of others.
_damage = st.lists(st.tuples(st.integers(0, 4000), st.binary(max_size=4)), max_size=3)


def _damaged(whole: bytes, damage: list[tuple[int, bytes]], kept: float) -> bytes:
    data = bytearray(whole)
    for place, content in damage:
        at = place % (len(data) + 1)
        data[at : at + len(content)] = content
    return bytes(data[: round(kept * len(data))])


_formats = {
    ".jsonl": _rows.map(_jsonl),
    ".json": _rows.map(lambda rows: json.dumps(rows).encode()),
    ".csv": _rows.map(_csv),
    ".parquet": _rows.map(_parquet),
    ".zip": _rows.map(_zip),
}
_matching = st.one_of(
    *(st.tuples(st.just(suffix), files) for suffix, files in _formats.items()),
    *(st.tuples(st.just(f"{suffix}.gz"), files.map(gzip.compress)) for suffix, files in _formats.items()),
)
# A file's suffix and what is in it: of that format, whole, damaged or cut short; of another; or any bytes at all.
documents = st.one_of(
    _matching,
    st.builds(
        lambda file, damage, kept: (file[0], _damaged(file[1], damage, kept)),
        _matching,
        _damage,
        st.one_of(st.just(1.0), st.floats(0.0, 1.0)),
    ),
    st.tuples(st.sampled_from(SUFFIXES), st.one_of(_packed, st.binary(max_size=60))),
)


def check(folder: Path, suffix: str, document: bytes, field: str | None = None) -> str:
    """Read ``document`` as a text file, without a tokenizer; what became of it: "text", "refused".

    Raises:
        AssertionError: the text cannot be encoded or is far larger than what unpacks to it may be; any other exception
            than :class:`InputError` passes, as the fault that it is.
    """
    path = folder / f"text{suffix}"
    path.write_bytes(document)
    try:
        text = read_documents(path, "calibration", field).text()
    except InputError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 2000
        return "refused"
    assert text.strip() and len(text.encode("utf-8")) < 2**27
    return "text"
