"""Examples run as they stand, at small sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUNS = {
    "kernel_against_pytorch.py": (["--tokens", "64", "--width", "32"], "surgeon_kernels  relative error"),
    "prune_and_pack.py": (["--samples", "2", "--seqlen", "32", "--out", "packed"], "The town of"),
    "shrink_and_recover.py": (["--seqlen", "32", "--minutes", "0.05"], "held-out perplexity: dense"),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_example(name: str, tmp_path: Path) -> None:
    options, expected = RUNS[name]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    command = [sys.executable, str(ROOT / "examples" / name), *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_all_are_run_but_those_that_need_a_machine_of_their_own() -> None:
    names = {path.name for path in (ROOT / "examples").iterdir()} - {"README.md", "large_model.sh", "__pycache__"}
    assert names == set(RUNS)
