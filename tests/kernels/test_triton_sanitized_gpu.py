"""Triton kernels under compute-sanitizer: no access out of bounds, no race, and right results."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on the PATH"),
]


@pytest.mark.parametrize(
    ("tool", "report"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
    ],
)
def test_nothing_is_found(tool, report):
    command = ["compute-sanitizer", "--tool", tool, sys.executable, "-m", "tests.kernels.triton_sanitized"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0 and "0 wrong" in output and report in output, output[-2000:]
