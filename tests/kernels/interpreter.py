"""Runs checks of kernels in Triton's interpreter: in processes of their own, as it is chosen on import."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton


def release(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def assert_agrees(checks, root=Path(__file__).parents[2]):
    """``tests.kernels.<checks>`` of the folder ``root`` ends well and prints "agrees"."""
    if release(triton) < (3, 7) and release(numpy) >= (2, 5):
        pytest.skip("the interpreter of Triton 3.6 does not run with NumPy 2.5 or later")
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", f"tests.kernels.{checks}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "agrees"
