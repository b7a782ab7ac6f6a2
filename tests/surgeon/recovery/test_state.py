"""Interrupted recoveries: what goes on where it was, what is refused, and which damaged states are passed over."""

import json
import logging
import math
import os
import pickle
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llm_surgeon.checkpoint import claimed_output, save_checkpoint
from llm_surgeon.checkpoint.begun import contents
from llm_surgeon.errors import InputError
from llm_surgeon.jobs.recover import recover_checkpoint
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.progress import Progress
from llm_surgeon.recovery import state as recovery_state
from llm_surgeon.recovery.recover import RecoveryReport
from llm_surgeon.recovery.state import latest_checkpoint
from tests.surgeon.checkpoints import save_folder, tree
from tests.surgeon.half_zero import OPTIONS, half_zero
from tests.surgeon.tiny_models import build

COMMON = {"device": "cpu", "seqlen": 16, "learning_rate": 1e-2, **OPTIONS}


def interrupt(source, out, data, step, **options):
    """A recovery into ``out`` that is interrupted after ``step``; the folder of its state."""

    class Interrupting(Progress):
        def step(self, done, total, what=""):
            if done == step:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover_checkpoint(source, out, data=data, progress=Interrupting(), **COMMON | options)
    assert not out.exists()
    return out.with_name(f".{out.name}.training")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_recovery_goes_on_where_it_was(folders, method, caplog):
    source, out, data = folders
    options = COMMON | {"method": method, "learning_rate": 1e-2 if method == "lora" else 3e-3}
    whole = recover_checkpoint(source, out.with_name("whole"), data=data, **options)
    state = interrupt(source, out, data, 10, **options)
    with pytest.raises(InputError, match="pass --resume or delete it"):
        recover_checkpoint(source, out, data=data, **options)
    with pytest.raises(
        InputError, match=r"has rank 4, not 2: give that, or delete the folder .*\.out\.training' to start"
    ):
        recover_checkpoint(source, out, data=data, **options | {"rank": 2}, resume=True)
    assert {path.name for path in state.glob("checkpoint-*")} == {"checkpoint-4.pt", "checkpoint-8.pt"}
    # A kill while the next one was written, and a disk that did not keep the end of the newest whole one.
    shutil.copy(state / "checkpoint-4.pt", state / "checkpoint-12.pt.partial")
    newest = state / "checkpoint-8.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        resumed = recover_checkpoint(source, out, data=data, **options, resume=True)
    assert caplog.text.count("is damaged") == 1 and "checkpoint-8.pt' is damaged" in caplog.text
    assert math.isclose(resumed.loss_after, whole.loss_after, rel_tol=1e-5)
    assert not list(out.parent.glob(".out*"))


@pytest.mark.parametrize("writes", [1, 2, 9])
def test_a_signal_while_the_state_is_written_is_answered_when_it_is_whole(tmp_path, monkeypatch, writes):
    class Signalling:
        def __init__(self, file):
            self.file, self.left = file, writes

        def write(self, data):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    def answer(number, frame):
        raise SystemExit(128 + number)

    save, state = torch.save, {"weights": {"w": torch.arange(1000.0)}, "elapsed": 2.5}
    monkeypatch.setattr(torch, "save", lambda value, file: save(value, Signalling(file)))
    former = signal.signal(signal.SIGTERM, answer)
    try:
        with pytest.raises(SystemExit) as end:
            recovery_state.save_checkpoint(tmp_path, 3, state)
        assert signal.getsignal(signal.SIGTERM) is answer
    finally:
        signal.signal(signal.SIGTERM, former)
    assert end.value.code == 143
    read = torch.load(latest_checkpoint(tmp_path), weights_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3.pt"]
    assert torch.equal(read["weights"]["w"], torch.arange(1000.0)) and read["elapsed"] == 2.5


def test_what_was_begun_with_other_content_is_refused_by_name(folders):
    source, out, data = folders
    teacher = save_folder(source.with_name("teacher"), build("llama"))
    state = interrupt(source, out, data, 5, teacher=teacher)
    kept = tree(out.parent)
    options = COMMON | {"teacher": teacher, "data": data, "resume": True}

    def refused(words):
        with pytest.raises(InputError, match=rf"{words}.*delete the folder '.*\.out\.training' to start over"):
            recover_checkpoint(source, out, **options)

    save_folder(source, build("llama", seed=5))
    refused("the model changed since the interrupted recovery began")
    save_folder(source, half_zero("llama"))
    save_folder(teacher, build("llama", seed=5))
    refused("the teacher changed")
    save_folder(teacher, build("llama"))
    with open(data, "a") as file:
        file.write(" w5")
    refused("the data changed")
    options["teacher"] = None
    refused("has teacher '.*teacher', not None")
    changed = {name for name, content in tree(out.parent).items() if kept[name] != content}
    assert changed == {"text.txt"}  # nothing of the state
    assert state.is_dir() and not out.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b'{"run": 1, "content": {}}', b"\xff", b"[" * 100_000])
