"""The same seeds give the same masks and weights as the rows on record, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.surgeon.golden import cases, label, machine, recorded

ROOT = Path(__file__).parents[2]


def test_every_case_has_a_label_of_its_own() -> None:
    labels = [tuple(label(case).values()) for case in cases()]
    assert len(set(labels)) == len(labels)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "opt"])
def test_every_method_and_structure_leaves_what_is_on_record(model: str) -> None:
    if recorded(model, cases()[0]) is None:
        pytest.skip(f"no rows for {machine()}: other versions round sums in another order")
    # One thread, from the start of a process.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.surgeon.golden", "--model", model]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith(f"{model} | ")]
    assert done.returncode == 0 and len(found) == len(cases()), done.stdout + done.stderr[-2000:]
    assert [line for line in found if not line.endswith(" | same")] == []
