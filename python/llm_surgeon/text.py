"""Read the text to calibrate on or to evaluate on: from the Hugging Face hub or from a local file."""

from __future__ import annotations

import io
import itertools
import json
import lzma
import re
import zipfile
import zlib
from pathlib import Path

import huggingface_hub.constants

from llm_surgeon.errors import InputError
from llm_surgeon.resources import hub_reachable

SPLITS = ("calibration", "evaluation")
HUB_NAMES = ("wikitext2", "c4")
C4_DOCUMENTS = 2000  # about a million tokens
_LOCAL = "a .txt, .jsonl, .parquet or .zip file"


def read_text(source: str | Path, split: str) -> str:
    """The text to calibrate on or to evaluate on; documents are joined by a blank line (``"\\n\\n"``).

    Args:
        source: one of

            - ``"wikitext2"``: WikiText-2 raw from the Hugging Face hub, split train or test;
            - ``"c4"``: the first 2000 English documents of C4 from the hub, split train or validation;
            - a path to ``.txt`` (or WikiText's ``.raw``) as it is; ``.jsonl`` or ``.parquet`` with one document per
              row, in the field ``text`` or the only string field; or a ``.zip`` of such files, of which calibration
              reads those whose stem ends in ``train``, evaluation those ending in ``test``, else in ``valid`` or
              ``validation``, and both read all, in order of their names, where there are no such files.
        split: ``"calibration"`` or ``"evaluation"``.

    Raises:
        InputError: there is no such source, or it is damaged, empty or not text.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    text = _read_hub(str(source), split) if str(source) in HUB_NAMES else _read_file(source, split)
    if not text.strip():
        raise InputError(f"text {str(source)!r} is empty")
    return text


def _read_file(source: str | Path, split: str) -> str:
    path = Path(source).expanduser()
    if not path.exists():
        names = ", ".join(map(repr, HUB_NAMES))
        raise InputError(f"no text {str(source)!r}: pass {names} or the path of {_LOCAL}")
    if path.is_dir():
        raise InputError(f"text {str(source)!r} is a folder: pass the path of {_LOCAL}")
    try:
        if path.suffix.lower() == ".zip":
            return _read_zip(path, split)
        if path.suffix.lower() in _PARSERS:
            return _parse(str(path), path.read_bytes())
    except OSError as error:
        raise InputError(f"text {str(source)!r} cannot be read: {error.strerror or error}") from error
    raise InputError(f"text {str(source)!r} is of an unknown kind: pass the path of {_LOCAL}")


def _read_hub(name: str, split: str) -> str:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    unreachable = f"cannot read {name!r} from the Hugging Face hub: pass {_LOCAL} instead"
    if not huggingface_hub.constants.HF_HUB_OFFLINE and not hub_reachable():
        raise InputError(f"{unreachable} (no network; HF_HUB_OFFLINE=1 reads the local cache)")
    calibration = split == "calibration"
    try:
        if name == "wikitext2":
            split = "train" if calibration else "test"
            return "\n\n".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"])
        split = "train" if calibration else "validation"
        rows = load_dataset("allenai/c4", "en", split=split, streaming=True)
        return "\n\n".join(row["text"] for row in itertools.islice(rows, C4_DOCUMENTS))
    except (OSError, DatasetsError) as error:
        raise InputError(f"{unreachable} ({' '.join(str(error).split())})") from error


def _read_zip(path: Path, split: str) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(filter(_is_text_member, archive.namelist()))
            texts = [(f"{path}/{name}", archive.read(name)) for name in _members_of(split, names)]
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise InputError(f"zip file {str(path)!r} is damaged: {error}") from error
    except RuntimeError as error:  # encrypted, or a compression this Python lacks
        raise InputError(f"zip file {str(path)!r} cannot be read: {error}") from error
    if not texts:
        raise InputError(f"zip file {str(path)!r} holds no .txt, .jsonl or .parquet file")
    return "\n\n".join(_parse(name, data) for name, data in texts)


def _is_text_member(name: str) -> bool:
    path = Path(name)
    hidden = name.startswith("__MACOSX/") or path.name.startswith(".")
    return not hidden and not name.endswith("/") and path.suffix.lower() in _PARSERS


def _members_of(split: str, names: list[str]) -> list[str]:
    """Those of one split by their stem, ``wiki.train`` or ``test-00000-of-00001`` say; else all."""
    endings = ("train",) if split == "calibration" else ("test", "valid|validation")
    for ending in endings:
        pattern = re.compile(rf"(?:.*[^a-z])?(?:{ending})(?:-\d+-of-\d+)?", re.DOTALL)
        found = [name for name in names if pattern.fullmatch(Path(name).stem.lower())]
        if found:
            return found
    return names


def _parse(name: str, data: bytes) -> str:
    return "\n\n".join(_PARSERS[Path(name).suffix.lower()](name, data))


def _decode(name: str, data: bytes) -> list[str]:
    try:
        return [data.decode("utf-8-sig")]
    except UnicodeDecodeError as error:
        raise InputError(f"text {name!r} is not valid UTF-8 at byte {error.start}") from error


def _parse_jsonl(name: str, data: bytes) -> list[str]:
    documents = []
    # Not splitlines: a JSON string may hold U+2028 and its like.
    for number, line in enumerate(_decode(name, data)[0].split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"line {number} of {name!r} is not valid JSON: {error.msg}") from error
        fields = [key for key, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
        documents.append(row[_text_field(fields, f"line {number} of {name!r}")])
    return documents


def _parse_parquet(name: str, data: bytes) -> list[str]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        kinds = (pyarrow.string(), pyarrow.large_string())
        field = _text_field([f.name for f in file.schema_arrow if f.type in kinds], repr(name))
        column = file.read(columns=[field])[field].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"parquet file {name!r} is damaged: {error}") from error
    return [document for document in column if document is not None]


def _text_field(fields: list[str], where: str) -> str:
    if "text" in fields:
        return "text"
    if len(fields) != 1:
        found = ", ".join(fields) or "none"
        raise InputError(f"{where} has no field 'text' and not exactly one string field (found {found})")
    return fields[0]


_PARSERS = {".txt": _decode, ".raw": _decode, ".jsonl": _parse_jsonl, ".parquet": _parse_parquet}