def test_a_damaged_note_of_what_was_begun_is_one_sentence(folders, content):
    source, out, data = folders
    state = out.with_name(".out.training")
    state.mkdir()
    (state / "checkpoint-4.pt").touch()
    (state / "run.json").write_bytes(content)
    with pytest.raises(
        InputError, match=r"run.json', which says what was begun, is damaged: delete the folder"
    ) as error:
        recover_checkpoint(source, out, data=data, **COMMON, resume=True)
    assert len(str(error.value).splitlines()) == 1
    assert (state / "checkpoint-4.pt").is_file() and not out.exists()


class Evil:
    def __reduce__(self):
        return (print, ("evil",))


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "flipped": lambda path: path.write_bytes((b := path.read_bytes())[:200] + bytes([b[200] ^ 255]) + b[201:]),
    "pickled code": lambda path: torch.save(Evil(), path),
    "plain pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The state of an interrupted recovery, with two checkpoints of which the newer one is the best."""
    folder = tmp_path_factory.mktemp("trained")
    source = save_folder(folder / "pruned", half_zero("llama"))
    (folder / "text.txt").write_text(" ".join(f"w{3**i % 61 + 1}" for i in range(4000)))
    return interrupt(source, folder / "out", str(folder / "text.txt"), 10)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_passed_over_and_named(trained, tmp_path, damage, caplog, capsys):
    state = shutil.copytree(trained, tmp_path / "state")
    assert latest_checkpoint(state) == state / "checkpoint-8.pt"
    DAMAGES[damage](state / "checkpoint-8.pt")
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(state) == state / "checkpoint-4.pt"
    assert caplog.text.count("checkpoint-8.pt' is damaged (") == (damage != "missing")
    assert not (state / "checkpoint-8.pt").exists()
    assert "evil" not in capsys.readouterr().out


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_flipped_bit_in_trained_weights_is_noticed(trained, tmp_path, bit):
    """And not gone on from: it would be merged into the model."""
    state = shutil.copytree(trained, tmp_path / "state")
    path = state / "checkpoint-8.pt"
    weights = next(iter(torch.load(path, weights_only=True)["weights"].values())).flatten()
    content = bytearray(path.read_bytes())
    content[content.index(weights.numpy().tobytes()) + 5] ^= 1 << bit
    path.write_bytes(content)
    assert latest_checkpoint(state) == state / "checkpoint-4.pt"


def test_without_a_whole_state_training_begins_anew(trained, tmp_path):
    state = shutil.copytree(trained, tmp_path / "state")
    for path in state.glob("checkpoint-*"):
        path.write_bytes(b"")
    assert latest_checkpoint(state) is None and not list(state.glob("checkpoint-*"))


def test_a_kill_after_the_model_was_written_is_seen_to_be_complete(folders, monkeypatch, caplog):
    source, out, data = folders
    options = COMMON | {"data": data}

    def killed(*arguments, **rest):
        save_checkpoint(*arguments, **rest)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("llm_surgeon.jobs.derived.save_checkpoint", killed)
        with pytest.raises(SystemExit):
            recover_checkpoint(source, out, **options)
    before = tree(out)
    with pytest.raises(InputError, match="is not empty"):
        recover_checkpoint(source, out, **options)
    with caplog.at_level(logging.WARNING):
        report = recover_checkpoint(source, out, **options, resume=True)
    assert "was complete already: its training state is removed" in caplog.text
    assert report.to_json() == (out / "surgeon_recovery.json").read_text()
    assert report == RecoveryReport.from_json(report.to_json()) and list(report.data) == ["training"]
    assert tree(out) == before and not list(out.parent.glob(".out*"))


