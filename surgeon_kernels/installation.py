"""Accelerators, compiled parts and versions that this installation has, and reasons for what it lacks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from surgeon_kernels.gram import plan as gram_plan
from surgeon_kernels.runtime import extension, toolchain


def build_info() -> dict[str, Any]:
    """Describe the installation without building or initialising anything beyond asking torch for its devices.

    Returns:
        ``versions`` (python, torch, triton, surgeon-kernels, CUDA torch was built for), ``accelerators`` (a list of
        name, compute capability and memory in bytes), ``parts`` (for every optional part: ``available`` and a
        ``reason`` in words).
    """
    accelerators = [_device(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "versions": {
            "surgeon-kernels": _version("surgeon-kernels"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
        },
        "accelerators": accelerators,
        "parts": {
            "cuda": _cuda_part(bool(accelerators)),
            "triton": _triton_part(),
            "extension": _extension_part(),
            "nvcc": _nvcc_part(),
        },
    }


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
    }


def _cuda_part(found: bool) -> dict[str, Any]:
    if found:
        return _part(True, "CUDA tensors use torch's tensor-core products where these are exact")
    if torch.version.cuda is None:
        return _part(False, "this torch is built without CUDA; everything runs on the CPU")
    return _part(False, "torch finds no CUDA device; everything runs on the CPU")


def _triton_part() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        return _part(False, "triton is not installed; the PyTorch references are used")
    *majors, last = sorted({major for major, _ in gram_plan.CONFIGS})
    capabilities = f"{', '.join(f'{major}.x' for major in majors)} and {last}.x"
    return _part(
        True,
        f"installed; Gram matrices are accumulated by a Triton kernel on CUDA devices of capability {capabilities}",
    )


def _nvcc_part() -> dict[str, Any]:
    path = toolchain.nvcc()
    return _part(path is not None, path or "nvcc is not on the PATH")


def _extension_part() -> dict[str, Any]:
    obstacle = extension.obstacle()
    if obstacle is not None:
        return _part(False, f"{obstacle}; the PyTorch references are used")
    return _part(True, "built ahead of time" if extension.ahead_of_time() else "built by ninja on first use")


def _part(available: bool, reason: str) -> dict[str, Any]:
    return {"available": available, "reason": reason}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
