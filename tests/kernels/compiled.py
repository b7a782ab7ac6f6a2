"""Compiles kernels for a GPU that need not be there, and reads what ptxas says of them."""

import importlib.metadata
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # bytes that a block may have


class Compiled(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int
    log: str
    ptx: str
    sass: str


def compile_kernel(kernel, signature, constants, capability, *, warps, stages, divisible_by_16=()):
    """Compile for ``sm_<capability>``; ``divisible_by_16`` names pointers and sizes that the launcher keeps so."""
    names = kernel.arg_names
    aligned = [
        (names.index(name), *part)
        for name in divisible_by_16
        for part in ([(i,) for i in range(len(signature[name]))] if isinstance(signature[name], tuple) else [()])
    ]
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name in constants else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    log, sass = _assemble(ptx, capability)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert registers and spills, log
    return Compiled(int(registers[1]), sum(map(int, spills)), compiled.metadata.shared, log, ptx, sass)


def check_resources(compiled, capability, spilled=0):
    """No spills but for a few bytes, shared memory that a block may have, and no wgmma that waits for the one before
    it."""
    old = importlib.metadata.version("triton").startswith("3.6.")
    # Triton 3.6 spills a little with the addresses of a dense output on Hopper.
    assert compiled.spilled_bytes <= (224 if old and capability == 90 else spilled), compiled.log
    assert compiled.shared_bytes <= SHARED_MEMORY[capability]
    assert "serialized" not in compiled.log, compiled.log


def _assemble(ptx, capability):
    """ptxas's report and the machine code, disassembled."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        report = _run(get_ptxas(capability).path, "-v", "-O3", f"--gpu-name={arch}", source, "-o", cubin)
        return report, _run(knobs.nvidia.cuobjdump.path, "--dump-sass", cubin)


def _run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
