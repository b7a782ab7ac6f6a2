"""CUDA kernels under compute-sanitizer: no access out of bounds, no race, and right results."""

import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from surgeon_kernels.runtime import extension, toolchain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH"),
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on the PATH"),
]


# A program of small problems, and the sources in csrc/ that it checks.
PROGRAMS = {
    "selection": ["selection/nm_select.cu", "selection/k_cheapest.cu"],
    "chunked_solve": [
        "linalg/chunked_solve_plan.cpp",
        "linalg/chunked_solve_shared.cu",
        "linalg/chunked_solve_factor.cu",
        "linalg/chunked_solve_factored.cu",
        "linalg/chunked_solve_apply.cu",
    ],
    "linear_2_4": [f"sparse24/linear_2_4{part}" for part in (".cpp", "_mma.cu", "_wgmma.cpp", "_unpack.cu")]
    + [f"sparse24/linear_2_4_wgmma_{part}.cu" for part in ("narrow", "middle", "wide", "shared")],
}


REPORTS = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
}
# Program, tool and the program's arguments.
CHECKS = [
    *((program, tool) for program in PROGRAMS for tool in REPORTS if (program, tool) != ("linear_2_4", "racecheck")),
    ("linear_2_4", "racecheck", "mma"),
    pytest.param(
        ("linear_2_4", "racecheck", "wgmma"),
        marks=pytest.mark.skip(
            reason="racecheck does not follow the copy engine's barriers: it takes the arrival of W for a race "
            "with its reads in linear_2_4_wgmma"
        ),
    ),
]


def build(program, architectures, folder):
    target, tests = folder / program, Path(__file__).parent
    sources = [*tests.glob(f"*/{program}_sanitized.cu"), *(toolchain.csrc() / name for name in PROGRAMS[program])]
    flags = [*toolchain.flags(architectures)[1], "--threads", "0"]
    subprocess.run(
        ["nvcc", "-std=c++17", *flags, f"-I{toolchain.csrc()}", f"-I{tests}", *sources, "-o", target], check=True
    )
    return target


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A program, built on first use for the devices of this machine."""
    folder = tmp_path_factory.mktemp("sanitized")
    return functools.cache(lambda program: build(program, extension.built_architectures(), folder))


@pytest.mark.parametrize("check", CHECKS, ids=" ".join)
def test_nothing_is_found(built, check):
    program, tool, *arguments = check
    command = ["compute-sanitizer", "--tool", tool, built(program), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0 and "0 wrong" in done.stdout and REPORTS[tool] in done.stdout, done.stdout[-2000:]


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="kernels on wgmma are for 9.0"
)
def test_a_build_without_wgmma_runs_the_other_kernels(built, tmp_path):
    """For 9.0 instead of 9.0a: what is not there is not run, and what is there is right."""
    without = build("linear_2_4", ["9.0"], tmp_path)
    ran = [subprocess.run(each, capture_output=True, text=True).stdout for each in ([without], [without, "mma"])]
    assert ran[0] == ran[1] and ran[0].endswith(" ran, 0 wrong\n")
    both = subprocess.run([built("linear_2_4")], capture_output=True, text=True).stdout
    assert int(both.split()[0]) > int(ran[0].split()[0]) > 0
