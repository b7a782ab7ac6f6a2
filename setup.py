"""Everything static is in pyproject.toml. Here: the CUDA extension, built ahead of time when SURGEON_CUDA=1 (it needs
nvcc and the torch that is installed, so `pip install --no-build-isolation`), and csrc/ inside the package, so that an
installed copy can build it on first use."""

import importlib.util
import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildPy(build_py):
    """Copies csrc/ into the built package."""

    def run(self):
        super().run()
        if not self.editable_mode:
            copy = Path(self.build_lib, "surgeon_kernels", "csrc")
            # Sources that an earlier build left in build/, since renamed, would be compiled as well.
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", copy)


def cuda_extension():
    """The extension `surgeon_kernels._C` and the command that builds it, for every architecture nvcc can, or those of
    TORCH_CUDA_ARCH_LIST."""
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    # Loaded by path: importing the package would import what is being built.
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "surgeon_kernels" / "runtime" / "toolchain.py")
    toolchain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toolchain)
    cxx_flags, nvcc_flags = toolchain.flags(toolchain.architectures())
    module = CUDAExtension(
        "surgeon_kernels._C",
        [str(path.relative_to(ROOT)) for path in toolchain.sources()],
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
        include_dirs=[str(toolchain.csrc())],
        extra_link_args=toolchain.linker_flags(),
    )
    return {"ext_modules": [module], "cmdclass": {"build_py": BuildPy, "build_ext": BuildExtension}}


setup(**(cuda_extension() if os.environ.get("SURGEON_CUDA") == "1" else {"cmdclass": {"build_py": BuildPy}}))
