"""The CUDA extension: found ahead of time, or built by ninja on first use and cached.

`csrc/*.cu` are CUDA kernels free of torch headers, `csrc/*_ops.cpp` make ``torch.ops.surgeon_kernels.*`` run them.
Which implementation an op runs is one rule: CUDA tensors run the extension's kernel where it is `available` for their
device, and the PyTorch reference everywhere else. Importing this module builds nothing and touches no device.

Architectures are named as in ``8.0`` and ``9.0a``. The kernels need 8.0 or later. On 9.0 they use instructions that
only the architecture-specific target 9.0a has (wgmma), so 9.0 always means 9.0a. No kernel uses such features of other
architectures: these are built as the portable target, which also runs on later devices of the same major.
Machine code only: ``+PTX`` embeds no PTX.

Environment: ``SURGEON_CUDA=0`` never uses the extension; ``TORCH_EXTENSIONS_DIR`` is where builds are cached;
``TORCH_CUDA_ARCH_LIST`` overrides the architectures, written as PyTorch takes them (``8.0;9.0+PTX``, ``Hopper``).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

# Of an ahead-of-time build, as far as nvcc compiles for them.
ARCHITECTURES = ("8.0", "8.9", "9.0a", "10.0", "12.0")
# Of the instructions that csrc/ uses without an alternative: cp.async, mma of bf16 and tf32, mma.sp.
OLDEST = (8, 0)
# As PyTorch expands them.
GENERATIONS = {
    "Maxwell": "5.0 5.2",
    "Maxwell+Tegra": "5.3",
    "Pascal": "6.0 6.1",
    "Volta": "7.0",
    "Volta+Tegra": "7.2",
    "Turing": "7.5",
    "Ampere": "8.0 8.6",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9",
    "Hopper": "9.0",
    "Blackwell": "10.0 10.3 12.0 12.1",
    "Blackwell+Tegra": "11.0",
}
COMPILER_FLAGS = ["-O3"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]

_SEPARATORS = ";, \t\n"
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


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """True if a device of ``capability`` runs machine code for ``architecture``, by CUDA's binary compatibility.

    The same major, and a minor of the device that is at least the code's; code for an architecture-specific target
    (9.0a) and code on or for 8.7, an integrated GPU, need the very same.
    """
    built = _number(architecture)
    if architecture.endswith("a") or (8, 7) in (built, capability):
        return built == capability
    return built[0] == capability[0] and built[1] <= capability[1]


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
    if not sources():
        return "the sources in csrc/ are not installed"
    if nvcc() is None:
        return f"nvcc is not in {_cuda_home()}/bin" if _cuda_home() else "nvcc is not on the PATH"
    if shutil.which("ninja", path=_path()) is None:
        return "ninja is not on the PATH"
    return None


def nvcc() -> str | None:
    """The nvcc that builds use, as PyTorch looks for it: that of ``CUDA_HOME`` or ``CUDA_PATH``, or on the PATH."""
    return shutil.which("nvcc", path=os.path.join(_cuda_home(), "bin") if _cuda_home() else _path())


def sources() -> list[Path]:
    """C++ and CUDA sources of the extension, beside the package in a checkout or inside an installed one."""
    return sorted(path for path in csrc().rglob("*.*") if path.suffix in {".cpp", ".cu"})


def csrc() -> Path:
    """The folder of the sources, which includes are relative to; it need not be there."""
    package = Path(__file__).resolve().parents[1]
    inside, beside = package / "csrc", package.parent / "csrc"
    return inside if inside.is_dir() else beside


def parse_architectures(listed: str) -> tuple[list[str], list[str]]:
    """Architectures to build, of a list in the syntax of ``TORCH_CUDA_ARCH_LIST``, given the nvcc of this machine.

    Entries are separated by ``;``, ``,`` or spaces: ``8.0``, ``9.0a``, ``9.0+PTX``, or a generation (``Hopper``).

    Returns:
        Architectures in ascending order, ``9.0`` as ``9.0a``; and the entries left out, each with the reason.
    """
    found, dropped = set(), []
    for entry in re.split(f"[{_SEPARATORS}]+", listed.strip(_SEPARATORS)):
        for name in GENERATIONS.get(entry.removesuffix("+PTX"), entry).split():
            version = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
            if version is None:
                dropped.append(f"{entry!r} (not an architecture)")
                continue
            number = int(version[1]), int(version[2])
            if number < OLDEST:
                dropped.append(f"{entry} (the kernels need {_text(OLDEST)} or later)")
            elif number not in _toolkit():
                dropped.append(f"{entry} (this nvcc does not compile for it)")
            else:
                found.add(number)
    return [_text(number) for number in sorted(found)], list(dict.fromkeys(dropped))


def architectures(devices: Iterable[tuple[int, int]] | None = None) -> list[str]:
    """Architectures to build for: ``TORCH_CUDA_ARCH_LIST`` where it is set, otherwise ``devices`` or `ARCHITECTURES`.

    Entries that cannot be built are left out, and a warning names them; of `ARCHITECTURES`, in silence.

    Raises:
        RuntimeError: nothing is left.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(_SEPARATORS)
    source = "TORCH_CUDA_ARCH_LIST"
    if not listed or listed == "native":
        source = "the devices found" if devices is not None else "the architectures of the kernels"
        listed = " ".join(ARCHITECTURES if devices is None else map(_for_device, sorted(set(devices))))
    found, dropped = parse_architectures(listed)
    left_out = f"of {source}, the CUDA extension is not built for {', '.join(dropped)}"
    if not found:
        raise RuntimeError(f"{left_out}; nothing is left to build")
    if dropped and source != "the architectures of the kernels":
        warnings.warn(left_out, stacklevel=2)
    return found