def test_a_kill_before_the_model_was_written_whole_trains_no_more(folders, monkeypatch):
    source, out, data = folders
    options = COMMON | {"data": data}
    with monkeypatch.context() as patch:
        patch.setattr("llm_surgeon.jobs.derived.save_checkpoint", lambda *_, **__: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            recover_checkpoint(source, out, **options)
    state = out.with_name(".out.training")
    first = json.loads((state / "report.json").read_text())
    report = recover_checkpoint(source, out, **options, resume=True)
    assert math.isclose(report.loss_after, first["loss_after"], rel_tol=1e-6)
    assert (out / "model.safetensors").is_file() and not state.exists()


def test_records_of_the_model_are_read_before_the_training(folders, monkeypatch):
    source, out, data = folders
    (source / "README.md").write_bytes(b"# A m\xf6del\n\nPruned.\n")
    (source / "surgeon_report.json").write_bytes(b"\xff{")
    with monkeypatch.context() as patch:
        patch.setattr("llm_surgeon.jobs.recover.recover", lambda *_, **__: pytest.fail("the training began"))
        with pytest.raises(InputError, match=r"surgeon_report\.json"):
            recover_checkpoint(source, out, data=data, **COMMON)
    assert not out.exists() and not list(out.parent.glob(".out*"))
    (source / "surgeon_report.json").unlink()
    recover_checkpoint(source, out, data=data, **COMMON)
    assert "# A m\ufffddel\n\n## Recovered\n" in (out / "README.md").read_text()


def test_of_two_recoveries_into_one_folder_the_second_is_refused(folders):
    source, out, data = folders
    state = interrupt(source, out, data, 5)
    before = tree(state)
    with claimed_output(out, False), ThreadPoolExecutor(1) as other:
        second = other.submit(recover_checkpoint, source, out, data=data, **COMMON, resume=True)
        with pytest.raises(InputError, match="is being written by another run"):
            second.result()
    assert tree(state) == before


def test_a_disk_that_fills_up_is_one_sentence_and_the_state_before_stays(folders, monkeypatch):
    source, out, data = folders
    save = torch.save

    def full(content, file, *rest, **options):
        if "checkpoint-8" in file.name:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nmore")
        save(content, file, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(InputError, match=r"state cannot be written to '.*\.out\.training': Pytorch.* failed$"):
            recover_checkpoint(source, out, data=data, **COMMON)
    state = out.with_name(".out.training")
    assert latest_checkpoint(state) == state / "checkpoint-4.pt"
    assert not list(state.glob("checkpoint-8*")) and not out.exists()


def test_what_is_on_the_disk_already_is_not_asked_for_again(folders, monkeypatch):
    source, out, data = folders
    asked = []
    monkeypatch.setattr("llm_surgeon.jobs.derived.require_disk", lambda _, needed: asked.append(needed))
    state = interrupt(source, out, data, 10)
    there = sum(len(content) for content in tree(state).values())
    recover_checkpoint(source, out, data=data, **COMMON, resume=True)
    trained = 3 * 4 * 4 * OPTIONS["rank"] * sum(l.rows + l.columns for l in find_decoder(half_zero("llama")).linears)
    assert asked[0] - asked[1] == min(there, trained) > 0


def test_fingerprints_tell_values_names_dtypes_and_shapes():
    model = torch.nn.Linear(3, 2)
    found = contents(model=model, teacher=None, data=torch.arange(6))
    assert found == contents(model=model, teacher=None, data=torch.arange(6)) and found["teacher"] is None
    assert len(found["model"]) == len(found["data"]) == 64
    others = [torch.arange(6).view(2, 3), torch.arange(6, dtype=torch.int32), torch.arange(1, 7)]
    assert len({found["data"], *(contents(data=ids)["data"] for ids in others)}) == 4
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    assert contents(model=model)["model"] != found["model"]
    bfloat = torch.nn.Embedding(0, 2).bfloat16()  # a type that numpy does not have, and no numbers
    assert len(contents(model=bfloat)["model"]) == 64
