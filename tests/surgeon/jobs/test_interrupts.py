"""Commands that are killed or interrupted lose nothing: OUT is absent, the old one or the new one, whole.

``SURGEON_KILL_POINTS=60`` kills each command so often in place of 15 times (``SURGEON_KILL_SEED`` elsewhere). What
an interrupt in memory leaves is the matter of ``test_interrupts_in_memory.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
POINTS = int(os.environ.get("SURGEON_KILL_POINTS", "15"))
SEED = os.environ.get("SURGEON_KILL_SEED", "0")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and fork are POSIX's")


def environment() -> dict[str, str]:
    path = f"{ROOT}:{ROOT / 'python'}:{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("runs"))
    command = [sys.executable, "-m", "tests.surgeon.interrupted_runs", folder, str(POINTS), SEED]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["prune", "shots", "recover", "pack", "compact"])
def test_a_killed_command_loses_nothing(kind: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[kind]["wrong"] == []
    tried = sum(number for what, number in found[kind]["tried"].items() if what.startswith("SIG"))
    assert tried == (-(-POINTS // 5) if kind == "shots" else POINTS)
