"""What an interrupted pruning left beside its output is gone on with, or refused, in one sentence."""

import json
import shutil

import pytest

from llm_surgeon import prune_checkpoint
from llm_surgeon.checkpoint.states import find_states
from llm_surgeon.cli.app import main
from llm_surgeon.errors import InputError
from llm_surgeon.jobs import kept_run, recovery_after
from llm_surgeon.jobs import prune as job
from llm_surgeon.report.schema import PruneReport
from tests.surgeon.checkpoints import save_folder, tree
from tests.surgeon.half_zero import text_windows
from tests.surgeon.tiny_models import build

OPTIONS = {"structure": "unstructured", "shots": 2, "samples": 4, "seqlen": 16, "device": "cpu"}


@pytest.fixture
def places(tmp_path):
    """A dense checkpoint, an output and a text."""
    (tmp_path / "text.txt").write_text(" ".join(f"w{int(token)}" for token in text_windows(100).flatten()))
    return save_folder(tmp_path / "dense", build("llama")), tmp_path / "out", str(tmp_path / "text.txt")


@pytest.fixture
def cut(places, monkeypatch):
    """The places, and the states of a run that was interrupted when all shots were done."""
    source, out, text = places
    with monkeypatch.context() as patched:
        patched.setattr(job, "write_pruned", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune_checkpoint(source, out, calibration=text, **OPTIONS)
    return source, out, text, out.with_name(".out.pruning")


def test_an_interrupted_run_says_how_to_go_on_and_does(cut, caplog):
    source, out, text, states = cut
    assert not out.exists() and {name for name in find_states(states)} == {"shot-1", "shot-2"}
    (said,) = caplog.get_records("setup")
    assert said.getMessage() == f"what is done is kept in '{states}': the same command with --resume goes on"
    with pytest.raises(InputError, match=r"\.out\.pruning' holds an interrupted run: pass --resume to go on with"):
        prune_checkpoint(source, out, calibration=text, **OPTIONS)
    prune_checkpoint(source, out, calibration=text, resume=True, **OPTIONS)
    plain = out.with_name("plain")
    prune_checkpoint(source, plain, calibration=text, checkpoint=False, **OPTIONS)
    assert tree(out)["model.safetensors"] == tree(plain)["model.safetensors"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["dense", "out", "plain", "text.txt"]


@pytest.mark.parametrize(
    "what, words",
    [
        ("options", r"the interrupted run has sparsity 0\.5, not 0\.6: give that, or delete the folder '.*' to start"),
        ("weights", "the model's weights changed since the interrupted run began: put back what was there, or delete"),
        ("text", "the calibration windows changed since the interrupted run began: put back what was there, or"),
        ("processes", "the interrupted run has processes 2, not 1: give that, or delete the folder"),
        ("version", "the interrupted run was begun by another version of surgeon-kernels: go on with that"),
        ("note", r"run\.json', which says what was begun, is damaged: delete the folder"),
        ("foreign", r"\.out\.pruning' holds 'mine\.txt', which is no part of an interrupted run"),
    ],
)
def test_what_is_not_the_same_is_refused_by_name(cut, what, words):
    source, out, text, states = cut
    more = {"sparsity": 0.6} if what == "options" else {}
    if what == "weights":
        save_folder(source, build("llama", seed=5))
    if what == "text":
        with open(text, "r+") as file:
            content = file.read()
            file.seek(0)
            file.write(content.replace("w5", "w6"))
    if what == "version":
        note = json.loads((states / "run.json").read_text())
        note["layout"]["plan"]["more"] = 1
        (states / "run.json").write_text(json.dumps(note))
    if what == "processes":
        note = json.loads((states / "run.json").read_text())
        note["run"]["processes"] = 2
        (states / "run.json").write_text(json.dumps(note))
    if what == "note":
        (states / "run.json").write_text("{")
    if what == "foreign":
        (states / "mine.txt").touch()
    kept = tree(states)
    with pytest.raises(InputError, match=words) as error:
        prune_checkpoint(source, out, calibration=text, resume=True, **OPTIONS, **more)
    assert len(str(error.value).splitlines()) == 1
    assert tree(states) == kept and not out.exists()


def test_a_damaged_state_is_passed_over(cut, caplog):
    source, out, text, states = cut
    (newest,) = find_states(states)["shot-2"]
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    prune_checkpoint(source, out, calibration=text, resume=True, **OPTIONS)
    assert f"the state '{newest}' is damaged and not gone on from" in caplog.text
    plain = out.with_name("plain")
    prune_checkpoint(source, plain, calibration=text, checkpoint=False, **OPTIONS)
    assert tree(out)["model.safetensors"] == tree(plain)["model.safetensors"] and not states.exists()


def test_a_run_that_was_done_but_for_clearing_up_is_cleared_up(places, monkeypatch, caplog):
    source, out, text = places
    monkeypatch.setattr(kept_run.FolderStates, "remove", lambda states: None)
    report = prune_checkpoint(source, out, calibration=text, **OPTIONS)
    monkeypatch.undo()
    states, written = out.with_name(".out.pruning"), tree(out)
    assert states.is_dir()
    monkeypatch.setattr(job, "PruneJob", lambda *_, **__: 1 / 0)
    assert prune_checkpoint(source, out, calibration=text, resume=True, **OPTIONS) == report
    assert "was complete already" in caplog.text and not states.exists() and tree(out) == written
    with pytest.raises(InputError, match="is not empty"):
        prune_checkpoint(source, out, calibration=text, resume=True, **OPTIONS)


def test_a_run_that_memory_took_gradient_steps_from_is_the_same(places, monkeypatch):
    source, out, text = places
    monkeypatch.setattr(kept_run.FolderStates, "remove", lambda states: None)
    prune_checkpoint(source, out, calibration=text, **OPTIONS, gradient_steps=0)
    for path in (out / "surgeon_report.json", out.with_name(".out.pruning") / "report.json"):
        report = PruneReport.read(path)
        report.config["offload"] = "cpu"
        path.write_text(report.to_json())
    monkeypatch.setattr(job, "PruneJob", lambda *_, **__: 1 / 0)
    assert prune_checkpoint(source, out, calibration=text, resume=True, **OPTIONS, gradient_steps=2) == report


@pytest.mark.parametrize(
    "given, words",
    [
        (
            {"sparsity": 0.7},
            r"the interrupted run has sparsity 0\.5, not 0\.7: give that, or delete the folder '.*' to",
        ),
        ({"shots": 1}, r"the interrupted run has shots 2, not 1: give that"),
        ({"source": "other"}, r"the interrupted run has model '.*dense', not 'other': give that"),
        ({"calibration": "c4"}, r"the interrupted run has calibration '.*text\.txt', not 'c4': give that"),
        ({"sparsity": 0.7, "recover_minutes": 0.05}, r"the interrupted run has sparsity 0\.5, not 0\.7: give that"),
    ],
)
def test_another_run_than_the_one_that_was_done_is_refused_by_name(places, monkeypatch, given, words):
    source, out, text = places
    monkeypatch.setattr(kept_run.FolderStates, "remove", lambda states: None)
    prune_checkpoint(source, out, calibration=text, **OPTIONS)
    states = out.with_name(".out.pruning")
    for path in states.iterdir():  # a kill when all but the last file is deleted
        if path.name != "report.json":
            path.unlink()
    kept = tree(states), tree(out)
    monkeypatch.setattr(job, "PruneJob", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match=words):
        prune_checkpoint(out=out, resume=True, **{"source": source, "calibration": text, **OPTIONS, **given})
    assert (tree(states), tree(out)) == kept


def test_an_interrupted_recovery_after_it_is_begun_again(places, monkeypatch):
    source, out, text = places

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(recovery_after, "recover", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(source, out, calibration=text, recover_minutes=0.05, **OPTIONS)
    before = PruneReport.read(out / "surgeon_report.json")
    report = prune_checkpoint(source, out, calibration=text, recover_minutes=0.05, resume=True, **OPTIONS)
    assert json.loads((out / "surgeon_recovery.json").read_text())["steps"] > 0
    assert len(report.history) == 1 and report.shots == before.shots
    assert sorted(path.name for path in out.parent.iterdir()) == ["dense", "out", "text.txt"]


def test_the_disk_must_have_room_for_what_is_kept(places, monkeypatch):
    source, out, text = places
    real = shutil.disk_usage(out.parent)
    room = 3_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=room))
    monkeypatch.setattr(job, "states_bytes", lambda *_: (10_000_000, 1))
    words = r"about .* of disk are needed for .*, with what is kept for --resume: --no-checkpoint does without"
    with pytest.raises(InputError, match=words):
        prune_checkpoint(source, out, calibration=text, **OPTIONS)
    prune_checkpoint(source, out, calibration=text, checkpoint=False, **OPTIONS)
    assert not out.with_name(".out.pruning").exists()
    with pytest.raises(InputError, match="resume means nothing without checkpoint"):
        prune_checkpoint(source, out, calibration=text, checkpoint=False, resume=True, **OPTIONS)


def test_the_command_goes_on(cut, capsys):
    source, out, text, states = cut
    given = ["--calibration", text, "--samples", "4", "--seqlen", "16", "--shots", "2", "--device", "cpu"]
    given += ["--structure", "unstructured"]

    def dry_run(*more):
        with pytest.raises(SystemExit) as ended:
            main(["prune", str(source), str(out), *given, "--dry-run", *more])
        return ended.value.code or 0, capsys.readouterr()

    kept = tree(states)
    code, told = dry_run()
    assert code == 2 and "holds an interrupted run: pass --resume to go on with it" in told.err
    code, told = dry_run("--resume", "--samples", "5", "--fisher", "empirical")
    assert code == 2 and "the interrupted run has samples 4, not 5: give that" in told.err
    code, told = dry_run("--resume")
    assert code == 0 and "it would go on with the interrupted run, of which some is done" in told.out
    assert tree(states) == kept and not out.exists()
    for more, code in (([], 2), (["--resume", "--no-checkpoint"], 2), (["--resume"], None)):
        with pytest.raises(SystemExit) as ended:
            main(["prune", str(source), str(out), *given, *more])
        assert (ended.value.code or None) == code
    assert "surgeon: goes on after shot 2" in capsys.readouterr().err and not states.exists()
    out = out.with_name("new")
    assert "what is done is kept until all is: " in dry_run()[1].out
    assert "what is done is kept" not in dry_run("--no-checkpoint")[1].out
