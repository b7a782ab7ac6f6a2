"""The host side of the 2:4 linear, and which of its kernels a build holds, without a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from triton import knobs

from surgeon_kernels.runtime import toolchain

CSRC = toolchain.csrc() / "sparse24"
HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def flags():
    toolkit = Path(re.search(r"TOP=(\S+)", run("nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null"))[1])
    return ["-std=c++17", f"-I{toolkit / 'include'}", f"-I{CSRC.parent}"]


def test_kernels_are_chosen_among_those_that_the_build_holds(flags, tmp_path):
    program = tmp_path / "dispatch"
    run("c++", *flags, HERE / "linear_2_4_dispatch.cpp", CSRC / "linear_2_4.cpp", "-o", program)
    assert run(program) == "0 wrong\n"


def test_cusparselt_plans_are_bounded_and_not_made_in_a_capture(flags, tmp_path):
    library, program = tmp_path / "libcusparseLt.so.0", tmp_path / "plans"
    run("c++", *flags, "-shared", "-fPIC", HERE / "linear_2_4_plans_library.cpp", "-o", library)
    sources = [HERE / "linear_2_4_plans.cpp", CSRC / "linear_2_4_cusparselt.cpp"]
    run("c++", *flags, *sources, library, "-ldl", f"-Wl,-rpath,{tmp_path}", "-o", program)
    assert run(program) == "0 wrong\n"


@pytest.mark.parametrize(("architecture", "held"), [("90", False), ("90a", True), ("100", False)])
def test_a_kernel_on_wgmma_without_its_instructions_traps_and_is_known_by_its_threads(architecture, held, tmp_path):
    """Held: what multiplies is there, for 512 threads. Not held: a trap, for 32, fewer than prepare_kernel asks for."""
    source, cubin = tmp_path / "kernel.cu", tmp_path / "kernel.cubin"
    source.write_text(
        '#include "sparse24/linear_2_4_wgmma.cuh"\n'
        "using Config = surgeon::WgmmaConfig<32, 3, 6, 2, 5>;\n"
        "template __global__ void surgeon::linear_2_4_wgmma<__nv_bfloat16, Config>"
        "(surgeon::Linear24, surgeon::TileRange24, const __grid_constant__ CUtensorMap);\n"
    )
    gencode = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    log = run(
        "nvcc",
        "-std=c++17",
        *toolchain.NVCC_FLAGS,
        gencode,
        f"-I{CSRC.parent}",
        "-Xptxas=-v",
        "-cubin",
        source,
        "-o",
        cubin,
    )
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    code = run(knobs.nvidia.cuobjdump.path, "-sass", cubin)
    threads = re.search(
        r"EIATTR_MAX_THREADS\s.*?Value:\s*(0x\w+)", run(knobs.nvidia.cuobjdump.path, "-elf", cubin), re.S
    )
    if held:
        assert "HGMMA" in code and registers == 128
    else:
        assert "HGMMA" not in code and "BPT.TRAP" in code and registers <= 32
    assert int(threads[1], 16) == (512 if held else 32)
