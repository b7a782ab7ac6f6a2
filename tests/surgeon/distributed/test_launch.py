"""The command as two processes: what it writes, what it says, and what is left where one of them is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_surgeon.jobs.recover import recover_checkpoint
from llm_surgeon.recovery.recover import RecoveryReport
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.distributed.runs import environment, start
from tests.surgeon.half_zero import text_windows
from tests.surgeon.tiny_models import build

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX's")]

_SHOTS = 6
_OPTIONS = ["--samples", "8", "--seqlen", "16", "--update", "joint", "--shots", str(_SHOTS), "--device", "cpu"]
_STEPS = 40
_TRAINING = ["--method", "full", "--seqlen", "16", "--steps", str(_STEPS), "--batch-size", "4", "--eval-every", "2"]
_TRAINING += ["--device", "cpu"]


class Commands:
    """Runs of two ranks, see :mod:`tests.surgeon.distributed.forked_commands`; the first one wrote ``alone``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        words = self.words("alone", "--quiet")
        self._server = start("tests.surgeon.distributed.forked_commands", *words, TORCH_CPP_LOG_LEVEL="ERROR")

    def words(self, out: str, *more: str) -> list[str]:
        text, places = self.folder / "text.txt", [str(self.folder / "model"), str(self.folder / out)]
        return ["prune", *places, "--calibration", str(text), *_OPTIONS, *more]

    def recovery(self, out: str, *more: str) -> list[str]:
        places = [str(self.folder / "alone"), str(self.folder / out)]
        return ["recover", *places, "--data", str(self.folder / "text.txt"), *_TRAINING, *more]

    def begin(self, out: str, *more: str, words: list[str] | None = None) -> list[int]:
        """Ids of the processes, of a pruning where no other ``words`` are given."""
        return self._ask([str(self.folder / out), 2, *(words or self.words(out, *more))])

    def end(self, out: str) -> tuple[list[int], list[str], list[str]]:
        """Exit codes, and what each rank has printed and said."""
        codes, places = self._ask([]), [self.folder / f"{out}-{rank}.out" for rank in range(2)]
        return codes, *([place.with_suffix(kind).read_text() for place in places] for kind in (".out", ".err"))

    def close(self) -> None:
        self._server.communicate(timeout=60)

    def _ask(self, request: list[object]) -> list[int]:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("launch")
    save_folder(folder / "model", build("llama"))
    (folder / "text.txt").write_text(" ".join(f"w{int(token)}" for token in text_windows(400).flatten()))
    found = Commands(folder)
    yield found
    found.close()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_two_processes(commands: Commands) -> None:
    """The first rank writes what one process would, what is wrong is said once, and a kill loses little."""
    whole = commands.folder / "whole"
    commands.begin("whole")
    codes, printed, said = commands.end("whole")
    assert codes == [0, 0], said
    assert "written to" in printed[0] and "surgeon: loading" in said[0]
    assert printed[1] == said[1] == ""
    found, expected = weights(whole), weights(commands.folder / "alone")
    for name, weight in expected.items():
        assert torch.equal(found[name] == 0, weight == 0)
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)
    assert not whole.with_name(".whole.pruning").exists()

    commands.begin("whole", "--quiet")
    codes, _, said = commands.end("whole")
    assert codes[0] == 2 and codes[1] != 0
    place = f"output {str(whole)!r} is not empty"
    assert said[0].splitlines() == [f"surgeon: {place}: choose another folder or pass --overwrite"]
    assert said[1] == ""

    ranks, log = commands.begin("killed"), commands.folder / "killed-0.err"
    while not (log.exists() and f"shot 3 of {_SHOTS}: curvature" in log.read_text()):
        time.sleep(0.005)
    os.kill(ranks[1], signal.SIGKILL)
    codes, _, said = commands.end("killed")
    assert codes == [1, -signal.SIGKILL]
    lines = [
        line for line in said[0].partition(f"shot 3 of {_SHOTS}: curvature\n")[2].splitlines() if "shot" not in line
    ]
    state = whole.with_name(".killed.pruning")
    kept, reason = lines
    assert kept == f"surgeon: what is done is kept in {str(state)!r}: the same command with --resume goes on"
    assert re.fullmatch(r"surgeon: another process of the run has ended, and the run with it \(.+\)", reason)
    commands.begin("killed", "--resume")
    codes, _, said = commands.end("killed")
    assert codes == [0, 0], said
    assert "surgeon: goes on after shot 2" in said[0]
    found = weights(whole.with_name("killed"))
    assert all(torch.equal(found[name], weight) for name, weight in weights(whole).items())


def test_two_processes_train(commands: Commands) -> None:
    """They come to what one does, and go on with the first one's state."""
    commands.begin("trained", words=commands.recovery("trained"))
    codes, printed, said = commands.end("trained")
    assert codes == [0, 0], said
    assert "written to" in printed[0] and printed[1] == said[1] == ""
    expected, folder = {"seqlen": 16, "steps": _STEPS, "batch_size": 4, "eval_every": 2}, commands.folder
    alone = recover_checkpoint(
        folder / "alone", folder / "recovered", data=str(folder / "text.txt"), method="full", device="cpu", **expected
    )
    found = RecoveryReport.from_json((folder / "trained" / "surgeon_recovery.json").read_text())
    assert found.loss_before == pytest.approx(alone.loss_before, rel=1e-6)
    assert found.loss_after == pytest.approx(alone.loss_after, rel=1e-3) and alone.loss_after < alone.loss_before
    whole, pruned = weights(folder / "trained"), weights(folder / "alone")
    for name, weight in weights(folder / "recovered").items():
        torch.testing.assert_close(whole[name], weight, rtol=1e-2, atol=1e-3)
        assert not whole[name][pruned[name] == 0].any()

    ranks, state = commands.begin("stopped", words=commands.recovery("stopped")), folder / ".stopped.training"
    while not any(state.glob("checkpoint-*.pt")):
        time.sleep(0.005)
    os.kill(ranks[1], signal.SIGKILL)
    codes, _, said = commands.end("stopped")
    assert codes == [1, -signal.SIGKILL], said
    commands.begin("stopped", words=commands.recovery("stopped", "--resume"))
    assert commands.end("stopped")[0] == [0, 0] and not state.exists()
    assert all(torch.equal(weights(folder / "stopped")[name], weight) for name, weight in whole.items())


def test_accelerate_launches_it(commands: Commands) -> None:
    words = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m", "llm_surgeon"]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *words]
    run = [*launcher, *commands.words("launched")]
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    found, expected = weights(commands.folder / "launched"), weights(commands.folder / "alone")
    assert all(torch.equal(found[name] == 0, weight == 0) for name, weight in expected.items())
