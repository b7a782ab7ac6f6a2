"""The CUDA extension: found ahead of time, or built by ninja on first use and cached.

`csrc/<family>/*.cu` are CUDA kernels free of torch headers, `*_ops.cpp` beside them make
``torch.ops.surgeon_kernels.*`` run them. Which implementation an op runs is one rule: CUDA tensors run the extension's
kernel where it is `available` for their device, and the PyTorch reference everywhere else. Importing this module builds
nothing and touches no device.

Environment: ``SURGEON_CUDA=0`` never uses the extension; ``TORCH_EXTENSIONS_DIR`` is where builds are cached;
:mod:`surgeon_kernels.runtime.toolchain` has what is compiled, and for which architectures.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from surgeon_kernels.runtime import toolchain

_lock = threading.Lock()


def available(device: torch.device | None = None) -> bool:
    """True if the CUDA ops are registered, and hold machine code for ``device`` where one is given.

    The first call may build them (a minute). A warning names the reason against them once, and the reason against one
    of several devices once for each kind of device.
    """
    built = built_architectures()
    if not built or device is None:
        return bool(built)
    return device.type == "cuda" and _holds(built, torch.cuda.get_device_capability(device))


def built_architectures() -> tuple[str, ...]:
    """Architectures that the extension holds machine code for, such as ``("8.0", "9.0a")``; empty where there is none.

    Loads the extension and, as :func:`available`, may build it.
    """
    with _lock:
        return _load()


def ahead_of_time() -> bool:
    """True if this installation was built with ``SURGEON_CUDA=1``."""
    return importlib.util.find_spec("surgeon_kernels._C") is not None


def obstacle() -> str | None:
    """Reason against the extension that is known before any attempt, in words, or None; builds nothing."""
    if os.environ.get("SURGEON_CUDA") == "0":
        return "switched off by SURGEON_CUDA=0"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if ahead_of_time():
        return None
    if not toolchain.sources():
        return "the sources in csrc/ are not installed"
    if toolchain.nvcc() is None:
        return f"nvcc is not in {toolchain.cuda_home()}/bin" if toolchain.cuda_home() else "nvcc is not on the PATH"
    if shutil.which("ninja", path=toolchain.search_path()) is None:
        return "ninja is not on the PATH"
    return None


@functools.cache
def _holds(built: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """True if a device of ``capability`` is served; warns if not."""
    if any(toolchain.runs_on(architecture, capability) for architecture in built):
        return True
    warnings.warn(
        "the CUDA extension holds no machine code for devices of capability {}.{}, only for {}; the PyTorch references "
        "run instead on these".format(*capability, ", ".join(built)),
        stacklevel=4,
    )
    return False


@functools.cache
def _load() -> tuple[str, ...]:
    """Register the ops, and name the architectures they hold; empty if they are missing (said once, as a warning)."""
    missing = obstacle()
    if missing is None:
        try:
            module = importlib.import_module("surgeon_kernels._C") if ahead_of_time() else _build()
            return tuple(module.architectures.split(":"))
        # A compiler or loader that does not work must not stop a run that the references can finish.
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            missing = f"the CUDA extension could not be built or loaded: {error}"
    if missing is not None and torch.cuda.is_available() and os.environ.get("SURGEON_CUDA") != "0":
        warnings.warn(f"{missing}; the PyTorch references run instead", stacklevel=4)
    return ()


def _build() -> ModuleType:
    """Build for the devices of this machine, or import what another process built.

    The library is named by what determines it, compiled in a folder of its own and moved into place in one step: a
    build that dies leaves nothing behind that a later process would load or wait for.
    """
    os.environ["PATH"] = toolchain.search_path()
    from torch.utils import cpp_extension  # imports setuptools: only when something is built

    devices = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    cxx_flags, nvcc_flags = toolchain.flags(toolchain.architectures(devices))
    files = toolchain.sources()
    linker_flags = toolchain.linker_flags()
    named_by = [*nvcc_flags, *cxx_flags, *linker_flags, torch.__version__, *toolchain.compilers()]
    digest = hashlib.sha256("\n".join(named_by).encode())
    for path in [*files, *sorted(toolchain.csrc().rglob("*.h")), *sorted(toolchain.csrc().rglob("*.cuh"))]:
        digest.update(path.read_bytes())
    name = f"surgeon_kernels_{digest.hexdigest()[:16]}"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root(), name)
    library = folder / f"{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "building.lock"):
            if not library.exists():
                for abandoned in folder.glob("building-*"):
                    shutil.rmtree(abandoned, ignore_errors=True)
                with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as scratch:
                    module = cpp_extension.load(
                        name=name,
                        sources=[str(path) for path in files],
                        extra_cflags=cxx_flags,
                        extra_cuda_cflags=nvcc_flags,
                        extra_include_paths=[str(toolchain.csrc())],
                        extra_ldflags=linker_flags,
                        build_directory=scratch,
                        verbose=os.environ.get("SURGEON_VERBOSE") == "1",
                    )
                    os.replace(Path(scratch, library.name), library)
                    return module
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Context manager of a lock that the operating system releases when this process dies; says when it waits."""
    import fcntl  # not on Windows

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"surgeon-kernels: waiting for another process that builds the CUDA extension in {path.parent}"
            print(message, file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            reason = (
                f"{path} cannot be locked, {error.strerror}; TORCH_EXTENSIONS_DIR may name a folder where files can"
            )
            raise OSError(reason) from error
        yield
