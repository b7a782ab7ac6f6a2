"""Rows of bench/results: what each says of the machine and the code that made it, and how it is appended."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Mapping
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


def require_gpu(device: str = "cuda") -> None:
    """End the script, in a sentence and with exit code 2, where ``device`` is a GPU and there is none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        print(f"{Path(sys.argv[0]).stem} measures an NVIDIA GPU, and torch finds none", file=sys.stderr)
        sys.exit(2)


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Append one row to a CSV file, with a header where the file is new; end the script where it has other columns."""
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        if header != list(row):
            sys.exit(f"{path} has the columns {', '.join(header)}, not those of the new row: {', '.join(row)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
