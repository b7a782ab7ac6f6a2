"""csrc/ compiles for every architecture without a GPU, and no kernel spills registers."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from surgeon_kernels.runtime import toolchain

KERNELS = [path for path in toolchain.sources() if path.suffix == ".cu"]
REGISTRATION = [path for path in toolchain.sources() if path.name.endswith(("_ops.cpp", "module.cpp"))]
CSRC = toolchain.csrc()
OPS_HEADER = CSRC / "ops.h"

# Kernels where a spill is known, measured and cheaper than its cure: name of the source file -> bytes allowed.
SPILLS_ALLOWED: dict[str, int] = {}

nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@nvcc
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_kernels_compile_without_spills(source, tmp_path):
    _, flags = toolchain.flags(toolchain.parse_architectures(" ".join(toolchain.ARCHITECTURES))[0])
    log = run(
        "nvcc",
        "-c",
        "-std=c++17",
        "--threads",
        2,
        *flags,
        f"-I{CSRC}",
        "-Xptxas",
        "-v",
        source,
        "-o",
        tmp_path / "kernel.o",
    )
    spilled = [int(amount) for amount in re.findall(r"(\d+) bytes spill stores", log)]
    assert spilled, log
    assert max(spilled) <= SPILLS_ALLOWED.get(source.name, 0), log


@nvcc
@pytest.mark.parametrize(
    ("listed", "architectures"),
    [
        ("9.0", ["90a"]),
        ("7.5;8.0;9.0+PTX", ["80", "90a"]),
        ("8.6+PTX", ["86"]),
        ("12.0", ["120"]),
    ],
)
def test_a_list_of_architectures_compiles_to_their_machine_code(listed, architectures, tmp_path):
    cuobjdump = pytest.importorskip("triton").knobs.nvidia.cuobjdump.path
    built, _ = toolchain.parse_architectures(listed)
    source = CSRC / "linalg" / "chunked_solve_apply.cu"
    run("nvcc", "-c", "-std=c++17", *toolchain.flags(built)[1], f"-I{CSRC}", source, "-o", tmp_path / "kernel.o")
    # Some versions of cuobjdump leave the a of 90a out.
    found = re.findall(r"\.sm_(\d+)a?\.cubin", run(cuobjdump, "--list-elf", tmp_path / "kernel.o"))
    assert found == [architecture.rstrip("a") for architecture in architectures]
    assert [flag.rpartition("sm_")[2] for flag in toolchain.gencode_flags(built)] == architectures
    listed_ptx = subprocess.run([cuobjdump, "--list-ptx", tmp_path / "kernel.o"], capture_output=True, text=True)
    assert "PTX file" not in listed_ptx.stdout


@nvcc
def test_a_list_of_which_nothing_can_be_built():
    assert toolchain.parse_architectures("6.1") == ([], ["6.1 (the kernels need 8.0 or later)"])


@nvcc
def test_registration_agrees_with_torch_and_the_kernels_headers(tmp_path):
    """Sources that include torch's headers are checked against the torch installed, which may be built without CUDA."""
    macros = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"  # a CPU build of torch does not ship it
    macros.parent.mkdir(parents=True)
    macros.touch()
    toolkit = Path(re.search(r"TOP=(\S+)", run("nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null"))[1])
    folders = [CSRC, *cpp_extension.include_paths(), sysconfig.get_paths()["include"], toolkit / "include", tmp_path]
    flags = ["-std=c++20", "-DTORCH_EXTENSION_NAME=_C", *(f"-I{folder}" for folder in folders)]
    flags += toolchain.flags(["8.0", "9.0a"])[0]
    # Torch's headers, which take longer than all that is checked, are read once.
    shared = tmp_path / "torch.h"
    shared.write_text("\n".join(re.findall(r"^#include <.*>$", OPS_HEADER.read_text(), re.MULTILINE)))
    run("c++", *flags, "-x", "c++-header", shared, "-o", f"{shared}.gch")
    assert len(REGISTRATION) >= 5
    for source in REGISTRATION:
        run("c++", "-fsyntax-only", *flags, "-include", shared, source)


def test_kernels_know_nothing_of_torch():
    for path in CSRC.rglob("*.*"):
        if path not in REGISTRATION and not path.name.endswith("ops.h"):
            assert not re.search(r"#include\s*<(torch|ATen|c10|pybind11)/", path.read_text()), path.name
