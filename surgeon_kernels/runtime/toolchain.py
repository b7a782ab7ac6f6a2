"""Sources, compilers, architectures and flags of the CUDA extension.

Architectures are named as in ``8.0`` and ``9.0a``. The kernels need 8.0 or later. On 9.0 they use instructions that
only the architecture-specific target 9.0a has (wgmma), so 9.0 always means 9.0a. No kernel uses such features of other
architectures: these are built as the portable target, which also runs on later devices of the same major.
Machine code only: ``+PTX`` embeds no PTX. ``TORCH_CUDA_ARCH_LIST`` overrides the architectures, written as PyTorch
takes them (``8.0;9.0+PTX``, ``Hopper``).

Imports neither torch nor the package: setup.py loads this file by its path.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

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


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """True if a device of ``capability`` runs machine code for ``architecture``, by CUDA's binary compatibility.

    The same major, and a minor of the device that is at least the code's; code for an architecture-specific target
    (9.0a) and code on or for 8.7, an integrated GPU, need the very same.
    """
    built = _number(architecture)
    if architecture.endswith("a") or (8, 7) in (built, capability):
        return built == capability
    return built[0] == capability[0] and built[1] <= capability[1]


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


def sources() -> list[Path]:
    """C++ and CUDA sources of the extension, beside the package in a checkout or inside an installed one."""
    if not (csrc() / "module.cpp").is_file():  # missing, or another project's
        return []
    return sorted(path for path in csrc().rglob("*.*") if path.suffix in {".cpp", ".cu"})


def csrc() -> Path:
    """The folder of the sources, which includes are relative to; it need not be there."""
    package = Path(__file__).resolve().parents[1]
    inside, beside = package / "csrc", package.parent / "csrc"
    return inside if inside.is_dir() else beside


def nvcc() -> str | None:
    """The nvcc that builds use, as PyTorch looks for it: that of ``CUDA_HOME`` or ``CUDA_PATH``, or on the PATH."""
    return shutil.which("nvcc", path=os.path.join(cuda_home(), "bin") if cuda_home() else search_path())


def cuda_home() -> str:
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or ""


def search_path() -> str:
    """The PATH with this environment's scripts first: ninja is there also when the environment is not activated."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def compilers() -> list[str]:
    """All else that determines a build: versions of compilers and Python, and variables that the compilers read."""
    found = [sysconfig.get_config_var("EXT_SUFFIX")]
    for command in ([nvcc() or "nvcc"], shlex.split(os.environ.get("CXX", "c++"))):
        found.append(subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout)
    variables = ("CC", "CXX", "PYTORCH_NVCC", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    return found + [f"{name}={os.environ.get(name, '')}" for name in variables]


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
