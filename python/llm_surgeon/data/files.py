"""Documents of local files: plain, rows, compressed and zipped, within limits."""

from __future__ import annotations

import gzip
import io
import lzma
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

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
    too_large,
)
from llm_surgeon.errors import InputError
from llm_surgeon.resources import available_memory, human_bytes

if TYPE_CHECKING:
    pass

# What a compressed file may unpack to. Prose shrinks to a third, logs to a thirtieth; a bomb to a thousandth and less.
MAX_RATIO = 100  # times its own size,
ALWAYS_ALLOWED = 2**26  # or these bytes,
MAX_UNPACKED = 2**34  # but never more than these;
MAX_MEMBERS = 10_000  # files of a zip that are read;
MEMORY_SHARE = 4  # and any file a quarter of the available memory, for a str takes up to four bytes a character.

_PLAIN = (".txt", ".raw")
_KINDS = (*_PLAIN, ".jsonl", ".json", ".csv", ".parquet")


def local_file(name: str) -> Path | None:
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


def file_kind(name: str) -> str | None:
    """The suffix that says how a file is read, below a ``.gz``; ``None`` for any other."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in _KINDS else None


def read_file(path: Path, name: str, split: str, text_field: str | None) -> tuple[list[str], list[Document]]:
    try:
        size = path.stat().st_size
        if path.suffix.lower() == ".zip":
            return _read_zip(path, name, size, split, text_field)
        if not file_kind(path.name):
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
    return not hidden and not name.endswith("/") and bool(file_kind(name))


def _members_of(split: str, names: list[str]) -> list[str]:
    """Members of one split by their stem, ``wiki.train`` or ``test-00000-of-00001`` say; else all."""
    endings = ("train",) if split == "calibration" else ("test", "valid|validation")
    for ending in endings:
        pattern = re.compile(rf"(?:.*[^a-z])?(?:{ending})(?:-\d+-of-\d+)?", re.DOTALL)
        found = [name for name in names if pattern.fullmatch(Path(name.lower().removesuffix(".gz")).stem)]
        if found:
            return found
    return names


def _parse(
    name: str, open_stream: Callable[[], Any], size: int, text_field: str | None
) -> tuple[list[str], list[Document]]:
    """The field, if any, and the documents of a file of ``size`` bytes, which may be opened more than once."""
    most, kind, opened = _most(size), file_kind(name), open_stream
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


_READERS: dict[str, tuple[Callable[[BinaryIO, str], Iterator[Row]], Callable[..., Any]]] = {
    ".jsonl": (jsonl_rows, documents_of_rows),
    ".json": (json_rows, documents_of_rows),
    ".csv": (csv_rows, csv_documents),
}
