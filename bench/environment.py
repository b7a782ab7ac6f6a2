"""What every result row says of the machine and the code that made it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch
import transformers


def environment(device: str) -> dict[str, str]:
    """Device name, versions and commit (``SURGEON_COMMIT`` where the checkout has no git history)."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": os.environ.get("SURGEON_COMMIT") or _commit(),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
