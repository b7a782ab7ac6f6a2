"""An output is claimed by one run, what dead runs left is seen to, and a folder changes in one step."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_surgeon.checkpoint.output as output
from llm_surgeon import InputError
from llm_surgeon.checkpoint import claimed_output, save_checkpoint
from llm_surgeon.checkpoint.output import move_into_place
from tests.surgeon.checkpoint.test_output_checks import model_folder
from tests.surgeon.checkpoints import tokenizer_of_words
from tests.surgeon.tiny_models import build

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


def test_a_claim_is_for_one_run_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys, time; from llm_surgeon.checkpoint.output import claimed_output\n"
        f"with claimed_output({str(tmp_path / 'a' / 'out')!r}, False): print('claimed', flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "claimed\n"
            with (
                pytest.raises(InputError, match="is being written by another run"),
                claimed_output(tmp_path / "a" / "out", False),
            ):
                pass
            with claimed_output(tmp_path / "a" / "other", False):
                pass
            assert [path.name for path in (tmp_path / "a").iterdir()] == [".out.lock"]
        finally:
            process.kill()
    with (
        claimed_output(tmp_path / "a" / "out", False),
        pytest.raises(InputError, match="is being written by another run"),
        claimed_output(tmp_path / "a" / "out", False),
    ):
        pass
    assert list((tmp_path / "a").iterdir()) == []


def test_a_claim_that_comes_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no"), claimed_output(tmp_path / "a" / "b" / "out", False):
        assert (tmp_path / "a" / "b" / ".out.lock").is_file()
        raise InputError("no")
    assert list(tmp_path.iterdir()) == []


def test_what_dead_runs_left_is_named_and_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = model_folder(tmp_path / "out[1]", "new")
    (tmp_path / ".out[1].lock").touch()
    left = [model_folder(tmp_path / f".out[1].{purpose}-0011aabb") for purpose in ("partial", "previous")]
    others = model_folder(tmp_path / ".out.partial-0011aabb"), model_folder(tmp_path / ".out1.previous-0011aabb")
    with claimed_output(out, True):
        assert not any(path.exists() for path in left)
    assert all(f"deleted {path}, which an interrupted run left" in caplog.text for path in left)
    assert sorted(tmp_path.iterdir()) == sorted([*others, out]) and (out / "model.safetensors").read_text() == "new"


def test_a_file_that_has_the_name_of_the_lock_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("versions")
    with claimed_output(tmp_path / "out", False):
        pass
    assert (tmp_path / ".out.lock").read_text() == "versions"


def test_only_what_is_named_as_runs_name_it_is_deleted(tmp_path: Path) -> None:
    kept = [model_folder(tmp_path / name) for name in (".out.partial-old", ".out.previous-0011aabb.bak")]
    (tmp_path / ".out.partial-00000000").symlink_to(kept[0])
    (tmp_path / ".out.previous-00000000").write_text("notes")
    before = sorted(tmp_path.rglob("*"))
    with claimed_output(tmp_path / "out", False):
        pass
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("empty", [False, True])
def test_a_model_that_was_being_replaced_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, empty: bool
) -> None:
    if empty:
        (tmp_path / "out").mkdir()
    model_folder(tmp_path / ".out.previous-0011aabb", "old")
    model_folder(tmp_path / ".out.partial-0011aabb", "new")
    with pytest.raises(InputError, match="is not empty"), claimed_output(tmp_path / "out", False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"
    assert ".out.previous-0011aabb is " in caplog.text and "again" in caplog.text


def test_without_locks_what_may_be_a_living_run_s_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output.fcntl, "flock", flock)
    left = [model_folder(tmp_path / f".out.{purpose}-0011aabb") for purpose in ("partial", "previous")]
    with claimed_output(tmp_path / "out", False):
        pass
    assert sorted(tmp_path.iterdir()) == sorted(left)
    assert all(f"{path} lies beside {tmp_path / 'out'}: delete it unless" in caplog.text for path in left)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_another(exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, partial = model_folder(tmp_path / "out", "old"), model_folder(tmp_path / ".out.partial-00", "new")
    steps: list[tuple[str, str]] = []
    rename = os.rename

    def watched(one: Any, other: Any) -> None:
        steps.append((Path(one).name.split("-")[0], Path(other).name.split("-")[0]))
        rename(one, other)

    monkeypatch.setattr(os, "rename", watched)
    if exchanges:
        if not output._exchange(out, partial):
            pytest.skip("this filesystem cannot exchange names")
        assert output._exchange(out, partial)
    else:
        monkeypatch.setattr(output, "_exchange", lambda one, other: False)
    move_into_place(partial, out, out, overwrite=True)
    assert steps == (
        [] if exchanges else [("out", ".out.previous"), (".out.partial", "out"), (".out.previous", ".out.partial")]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "model.safetensors").read_text() == "new"


def test_the_kernel_says_whether_it_exchanges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        @staticmethod
        def renameat2(*_: object) -> int:
            output.ctypes.set_errno(codes.pop())
            return -1

    codes = [errno.EACCES, errno.EINVAL, errno.ENOSYS]
    monkeypatch.setattr(output.ctypes, "CDLL", Library)
    assert not output._exchange(tmp_path / "a", tmp_path / "b")
    assert not output._exchange(tmp_path / "a", tmp_path / "b")
    with pytest.raises(PermissionError):
        output._exchange(tmp_path / "a", tmp_path / "b")


def test_what_came_into_out_meanwhile_is_kept_and_so_is_the_result(tmp_path: Path) -> None:
    out = model_folder(tmp_path / "out", "old")
    with (
        claimed_output(out, True) as claim,
        pytest.raises(InputError, match=r"'thesis\.tex'.*written there is in ") as caught,
    ):
        (out / "thesis.tex").write_text("mine")
        save_checkpoint(build("llama"), tokenizer_of_words(), claim, dtype=torch.float32, extra_files={})
    (kept,) = (path for path in tmp_path.iterdir() if path != out)
    assert repr(str(kept)) in str(caught.value) and kept.name.startswith("out-")
    assert (out / "thesis.tex").read_text() == "mine" and (out / "model.safetensors").read_text() == "old"
    assert build("llama").from_pretrained(kept).config.model_type == "llama"
