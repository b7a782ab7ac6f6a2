"""The command as two processes: what it writes, what it says, and what is left where one of them is killed."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_surgeon import prune_checkpoint
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.distributed.runs import launch
from tests.surgeon.half_zero import text_windows
from tests.surgeon.tiny_models import build

pytestmark = pytest.mark.slow

_SHOTS = 6
_OPTIONS = ["--samples", "8", "--seqlen", "16", "--update", "joint", "--shots", str(_SHOTS), "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("launch")
    save_folder(found / "model", build("llama"))
    (found / "text.txt").write_text(" ".join(f"w{int(token)}" for token in text_windows(400).flatten()))
    return found


def start(folder: Path, out: str, *more: str) -> list[subprocess.Popen[str]]:
    words = ["prune", str(folder / "model"), str(folder / out), "--calibration", str(folder / "text.txt")]
    return launch(2, "llm_surgeon", *words, *_OPTIONS, *more)


def ended(ranks: list[subprocess.Popen[str]]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, and what each rank has printed and said."""
    told = [rank.communicate(timeout=120) for rank in ranks]
    return [rank.returncode for rank in ranks], [out for out, _ in told], [said for _, said in told]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The output of a run that nothing interrupts."""
    codes, printed, said = ended(start(folder, "whole"))
    assert codes == [0, 0], said
    assert "written to" in printed[0] and "surgeon: loading" in said[0]
    assert printed[1] == said[1] == ""
    return folder / "whole"


def test_the_first_rank_writes_what_one_process_would(folder: Path, whole: Path) -> None:
    prune_checkpoint(
        folder / "model", folder / "alone", calibration=str(folder / "text.txt"), samples=8, seqlen=16, update="joint",
        shots=_SHOTS, device="cpu",
    )  # fmt: skip
    found, expected = weights(whole), weights(folder / "alone")
    for name, weight in expected.items():
        assert torch.equal(found[name] == 0, weight == 0)
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)
    assert not (folder / ".whole.pruning").exists()


def test_what_is_wrong_is_said_once(folder: Path, whole: Path) -> None:
    codes, _, said = ended(start(folder, "whole", "--quiet"))
    assert codes[0] == 2 and codes[1] != 0
    place = f"output {str(whole)!r} is not empty"
    assert said[0].splitlines() == [f"surgeon: {place}: choose another folder or pass --overwrite"]
    assert said[1] == ""


def test_a_killed_rank_ends_the_others_and_the_run_goes_on_to_the_bit(folder: Path, whole: Path) -> None:
    ranks = start(folder, "killed")
    assert ranks[0].stderr is not None
    for line in ranks[0].stderr:
        if f"shot 3 of {_SHOTS}: curvature" in line:
            break
    ranks[1].send_signal(signal.SIGKILL)
    codes, _, said = ended(ranks)
    assert codes == [1, -signal.SIGKILL]
    lines = [line for line in said[0].splitlines() if f"of {_SHOTS}: " not in line]
    state = folder / ".killed.pruning"
    kept, reason = lines
    assert kept == f"surgeon: what is done is kept in {str(state)!r}: the same command with --resume goes on"
    assert re.fullmatch(r"surgeon: another process of the run has ended, and the run with it \(.+\)", reason)
    codes, _, said = ended(start(folder, "killed", "--resume"))
    assert codes == [0, 0], said
    assert "surgeon: goes on after shot 2" in said[0]
    found = weights(folder / "killed")
    assert all(torch.equal(found[name], weight) for name, weight in weights(whole).items())
