from __future__ import annotations

import gzip
import io
import json
import os
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

import llm_surgeon.data.files
from llm_surgeon.data.documents import read_documents, read_text
from llm_surgeon.errors import InputError
from tests.surgeon.checkpoints import tokenizer_of_words


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
        ("a.md", b"x", "unknown kind: pass the path of a .txt, .jsonl, .json, .csv, .parquet, .gz or .zip file"),
        ("a.gz", b"x", "unknown kind"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"ab\xff", "not valid UTF-8 at byte 2"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 of .* is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"a": "x", "b": "y"}', "line 2 of .* has no field 'text'"),
        ("a.jsonl", b'["a"]', "line 1 of .* is no object with fields"),
        ("a.jsonl", b'{"text": 3}', "field 'text' of line 1 of .* is no text but of type int"),
        ("a.parquet", b"PAR1 no", "is damaged"),
        (
            "a.parquet",
            parquet_bytes(a=["x"], b=["y"]),
            r"no field 'text', .*\(found a, b\): name the field",
        ),
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
    with pytest.raises(InputError, match="holds no file to read"):
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
    with pytest.raises(
        InputError, match=r"no text 'wikitext': pass 'wikitext2', 'c4', a data set of the hub .owner/name. or a .txt"
    ):
        read_text("wikitext", "calibration")
    with pytest.raises(InputError, match="is a folder"):
        read_text(tmp_path, "calibration")
    with pytest.raises(InputError, match="unknown split 'test': choose one of calibration, evaluation"):
        read_text("wikitext2", "test")
    path = tmp_path / "a.txt"
    path.write_text("x")

    opened = Path.open

    def denied(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(InputError, match=r"a.txt' cannot be read: Permission denied"):
        read_text(path, "calibration")


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_hub_texts_without_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError(OSError("Name or service not known"))

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(
        InputError, match=rf"{name}.* pass a .txt, .jsonl, .json, .csv, .parquet, .gz or .zip file instead .no network"
    ):
        read_text(name, "calibration")


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHARED = [{"from": "system", "value": "sys"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}</s>"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """In the format of the path's suffix."""
    if path.name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        content = json.dumps(rows) if ".json" in path.suffixes else jsonl(*rows)
        path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def templated() -> Any:
    tokenizer = tokenizer_of_words()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_system_field_beside_a_conversation_is_its_first_message(tmp_path: Path, name: str) -> None:
    rows = [{"system": "sys", "conversations": SHARED[1:]}, {"system": "other", "conversations": SHARED}]
    rows.append({"system": None, "conversations": SHARED[1:]})
    path = write_rows(tmp_path / name, rows)
    spoken = "User: hi\n\nAssistant: ho"
    assert read_text(path, "calibration") == f"System: sys\n\n{spoken}\n\nSystem: sys\n\n{spoken}\n\n{spoken}"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "a.json.gz"])
def test_conversations_are_read_and_never_the_ids_beside_them(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, [{"prompt_id": "abc", "messages": TURNS}, {"prompt_id": "d", "messages": None}])
    documents = read_documents(path, "calibration")
    assert documents.fields == ("messages",) and documents.chat and len(documents.items) == 1
    assert documents.text(templated()) == "<s>[user]hi[assistant]ho</s>"
    path = write_rows(tmp_path / name, [{"id": "abc", "conversations": SHARED}] * 2)
    documents = read_documents(path, "evaluation")
    assert documents.fields == ("conversations",)
    assert documents.text(templated()) == 2 * "<s>[system]sys[user]hi[assistant]ho</s>"
    assert read_text(path, "calibration") == "\n\n".join(2 * ["System: sys\n\nUser: hi\n\nAssistant: ho"])


