import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton's interpreter")


@pytest.mark.parametrize("checks", ["interpreted_gram", "interpreted_pointwise"])
def test_the_kernels_are_right_in_the_interpreter(checks):
    """float32 and float16 only: the interpreter's bfloat16 products are wrong."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", f"tests.kernels.{checks}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "agrees"
