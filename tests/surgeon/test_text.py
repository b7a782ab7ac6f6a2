from __future__ import annotations

import io
import json
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pytest
from datasets.exceptions import DatasetNotFoundError
from pyarrow import parquet

import llm_surgeon.text
from llm_surgeon.data import read_text
from llm_surgeon.errors import InputError


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parquet_bytes(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def zip_of(path: Path, **members: str | bytes) -> Path:
    """A zip of members, whose names have ``__`` for ``.`` and ``___`` for ``/``."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", "")
        archive.writestr("__MACOSX/._train.txt", "junk")
        for name, content in members.items():
            archive.writestr(name.replace("___", "/").replace("__", "."), content)
    return path


def test_txt_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    path.write_bytes("\ufeffZürich\r\n\n\nend\n".encode())  # with a byte order mark
    assert read_text(path, "calibration") == "Zürich\r\n\n\nend\n"
    assert read_text(str(path), "evaluation") == "Zürich\r\n\n\nend\n"


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl({"text": "one", "url": "x"}, {"text": "t\u2028wo"}) + "\n  \n", encoding="utf-8")
    assert read_text(path, "calibration") == "one\n\nt\u2028wo"
    path.write_text(jsonl({"id": 1, "content": "one"}, {"id": 2, "content": "two"}))
    assert read_text(path, "calibration") == "one\n\ntwo"


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(url=["u", "v", "w"], text=["one", None, "three"]))
    assert read_text(path, "evaluation") == "one\n\nthree"
    path.write_bytes(parquet_bytes(id=[1, 2], content=["one", "two"]))
    assert read_text(path, "evaluation") == "one\n\ntwo"


def test_zip_members_by_split(tmp_path: Path) -> None:
    path = zip_of(
        tmp_path / "a.zip",
        w___train__txt="train",
        w___wiki__valid__raw="valid",
        w___test__txt="test",
        w___latest__txt="latest",
        LICENSE__md="license",
    )
    assert read_text(path, "calibration") == "train"
    assert read_text(path, "evaluation") == "test"
    path = zip_of(tmp_path / "b.zip", b_train__jsonl=jsonl({"text": "x"}, {"text": "y"}), validation__txt="v")
    assert read_text(path, "calibration") == "x\n\ny"
    assert read_text(path, "evaluation") == "v"


def test_zip_of_numbered_parquet_files(tmp_path: Path) -> None:
    members = {f"train-0000{i}-of-00002__parquet": parquet_bytes(text=[f"{i}a", f"{i}b"]) for i in (1, 0)} | {
        "test-00000-of-00001__parquet": parquet_bytes(text=["t"])
    }
    path = zip_of(tmp_path / "a.zip", **members)
    assert read_text(path, "calibration") == "0a\n\n0b\n\n1a\n\n1b"
    assert read_text(path, "evaluation") == "t"


def test_zip_without_split_members_is_read_whole(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", b__txt="b", a__txt="a")
    assert read_text(path, "calibration") == read_text(path, "evaluation") == "a\n\nb"
    path = zip_of(tmp_path / "t.zip", wiki__test__raw="only")
    assert read_text(path, "calibration") == read_text(path, "evaluation") == "only"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "unknown kind: pass the path of a .txt, .jsonl, .parquet or .zip"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"ab\xff", "not valid UTF-8 at byte 2"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 of .* is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"a": "x", "b": "y"}', r"line 2 of .* no field 'text' .*\(found a, b\)"),
        ("a.jsonl", b'["a"]', r"line 1 of .* no field 'text' .*\(found none\)"),
        ("a.jsonl", b'{"text": 3}', r"line 1 of .* no field 'text'"),
        ("a.parquet", b"PAR1 no", "is damaged"),
        ("a.parquet", parquet_bytes(a=["x"], b=["y"]), r"no field 'text' .*\(found a, b\)"),
        ("a.zip", b"PK no", "is damaged"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(path, "calibration")


def test_zips_that_cannot_be_read(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "empty.zip", notes__md="x")
    with pytest.raises(InputError, match=r"holds no .txt, .jsonl or .parquet"):
        read_text(path, "calibration")
    path = zip_of(tmp_path / "bad.zip", a__txt="hello hello hello " * 50)
    data = bytearray(path.read_bytes())
    start = data.index(b"a.txt") + len("a.txt")
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"bad.zip' is damaged"):
        read_text(path, "calibration")
    path = zip_of(tmp_path / "secret.zip", a__txt="hello")
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1  # the central directory says encrypted
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"secret.zip' cannot be read"):
        read_text(path, "calibration")
    path = zip_of(tmp_path / "broken.zip", a__jsonl="{")
    with pytest.raises(InputError, match=r"line 1 of .*broken.zip/a.jsonl' is not valid JSON"):
        read_text(path, "calibration")


def test_sources_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no text 'wikitext': pass 'wikitext2', 'c4' or the path of a .txt"):
        read_text("wikitext", "calibration")
    with pytest.raises(InputError, match="is a folder"):
        read_text(tmp_path, "calibration")
    with pytest.raises(InputError, match="unknown split 'test': choose one of calibration, evaluation"):
        read_text("wikitext2", "test")
    path = tmp_path / "a.txt"
    path.write_text("x")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(InputError, match=r"a.txt' cannot be read: Permission denied"):
        read_text(path, "calibration")


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_hub_texts_without_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError(OSError("Name or service not known"))

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(InputError, match=rf"{name}.* pass a .txt, .jsonl, .parquet or .zip file instead .no network"):
        read_text(name, "calibration")


@pytest.mark.parametrize("error", [ConnectionError("cut\noff"), DatasetNotFoundError("gone")])
def test_hub_texts_that_fail_on_the_way(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(llm_surgeon.text, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"pass a .txt, .* instead .(cut off|gone)"):
        read_text("wikitext2", "calibration")


def test_hub_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, configuration: str, split: str, streaming: bool = False) -> Any:
        asked.append((name, configuration, split))
        rows = [{"text": f"{split} {i}"} for i in range(3000)]
        return iter(rows) if streaming else {"text": [row["text"] for row in rows[:2]]}

    monkeypatch.setattr(llm_surgeon.text, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_text("wikitext2", "calibration") == "train 0\n\ntrain 1"
    assert read_text("wikitext2", "evaluation") == "test 0\n\ntest 1"
    documents = read_text("c4", "evaluation").split("\n\n")
    assert documents == [f"validation {i}" for i in range(2000)]
    assert read_text("c4", "calibration").startswith("train 0\n\ntrain 1\n\n")
    wikitext, c4 = ("Salesforce/wikitext", "wikitext-2-raw-v1"), ("allenai/c4", "en")
    assert asked == [(*wikitext, "train"), (*wikitext, "test"), (*c4, "validation"), (*c4, "train")]