def test_parts_of_messages_and_tools(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, "b"]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    rows = [{"messages": [{"role": "user", "content": parts}, call, {"role": "tool", "content": "3", "name": "f"}]}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert read_text(path, "calibration") == "User: ab\n\nTool: 3"
    tokenizer = templated()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content or m.tool_calls[0].name }};{% endfor %}"
    assert read_text(path, "calibration", tokenizer=tokenizer) == "ab;f;3;"
    rows[0]["messages"] = [{"from": "human", "value": "q"}, {"from": "observation", "value": "o"}]
    assert read_text(write_rows(path, rows), "calibration") == "User: q\n\nTool: o"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hi", "line 2 of .*a.jsonl' holds text in place of a list of messages"),
        (["hi"], "message 1 of line 2 of .* is text, not an object"),
        ([{"content": "x"}], "message 1 of line 2 of .* has neither role and content nor from and value"),
        (
            [*TURNS, {"role": "pirate", "content": "x"}],
            "message 3 of line 2 of .* unknown role 'pirate': known are sys",
        ),
        ([{"role": ["user"], "content": "x"}], "unknown role"),
        ([{"role": "user"}], "message 1 of line 2 of .* has no content"),
        ([{"from": "human", "value": 3}], "the value of message 1 of line 2 of .* is a number, not text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "holds a part of type 'image_url': only text"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
    ],
)
def test_rows_that_are_no_conversation(tmp_path: Path, value: Any, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n" + json.dumps({"messages": value}))
    with pytest.raises(InputError, match=message):
        read_text(path, "calibration")


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = templated()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}x"
    path = write_rows(tmp_path / "a.jsonl", [{"messages": TURNS}, {"conversations": SHARED, "messages": SHARED}])
    with pytest.raises(InputError, match=r"chat template refuses line 2 of .*a.jsonl': no system here"):
        read_text(path, "calibration", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("rows", "field", "text"),
    [
        ([{"text": "a", "messages": TURNS}, {"text": "b", "messages": TURNS}], "text", "a\n\nb"),
        (
            [{"text": "a", "messages": TURNS}, {"messages": TURNS[:1]}],
            "messages",
            "User: hi\n\nAssistant: ho\n\nUser: hi",
        ),
        ([{"text": None, "id": "doc-0"}, {"text": "b", "id": "doc-1"}], "text", "b"),
        ([{"n": 1, "content": None, "ok": True}, {"n": 2, "content": "c", "ok": False}], "content", "c"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_one_field_for_a_whole_file(tmp_path: Path, name: str, rows: list[Any], field: str, text: str) -> None:
    if name == "a.parquet" and field == "messages":
        pytest.skip("every row of a parquet file has every field")
    path = write_rows(tmp_path / name, rows)
    assert read_documents(path, "calibration").fields == (field,)
    assert read_text(path, "calibration") == text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"url": "u"}, {"prompt": "p"}], r"not exactly one field with text \(found prompt, url\)"),
        ([{"id": "x", "dialog": [["a"]]}], r"not exactly one field with text \(found dialog, id\)"),
        ([{"id": "x", "n": 1}], r"not exactly one field with text \(found id, n\)"),
        ([{"docid": "x", "n": 1}], r"not exactly one field with text \(found docid, n\)"),
        ([{"file_name": "x", "n": 1}], r"not exactly one field with text \(found file_name, n\)"),
        ([{"Title": "x", "sha": None}], r"not exactly one field with text \(found Title, sha\)"),
        ([{"text": "a"}, {"content": "b"}], "(line|row) 2 of .* has no field 'text'"),
        ([{"text": "a"}, {"text": 4}], "field 'text' of (line|row) 2 of .* is no text but of type int"),
        ([{"text": None}], "is empty"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_rows_of_another_shape(tmp_path: Path, name: str, rows: list[Any], message: str) -> None:
    path = write_rows(tmp_path / name, rows)
    with pytest.raises(InputError, match=message):
        read_text(path, "calibration")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_the_field_that_is_asked_for(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, [{"text": "a", "chosen": TURNS, "body": "b"}])
    assert read_text(path, "calibration", text_field="body") == "b"
    assert read_text(path, "calibration", text_field="chosen") == "User: hi\n\nAssistant: ho"
    with pytest.raises(InputError, match=r"has no field 'other' \(found body, chosen, text\)"):
        read_text(path, "calibration", text_field="other")
    plain = tmp_path / "a.txt"
    plain.write_text("x")
    with pytest.raises(InputError, match=r"a.txt' has no field 'body': it is plain text"):
        read_text(plain, "calibration", text_field="body")


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "x" * 200_000  # beyond the csv module's own limit of a field
    path.write_text(f'\ufeffid,text\r\n1,"one, ""two""\nthree"\r\n2,\r\n3,42\r\n\r\n4,{long}\r\n', newline="")
    assert read_text(path, "calibration") == f'one, "two"\nthree\n\n42\n\n{long}'
    path.write_text("n,body\n1,a\n2.5,b\n")
    assert read_documents(path, "calibration").fields == ("body",)
    assert read_text(path, "calibration", text_field="n") == "1\n\n2.5"
    for content, message in (
        ("id,text\n1,a\n2\n", "row 2 of .* has 1 cells and the header 2"),
        ("text,text\na,b\n", "the header of .* holds a field twice"),
        ('text\n"a', "is not valid CSV at line 2: unexpected end of data"),
        ("a,b\nx,y\n", r"not exactly one field with text \(found a, b\)"),
        ("text\n", "is empty"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_text(path, "calibration")
    path.write_bytes(b"text\na\xff\n")
    with pytest.raises(InputError, match="is not valid UTF-8"):
        read_text(path, "calibration")


def test_gz_of_every_kind_also_inside_a_zip(tmp_path: Path) -> None:
    for name, content in (("a.txt", "one"), ("a.csv", "text\none\n"), ("a.jsonl", jsonl({"text": "one"}))):
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(content.encode()))
        assert read_text(path, "calibration") == "one"
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress(parquet_bytes(text=["one", "two"])))
    assert read_text(path, "calibration") == "one\n\ntwo"
    members = {"x___train__jsonl__gz": gzip.compress(jsonl({"text": "t"}).encode()), "test__csv": "text\nv\n"}
    archive = zip_of(tmp_path / "a.zip", **members)
    assert (read_text(archive, "calibration"), read_text(archive, "evaluation")) == ("t", "v")
    path.write_bytes(gzip.compress(b"text")[:-6])
    with pytest.raises(InputError, match=r"gzip file .*a.parquet.gz' is damaged"):
        read_text(path, "calibration")


def test_members_of_a_zip_are_read_each_by_its_own_field(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", a__jsonl=jsonl({"messages": TURNS}), b__jsonl=jsonl({"text": "t"}), c__txt="x")
    documents = read_documents(path, "calibration")
    assert documents.fields == ("messages", "text")
    assert documents.text() == "User: hi\n\nAssistant: ho\n\nt\n\nx"
    evil = zip_of(tmp_path / "evil.zip", **{"_______/escape__txt": "inside"})
    assert read_text(evil, "calibration") == "inside" and not (tmp_path.parent / "escape.txt").exists()


def test_bombs_are_refused_by_name_before_they_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_surgeon.data.files, "ALWAYS_ALLOWED", 2**16)
    zeros = b"0" * 2**22
    bombs = [
        zip_of(tmp_path / "a.zip", a__txt=zeros),
        tmp_path / "a.txt.gz",
        tmp_path / "a.jsonl.gz",
        tmp_path / "a.parquet",
    ]
    bombs[1].write_bytes(gzip.compress(zeros))
    bombs[2].write_bytes(gzip.compress(jsonl({"text": zeros.decode()}).encode()))
    bombs[3].write_bytes(parquet_bytes(text=["0" * 2**14] * 2**8))  # one page of a dictionary
    for path in bombs:
        assert path.stat().st_size < 2**15
        with pytest.raises(InputError, match=rf"{path.name}' unpacks to more than [\d,]+ bytes, too many for its size"):
            read_text(path, "calibration")
    monkeypatch.setattr(llm_surgeon.data.files, "MAX_MEMBERS", 1)
    with pytest.raises(InputError, match="holds 2 files to read, more than 1"):
        read_text(zip_of(tmp_path / "many.zip", a__txt="a", b__txt="b"), "calibration")
    monkeypatch.setattr(llm_surgeon.data.files, "available_memory", lambda device: 40)
    path = tmp_path / "a.txt"
    path.write_text("eleven char")
    with pytest.raises(InputError, match=r"a.txt' of 11 bytes is too large for the memory here"):
        read_text(path, "calibration")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ' + "[" * 200_000, "line 2 of .*a.jsonl' is nested too deeply"),
        ("a.jsonl", '{"text": "a", "n": ' + "7" * 5000 + "}", "line 1 of .* holds a number that cannot be read"),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1 of .* holds half of a surrogate pair at its character 0"),
        ("a.json", '[{"text": "a"}, {"text": ' + "[" * 200_000, "row 2 of .*a.json' is nested too deeply"),
        ("a.json", '[{"text": "a"}, {"n": ' + "7" * 5000 + "}]", "row 2 of .* holds a number that cannot be read"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "is not valid JSON after its row 1"),
        ("a.json", '[{"text": "a"}] x', "something follows its array"),
        ("a.json", '[{"text": "a"},]', "row 2 of .* is not valid JSON"),
        ("a.json", '[{"text": "a"}', "is not valid JSON after its row 1"),
        ("a.json", "[3]", "row 1 of .* is no object"),
        ("a.json", "[]", "is empty"),
        ("a.json", '{"text": "a"', "line 1 of .* is not valid JSON"),
    ],
)
def test_json_that_breaks_readers(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_text(path, "calibration")
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


def test_characters_that_are_text_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\u0000b\\u2028\u2028\\ud83d\\ude00"}\r\n\n', encoding="utf-8")
    assert read_text(path, "calibration") == "a\0b\u2028\u2028😀"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}')
    with pytest.raises(InputError, match=r"line 2 of .* is not valid UTF-8 at its byte 10"):
        read_text(path, "calibration")


def test_what_is_no_regular_file_is_not_read_for_ever(tmp_path: Path) -> None:
    pipe = tmp_path / "a.txt"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(InputError, match="is no regular file but a pipe or a device"):
            read_text(path, "calibration")
    loop = tmp_path / "loop.txt"
    loop.symlink_to(loop)
    for name in (str(loop), "a\0b", "~nobody-of-that-name/x.txt", "x" * 5000):
        with pytest.raises(InputError, match=r"cannot be read|^no text"):
            read_text(name, "calibration")
