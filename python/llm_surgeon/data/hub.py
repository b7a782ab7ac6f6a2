"""Documents of data sets of the Hugging Face hub."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants

from llm_surgeon.data.rows import (
    TEXT_KINDS,
    Document,
    documents_of_rows,
)
from llm_surgeon.errors import InputError, one_line
from llm_surgeon.resources import hub_reachable

if TYPE_CHECKING:
    pass

HUB_NAMES = ("wikitext2", "c4")
C4_DOCUMENTS = 2000  # about a million tokens
HUB_CHARACTERS = 2**24  # of other hub data sets, the largest of which hold terabytes: about four million tokens


def read_known(name: str, split: str) -> list[Document]:
    calibration = split == "calibration"
    with _hub(name) as load_dataset:
        if name == "wikitext2":
            part = "train" if calibration else "test"
            return list(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)["text"])
        part = "train" if calibration else "validation"
        rows = load_dataset("allenai/c4", "en", split=part, streaming=True)
        return [row["text"] for row in itertools.islice(rows, C4_DOCUMENTS)]


def read_hub(
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
