"""Text from data sets of the Hugging Face hub, read through the package `datasets`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import llm_surgeon.data.hub
from llm_surgeon.data.documents import read_text
from llm_surgeon.errors import InputError

datasets = pytest.importorskip("datasets")

SHARED = [{"from": "human", "value": "hi"}]


@pytest.mark.parametrize("error", [ConnectionError("cut\noff"), datasets.exceptions.DatasetNotFoundError("gone")])
def test_hub_texts_that_fail_on_the_way(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(llm_surgeon.data.hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"pass a .txt, .* instead .(cut off|gone)"):
        read_text("wikitext2", "calibration")


def test_hub_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, configuration: str, split: str, streaming: bool = False) -> Any:
        asked.append((name, configuration, split))
        rows = [{"text": f"{split} {i}"} for i in range(3000)]
        return iter(rows) if streaming else {"text": [row["text"] for row in rows[:2]]}

    monkeypatch.setattr(llm_surgeon.data.hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_text("wikitext2", "calibration") == "train 0\n\ntrain 1"
    assert read_text("wikitext2", "evaluation") == "test 0\n\ntest 1"
    documents = read_text("c4", "evaluation").split("\n\n")
    assert documents == [f"validation {i}" for i in range(2000)]
    assert read_text("c4", "calibration").startswith("train 0\n\ntrain 1\n\n")
    wikitext, c4 = ("Salesforce/wikitext", "wikitext-2-raw-v1"), ("allenai/c4", "en")
    assert asked == [(*wikitext, "train"), (*wikitext, "test"), (*c4, "validation"), (*c4, "train")]


def hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[dict[str, Any]]]) -> list[Any]:
    """A hub whose every data set has ``splits``; what it is asked for."""
    asked: list[Any] = []

    def load(name: str, configuration: str | None = None, **options: Any) -> Any:
        asked.append((name, configuration, options))
        return splits

    monkeypatch.setattr(llm_surgeon.data.hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_data_sets_of_the_hub_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_surgeon.data.hub, "hub_reachable", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        InputError, match=r"no file 'some/set', and cannot read .* from the Hugging Face hub.*no network"
    ):
        read_text("some/set", "calibration")

    def fail(*_: object, **__: object) -> None:
        raise ValueError("BuilderConfig 'x' not found. Available: ['y']")

    hub(monkeypatch, {})
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"'some/set:x' from the Hugging Face hub.*Available: \['y'\]"):
        read_text("some/set:x", "calibration")
    with pytest.raises(InputError, match=r"^no text 'some/missing.jsonl': pass"):
        read_text("some/missing.jsonl", "calibration")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="takes the package datasets"):
        read_text("some/set", "calibration")


def test_any_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {name: [{"id": "x", "conversations": SHARED}, {"id": "y", "conversations": None}] for name in "ab"}
    splits |= {"train": [{"text": "t"}, {"text": "u"}], "validation": [{"text": "v"}]}
    asked = hub(monkeypatch, splits)
    assert read_text("some/set", "calibration") == "t\n\nu"
    assert read_text("some/set:part", "evaluation") == "v"
    assert read_text("some/set:part:a", "calibration") == read_text("some/set::b", "calibration") == "User: hi"
    streamed = {"streaming": True}
    expected = [None, "part", "part", None]
    assert asked == [("some/set", configuration, streamed) for configuration in expected]
    with pytest.raises(InputError, match="'some/set::c' has no split 'c': its splits are a, b, train, validation"):
        read_text("some/set::c", "calibration")
    monkeypatch.setattr(llm_surgeon.data.hub, "HUB_CHARACTERS", 0)  # reached by the first row
    assert read_text("some/set", "calibration") == "t"
    del splits["validation"]
    with pytest.raises(InputError, match="has no split test or validation"):
        read_text("some/set", "evaluation")
    with pytest.raises(InputError, match=r"'some/set' has no field 'x' \(found text\)"):
        read_text("some/set", "calibration", text_field="x")


def test_a_data_set_in_the_local_cache_is_read_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, {"train": [{"text": "t"}]})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert read_text("some/set", "calibration") == "t"
    assert asked == [("some/set", None, {"streaming": False})]
