"""The CUDA extension: found ahead of time, or built by ninja on first use and cached.

`csrc/*.cu` are CUDA kernels free of torch headers, `csrc/*_ops.cpp` register them as ``torch.ops.surgeon_kernels.*``.
Which implementation an op runs is one rule: CUDA tensors run the extension's kernel where `available`, and the PyTorch
reference everywhere else. Importing this module builds nothing and touches no device.

Environment: ``SURGEON_CUDA=0`` never uses the extension; ``TORCH_EXTENSIONS_DIR`` is where builds are cached;
``TORCH_CUDA_ARCH_LIST`` overrides the architectures (such as ``8.0;9.0a``).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import threading
import warnings
from pathlib import Path

import torch

# 9.0a: wgmma and other Hopper instructions are not in the portable 9.0.
ARCHITECTURES = ("8.0", "8.9", "9.0a", "10.0")
COMPILER_FLAGS = ["-O3"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]

_lock = threading.Lock()


def available() -> bool:
    """Whether the CUDA ops are registered; the first call may build them (a minute), or warns if it cannot."""
    with _lock:
        return _load() is None


def ahead_of_time() -> bool:
    """Whether this installation was built with ``SURGEON_CUDA=1``."""
    return importlib.util.find_spec("surgeon_kernels._C") is not None


def obstacle() -> str | None:
    """What rules the extension out before any attempt, in words, or None; builds nothing."""
    if os.environ.get("SURGEON_CUDA") == "0":
        return "switched off by SURGEON_CUDA=0"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if ahead_of_time():
        return None
    if not sources():
        return "the sources in csrc/ are not installed"
    for tool in ("nvcc", "ninja"):
        if shutil.which(tool, path=_path()) is None:
            return f"{tool} is not on the PATH"
    return None


def sources() -> list[Path]:
    """C++ and CUDA sources of the extension, beside the package in a checkout or inside an installed one."""
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "module.cpp").is_file():
            return sorted(path for path in folder.iterdir() if path.suffix in {".cpp", ".cu"})
    return []


def gencode_flags(architectures: list[str]) -> list[str]:
    """nvcc's ``-gencode`` flags: machine code for every architecture such as ``9.0a``, and no PTX."""
    numbers = [architecture.replace(".", "") for architecture in architectures]
    return [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]


def toolkit_architectures() -> list[str]:
    """Those of `ARCHITECTURES` that the nvcc on the PATH can compile for."""
    listed = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [
        architecture for architecture in ARCHITECTURES if f"sm_{architecture.rstrip('a').replace('.', '')}" in listed
    ]


@functools.cache
def _load() -> str | None:
    """Register the ops; None on success, otherwise why they are missing (said once, as a warning)."""
    missing = obstacle()
    if missing is None:
        try:
            if ahead_of_time():
                importlib.import_module("surgeon_kernels._C")
            else:
                _build()
        # A compiler or loader that does not work must not stop a run that the references can finish.
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            missing = f"the CUDA extension could not be built or loaded: {error}"
    if missing is not None and torch.cuda.is_available() and os.environ.get("SURGEON_CUDA") != "0":
        warnings.warn(f"{missing}; the PyTorch references run instead", stacklevel=4)
    return missing


def _path() -> str:
    """The PATH with this environment's scripts first: ninja is there also when the environment is not activated."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def _build() -> None:
    """Build for the devices of this machine, into a folder named by what determines the result."""
    from torch.utils import cpp_extension  # imports setuptools: only when something is built

    nvcc_flags = [*NVCC_FLAGS, *gencode_flags(_architectures())]
    files = sources()
    headers = sorted(files[0].parent.glob("*.h")) + sorted(files[0].parent.glob("*.cuh"))
    os.environ["PATH"] = _path()
    digest = hashlib.sha256(" ".join([*nvcc_flags, *COMPILER_FLAGS, torch.__version__]).encode())
    for path in [*files, *headers]:
        digest.update(path.read_bytes())
    cpp_extension.load(
        name=f"surgeon_kernels_{digest.hexdigest()[:16]}",
        sources=[str(path) for path in files],
        extra_cflags=COMPILER_FLAGS,
        extra_cuda_cflags=nvcc_flags,
        verbose=os.environ.get("SURGEON_VERBOSE") == "1",
    )


def _architectures() -> list[str]:
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return listed.replace(";", " ").split()
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return sorted(f"{major}.{minor}{'a' if major >= 9 else ''}" for major, minor in found)
