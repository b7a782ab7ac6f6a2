"""CUDA kernels under compute-sanitizer: no access out of bounds, no race, and right results."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from surgeon_kernels import extension

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH"),
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on the PATH"),
]


# A program of small problems, and the sources in csrc/ that it checks.
PROGRAMS = {
    "selection": ["nm_select.cu", "cost_threshold.cu"],
    "chunked_solve": [
        "chunked_solve_plan.cpp",
        "chunked_solve_shared.cu",
        "chunked_solve_factor.cu",
        "chunked_solve_factored.cu",
        "chunked_solve_apply.cu",
    ],
    "linear_2_4": ["linear_2_4.cpp", "linear_2_4_mma.cu", "linear_2_4_wgmma.cu"],
}


# racecheck reports the first units of W and their reads, which a barrier of the copy engine orders.
NOT_FOLLOWED = {("linear_2_4", "racecheck")}


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request, tmp_path_factory):
    csrc = extension.sources()[0].parent
    target = tmp_path_factory.mktemp("sanitized") / request.param
    sources = [Path(__file__).with_name(f"{request.param}_sanitized.cu")]
    sources += [csrc / name for name in PROGRAMS[request.param]]
    flags = [*extension.flags(extension.built_architectures())[1], "--threads", "0"]
    subprocess.run(["nvcc", "-std=c++17", *flags, f"-I{csrc}", *sources, "-o", target], check=True)
    return target


@pytest.mark.parametrize(
    "tool, report",
    [
        ("memcheck", "ERROR SUMMARY: 0 errors"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
    ],
)
def test_nothing_is_found(program, tool, report):
    if (program.name, tool) in NOT_FOLLOWED:
        pytest.skip(f"{tool} does not follow every barrier of the copy engine")
    command = ["compute-sanitizer", "--tool", tool, program]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0 and "0 wrong" in done.stdout and report in done.stdout, done.stdout[-2000:]
