"""States of a run: whole or not at all, the newest whole one is found, and a disk that fails stops no run."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

import pytest
import torch

from llm_surgeon.checkpoint import run_states
from llm_surgeon.checkpoint.run_states import FolderStates, clear_states
from llm_surgeon.checkpoint.states import State, find_states, part, read_state, write_state
from llm_surgeon.errors import InputError

TENSORS = {
    "bytes": torch.arange(3, dtype=torch.uint8),
    "weight:a": torch.randn(3, 5, dtype=torch.bfloat16),
    "scalar": torch.tensor(1 / 3, dtype=torch.float64),
    "flags": torch.tensor([[True, False], [False, True]]),
    "strided": torch.randn(4, 6).T,
    "none": torch.zeros(0, 3),
}


def state(index: int = 0) -> State:
    return State({"x": torch.full((4,), float(index))}, {"index": index})


def opened(folder: Path, resume: bool = False) -> FolderStates:
    states = FolderStates(folder, resume)
    states.claim({"option": 1}, lambda: {"weights": "abc"}, {"batch": 2})
    return states


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    note = {"floats": [0.1, 1e-30], "text": "ä", "none": None}
    path = write_state(tmp_path, "shot-1", State(TENSORS, note))
    found = read_state(path)
    assert found is not None and found.note == note and found.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor)
    assert found.part("weight").keys() == {"a"} and part("weight", found.part("weight")).keys() == {"weight:a"}
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and len(path.name.split(".")[1]) == 64


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_state_that_differs_from_its_checksum_is_none(tmp_path: Path, place: int) -> None:
    path = write_state(tmp_path, "shot-1", State(TENSORS, {}))
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert read_state(path) is None
    path.write_bytes(content[:-3])
    assert read_state(path) is None


def test_the_two_newest_states_of_shots_stay_and_blocks_of_the_next_one(tmp_path: Path) -> None:
    states = opened(tmp_path / "s")
    for index in (1, 2, 3):
        states.put_block(0, state(10 * index))
        states.put_shot(index, state(index))
        states.settle()
    for depth in (0, 1):
        states.put_block(depth, state(40 + depth))
    states.close()
    assert set(find_states(tmp_path / "s")) == {"shot-2", "shot-3", "shot-4-block-0", "shot-4-block-1"}
    assert json.loads((tmp_path / "s" / "run.json").read_text()) == {
        "run": {"option": 1}, "content": {"weights": "abc"}, "layout": {"batch": 2},
    }  # fmt: skip
    with pytest.raises(InputError, match="holds an interrupted run: pass --resume"):
        FolderStates(tmp_path / "s", resume=False)
    states = opened(tmp_path / "s", resume=True)
    last = states.last_shot()
    assert last is not None and last.note == {"index": 3}
    found = [states.block(depth) for depth in (0, 1, 2)]
    assert [None if each is None else each.note["index"] for each in found] == [40, 41, None]
    states.remove()
    assert not (tmp_path / "s").exists()


def test_blocks_after_one_that_is_damaged_are_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = opened(tmp_path / "s")
    for depth in range(3):
        states.put_block(depth, state(depth))
    states.close()
    (damaged,) = find_states(tmp_path / "s")["shot-1-block-1"]
    damaged.write_bytes(b"")
    states = opened(tmp_path / "s", resume=True)
    assert states.last_shot() is None
    assert [states.block(depth) is None for depth in range(3)] == [False, True, True]
    assert f"the state {str(damaged)!r} is damaged" in caplog.text and not damaged.exists()
    states.close()
    assert set(find_states(tmp_path / "s")) == {"shot-1-block-0"}  # nor later, after another one in its place


def test_blocks_of_the_shot_after_one_that_is_damaged_are_not_taken(tmp_path: Path) -> None:
    states = opened(tmp_path / "s")
    for index in (1, 2):
        states.put_shot(index, state(index))
        states.settle()
    states.put_block(0, state(0))
    states.close()
    (damaged,) = find_states(tmp_path / "s")["shot-2"]
    damaged.write_bytes(b"")
    states = opened(tmp_path / "s", resume=True)
    last = states.last_shot()
    assert last is not None and last.note == {"index": 1} and states.block(0) is None
    states.close()
    assert set(find_states(tmp_path / "s")) == {"shot-1"}


def test_what_is_put_may_change_once_it_is_settled(tmp_path: Path) -> None:
    states, tensor, note = opened(tmp_path / "s"), torch.zeros(1 << 20), {"list": [1]}
    states.put_shot(1, State({"x": tensor}, note))
    note["list"].append(2)  # plain values at once
    states.settle()
    tensor += 1.0
    states.close()
    found = FolderStates(tmp_path / "s", resume=True).last_shot()
    assert found is not None and float(found.tensors["x"].abs().max()) == 0.0 and found.note == {"list": [1]}


def test_a_run_goes_on_where_the_disk_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    states = opened(tmp_path / "s")
    states.put_shot(1, state(1))
    states.settle()
    time.sleep(0.1)
    monkeypatch.setattr(run_states, "write_state", full)
    with caplog.at_level(logging.WARNING):
        for index in (2, 3):
            states.put_shot(index, state(index))
            states.settle()
        states.close()
    assert caplog.text.count("the run goes on without being kept") == 1 and "No space left" in caplog.text
    assert set(find_states(tmp_path / "s")) == {"shot-1"}


@pytest.mark.parametrize("fails", ["write_note", "write_text"])
def test_a_run_goes_on_where_its_notes_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_states, fails, full)
    states = opened(tmp_path / "s")
    states.settle()
    states.note_layout({"batch": 1})
    assert states.claim({"option": 1}, lambda: {"weights": "abc"}, {"batch": 2}) == {"batch": 1}
    states.put_shot(1, state(1))
    states.put_report("{}")
    states.close()
    assert caplog.text.count("the run goes on without being kept") == 1 and "No space left" in caplog.text
    assert set(find_states(tmp_path / "s")) == ({"shot-1"} if fails == "write_text" else set())


def test_a_layout_that_could_not_be_noted_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    states = opened(tmp_path / "s")
    states.settle()
    monkeypatch.setattr(run_states, "write_note", full)
    states.note_layout({"batch": 1})
    assert states.claim({"option": 1}, lambda: {"weights": "abc"}, {"batch": 2}) == {"batch": 1}
    states.close()


def test_nothing_is_left_of_a_run_without_a_state_and_what_is_not_wanted_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path / "s").close()
    assert not (tmp_path / "s").exists()
    began, go, written = threading.Event(), threading.Event(), []

    def slow(folder: Path, name: str, *rest: object) -> None:
        began.set()
        go.wait()
        written.append(name)
        write_state(folder, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(run_states, "write_state", slow)
    states = opened(tmp_path / "s")
    for depth in range(3):
        states.put_block(depth, state())
    began.wait()
    threading.Timer(0.05, go.set).start()
    states.put_shot(1, state(1))
    states.close()
    assert set(find_states(tmp_path / "s")) == {"shot-1"} and written[-1] == "shot-1"


def test_a_kill_while_states_are_cleared_leaves_what_says_that_all_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = opened(tmp_path / "s")
    states.put_shot(1, state(1))
    states.settle()
    states.put_report("{}")
    states.close()
    unlink, left = Path.unlink, []

    def watched(path: Path, missing_ok: bool = False) -> None:
        left.append({each.name.split(".")[0] for each in path.parent.iterdir()})
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    clear_states(tmp_path / "s")
    assert left == [{"shot-1", "run", "report"}, {"run", "report"}, {"report"}] and not (tmp_path / "s").exists()


def test_names_that_begin_with_a_dot_are_let_be(tmp_path: Path) -> None:
    (tmp_path / ".nfs0001").touch()
    (tmp_path / ".git").mkdir()
    states = opened(tmp_path)
    states.put_shot(1, state(1))
    states.close()
    assert set(find_states(tmp_path)) == {"shot-1"}
    states = opened(tmp_path, resume=True)
    states.remove()
    assert {path.name for path in tmp_path.iterdir()} == {".nfs0001", ".git"}


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match=r"holds 'mine.txt', which is no part of an interrupted run"):
        FolderStates(tmp_path, resume=True)
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize("kind", ["file", "link to a file", "link to nowhere"])
def test_what_is_no_folder_is_refused_in_a_sentence(tmp_path: Path, kind: str) -> None:
    folder, other = tmp_path / "states", tmp_path / "other"
    if kind == "link to a file":
        other.touch()
    if kind == "file":
        folder.touch()
    else:
        folder.symlink_to(other)
    with pytest.raises(InputError, match=r"states' is to hold states of the run and is no writable folder: delete or"):
        opened(folder)
    assert folder.is_symlink() == (kind != "file")


def test_a_link_to_a_folder_holds_states_and_stays(tmp_path: Path) -> None:
    folder, other = tmp_path / "states", tmp_path / "other"
    other.mkdir()
    folder.symlink_to(other)
    states = opened(folder)
    states.put_shot(1, state())
    states.close()
    assert list(find_states(other)) == ["shot-1"]
    opened(folder, resume=True).remove()
    assert folder.is_symlink() and list(other.iterdir()) == []
