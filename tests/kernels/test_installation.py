import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from surgeon_kernels import build_info

ROOT = Path(__file__).resolve().parents[2]

_IMPORT = """
import json, sys
import torch
before = set(sys.modules)
def state():
    added = {name.partition(".")[0] for name in set(sys.modules) - before}
    return sorted(added), torch.cuda.is_initialized()
import surgeon_kernels
imported = state()
surgeon_kernels.build_info()
print(json.dumps([imported, state()]))
"""


def installed(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_versions():
    assert build_info()["versions"] == {
        "surgeon-kernels": installed("surgeon-kernels"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "cuda": torch.version.cuda,
    }


def test_accelerators():
    accelerators = build_info()["accelerators"]
    assert len(accelerators) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for index, accelerator in enumerate(accelerators):
        assert accelerator["name"] == torch.cuda.get_device_name(index)
        major, minor = torch.cuda.get_device_capability(index)
        assert accelerator["capability"] == f"{major}.{minor}"
        assert accelerator["memory"] > 2**30


def test_every_part_says_whether_it_is_available_and_why():
    parts = build_info()["parts"]
    assert set(parts) == {"cuda", "triton", "extension", "nvcc"}
    for part in parts.values():
        assert set(part) == {"available", "reason"}
        assert isinstance(part["available"], bool)
        assert isinstance(part["reason"], str) and len(part["reason"]) > 10
    assert parts["cuda"]["available"] == torch.cuda.is_available()
    assert parts["triton"]["available"] == (installed("triton") is not None)
    assert parts["nvcc"]["available"] == (shutil.which("nvcc") is not None)


def test_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    info = build_info()
    assert info["accelerators"] == []
    assert not info["parts"]["cuda"]["available"] and "CPU" in info["parts"]["cuda"]["reason"]


def test_nvcc_is_found_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert build_info()["parts"]["nvcc"] == {"available": False, "reason": "nvcc is not on the PATH"}
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    part = build_info()["parts"]["nvcc"]
    assert part["available"] and str(nvcc) in part["reason"]


@pytest.mark.parametrize("present", [True, False])
def test_triton(monkeypatch, present):
    def version(distribution):
        if present:
            return f"{distribution} 9.8.7"
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if present else None)
    info = build_info()
    assert info["versions"]["triton"] == ("triton 9.8.7" if present else None)
    assert info["parts"]["triton"]["available"] == present


def test_is_plain_data():
    assert json.loads(json.dumps(build_info())) == build_info()


def test_importing_is_light():
    """Packages that it adds to those of torch, and no initialisation of CUDA: on import, then on build_info."""
    run = subprocess.run([sys.executable, "-c", _IMPORT], cwd=ROOT, capture_output=True, text=True, check=True)
    imported, asked = json.loads(run.stdout)
    assert "surgeon_kernels" in imported[0]
    assert set(imported[0]).isdisjoint({"transformers", "triton", "llm_surgeon", "numpy", "accelerate"})
    assert set(asked[0]).isdisjoint({"transformers", "triton", "llm_surgeon"})
    assert not imported[1]
    assert asked[1] == bool(build_info()["accelerators"])  # names and memory are the driver's to tell
