"""Files of an installation: both packages, and csrc/, from which the extension is built on first use; of a source
distribution the rest as well."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
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


def test_a_source_distribution_has_everything(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "SURGEON_CUDA": "0"}, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        found = {name.partition("/")[2] for name in packed.getnames()}
    assert {str(Path(folder) / path) for folder in ("csrc", "tests", "bench") for path in files(ROOT / folder)} <= found
    assert {"CHANGELOG.md", "CITATION.cff", "docs/method.md", "examples/prune_and_pack.py", "mkdocs.yml"} <= found