def gencode_flags(architectures: Iterable[str]) -> list[str]:
    """nvcc's ``-gencode`` flags: machine code for every architecture such as ``9.0a``, and no PTX."""
    numbers = [architecture.replace(".", "") for architecture in architectures]
    return [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]


def flags(architectures: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags of the C++ compiler and of nvcc, which also bake the list into what is built (csrc/architectures.h)."""
    baked = f"-DSURGEON_ARCHITECTURES={':'.join(architectures)}"  # at commas nvcc would split it
    return [*COMPILER_FLAGS, baked], [*NVCC_FLAGS, baked, *gencode_flags(architectures)]


def linker_flags() -> list[str]:
    """The shared C++ library that PyTorch runs with, by its path, ahead of what the compiler would link.

    A toolchain that has only a static libstdc++ links that, without a word. The process then has two, which number the
    parts of their locales differently: the first number written into an error message would crash it.
    """
    maps = Path("/proc/self/maps")  # Linux
    loaded = re.search(r"/.*/libstdc\+\+\.so\.6.*$", maps.read_text(), re.MULTILINE) if maps.exists() else None
    return [] if loaded is None else [loaded[0]]


@functools.cache
def _toolkit() -> frozenset[tuple[int, int]]:
    """The architectures that nvcc compiles for."""
    command = [nvcc() or "nvcc", "--list-gpu-code"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return frozenset((int(major), int(minor)) for major, minor in re.findall(r"sm_(\d+)(\d)\b", listed))


def _for_device(capability: tuple[int, int]) -> str:
    """The closest architecture of nvcc's that the device runs, which may be newer than nvcc; else the device's own."""
    return _text(max((able for able in _toolkit() if runs_on(_text(able), capability)), default=capability))


def _number(architecture: str) -> tuple[int, int]:
    major, minor = architecture.rstrip("a").split(".")
    return int(major), int(minor)


def _text(number: tuple[int, int]) -> str:
    return "{}.{}".format(*number) + ("a" if number == (9, 0) else "")


@functools.cache
def _holds(built: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """True if a device of ``capability`` is served; warns if not."""
    if any(runs_on(architecture, capability) for architecture in built):
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


def _cuda_home() -> str:
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or ""


def _path() -> str:
    """The PATH with this environment's scripts first: ninja is there also when the environment is not activated."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def _build() -> ModuleType:
    """Build for the devices of this machine, or import what another process built.

    The library is named by what determines it, compiled in a folder of its own and moved into place in one step: a
    build that dies leaves nothing behind that a later process would load or wait for.
    """
    os.environ["PATH"] = _path()
    from torch.utils import cpp_extension  # imports setuptools: only when something is built

    devices = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    cxx_flags, nvcc_flags = flags(architectures(devices))
    files = sources()
    digest = hashlib.sha256(
        "\n".join([*nvcc_flags, *cxx_flags, *linker_flags(), torch.__version__, *_compilers()]).encode()
    )
    for path in [*files, *sorted(csrc().rglob("*.h")), *sorted(csrc().rglob("*.cuh"))]:
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
                        extra_include_paths=[str(csrc())],
                        extra_ldflags=linker_flags(),
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


def _compilers() -> list[str]:
    """All else that determines a build: versions of compilers and Python, and variables that the compilers read."""
    found = [sysconfig.get_config_var("EXT_SUFFIX")]
    for command in ([nvcc() or "nvcc"], shlex.split(os.environ.get("CXX", "c++"))):
        found.append(subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout)
    variables = ("CC", "CXX", "PYTORCH_NVCC", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    return found + [f"{name}={os.environ.get(name, '')}" for name in variables]


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
