"""Commands that are killed or interrupted lose nothing: OUT is absent, the old one or the new one, whole.

``SURGEON_KILL_POINTS=60`` kills each command so often in place of 9 times (``SURGEON_KILL_SEED`` elsewhere). What
an interrupt in memory leaves is the matter of ``test_interrupts_in_memory.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
POINTS = int(os.environ.get("SURGEON_KILL_POINTS", "9"))
SEED = os.environ.get("SURGEON_KILL_SEED", "0")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and fork are POSIX's")


def environment() -> dict[str, str]:
    path = f"{ROOT}:{ROOT / 'python'}:{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def test_a_killed_command_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.surgeon.interrupted_runs", str(tmp_path), str(POINTS), SEED]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert list(found) == ["prune", "shots", "recover", "pack", "compact"]
    for kind, runs in found.items():
        assert runs["wrong"] == [], kind
        tried = sum(number for what, number in runs["tried"].items() if what.startswith("SIG"))
        assert tried == (-(-POINTS // 5) if kind == "shots" else POINTS)
