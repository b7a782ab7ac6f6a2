"""Files of an installation: both packages, and csrc/, from which the extension is built on first use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml needs it")

ROOT = Path(__file__).parents[1]
SOURCES = {
    "surgeon_kernels": ROOT / "surgeon_kernels",
    "surgeon_kernels/csrc": ROOT / "csrc",
    "llm_surgeon": ROOT / "python" / "llm_surgeon",
}


def files(folder: Path) -> set[Path]:
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if "__pycache__" not in path.parts and path.suffix != ".so"}


def test_a_build_copies_every_file_and_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    stale = tmp_path / "lib" / "surgeon_kernels" / "csrc" / "renamed_since.cu"
    stale.parent.mkdir(parents=True)
    stale.touch()
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "build_py"]
    environment = {**os.environ, "SURGEON_CUDA": "0"}
    subprocess.run([*command, "--build-lib", tmp_path / "lib"], cwd=ROOT, env=environment, check=True)
    built = {Path(name) / path for name, folder in SOURCES.items() for path in files(folder)}
    assert files(tmp_path / "lib") == built
