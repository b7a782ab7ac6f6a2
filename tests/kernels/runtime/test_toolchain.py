"""Architectures, flags and compilers of the CUDA extension."""

import runpy
import warnings
from pathlib import Path

import pytest
import setuptools
from torch.utils import cpp_extension

from surgeon_kernels.runtime import toolchain

OLD = "the kernels need 8.0 or later"


@pytest.mark.parametrize(
    ("listed", "built", "dropped"),
    [
        ("9.0", ["9.0a"], []),
        ("9.0a", ["9.0a"], []),
        ("9.0;9.0a+PTX", ["9.0a"], []),
        ("7.5;8.0;9.0+PTX", ["8.0", "9.0a"], [f"7.5 ({OLD})"]),
        ("8.9, 8.6 12.0;", ["8.6", "8.9", "12.0"], []),
        ("10.0a 12.0f 12.1", ["10.0", "12.0", "12.1"], []),
        ("8.6+PTX", ["8.6"], []),
        ("6.1", [], [f"6.1 ({OLD})"]),
        ("Hopper", ["9.0a"], []),
        ("Ampere+PTX;Turing", ["8.0", "8.6"], [f"Turing ({OLD})"]),
        ("Ampere+Tegra", ["8.7"], []),
        ("Pascal 8.0", ["8.0"], [f"Pascal ({OLD})"]),
        ("Blackwell", ["10.0", "10.3", "12.0", "12.1"], []),
        ("8.0 13.0", ["8.0"], ["13.0 (this nvcc does not compile for it)"]),
        ("8.0 sm_90", ["8.0"], ["'sm_90' (not an architecture)"]),
    ],
)
def test_a_list_of_architectures(toolkit, listed, built, dropped):
    assert toolchain.parse_architectures(listed) == (built, dropped)


def test_what_cannot_be_built_is_said_and_the_rest_is_built(toolkit):
    toolkit.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0;9.0+PTX")
    with pytest.warns(UserWarning, match=r"of TORCH_CUDA_ARCH_LIST, .* is not built for 7\.5 \(the kernels need 8\.0"):
        assert toolchain.architectures() == ["8.0", "9.0a"]
    toolkit.setenv("TORCH_CUDA_ARCH_LIST", "6.1")
    with pytest.raises(RuntimeError, match=r"6\.1 \(the kernels need 8\.0 or later\); nothing is left to build"):
        toolchain.architectures()


def test_without_a_list_the_devices_or_the_default_count(toolkit):
    assert toolchain.architectures([(9, 0), (8, 0), (9, 0)]) == ["8.0", "9.0a"]
    assert toolchain.architectures() == ["8.0", "8.9", "9.0a", "10.0", "12.0"]
    with pytest.warns(UserWarning, match=r"of the devices found, .* is not built for 6\.1 \(the kernels need 8\.0"):
        assert toolchain.architectures([(6, 1), (8, 6)]) == ["8.6"]
    toolkit.setenv("TORCH_CUDA_ARCH_LIST", " ;")
    assert toolchain.architectures([(9, 0)]) == ["9.0a"]
    toolkit.setenv("TORCH_CUDA_ARCH_LIST", "8.9;10.0")
    assert toolchain.architectures([(9, 0)]) == toolchain.architectures() == ["8.9", "10.0"]


def test_an_older_nvcc_builds_what_it_can(toolkit):
    toolkit.setattr(toolchain, "_toolkit", lambda: {(8, 0), (9, 0), (12, 0)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert toolchain.architectures() == ["8.0", "9.0a", "12.0"]
        assert toolchain.architectures([(12, 1), (8, 9)]) == ["8.0", "12.0"]  # which these devices run
    with pytest.raises(RuntimeError, match=r"10\.0 \(this nvcc does not compile for it\); nothing is left"):
        toolchain.architectures([(10, 0)])


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(8, 7), (7, 5), (9, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (8, 7)]),
        ("8.7", [(8, 7)], [(8, 9)]),
        ("9.0a", [(9, 0)], [(10, 0), (8, 9)]),
        ("10.0", [(10, 0), (10, 3)], [(12, 0), (11, 0)]),
        ("12.0", [(12, 0), (12, 1)], [(10, 0)]),
        ("12.1", [(12, 1)], [(12, 0)]),
    ],
)
def test_which_devices_run_machine_code(architecture, runs, does_not):
    assert all(toolchain.runs_on(architecture, capability) for capability in runs)
    assert not any(toolchain.runs_on(architecture, capability) for capability in does_not)


@pytest.mark.skipif(toolchain.nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize(
    ("listed", "built"),
    [
        ("9.0", ["9.0a"]),
        ("8.0;9.0+PTX", ["8.0", "9.0a"]),
        ("", toolchain.parse_architectures(" ".join(toolchain.ARCHITECTURES))[0] if toolchain.nvcc() else []),
    ],
)
def test_an_ahead_of_time_build_takes_the_same_list(listed, built, monkeypatch):
    found = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(Path(toolchain.nvcc()).parents[1]))
    monkeypatch.setenv("SURGEON_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    root = Path(toolchain.__file__).parents[2]
    runpy.run_path(str(root / "setup.py"))
    cxx, nvcc = toolchain.flags(built)
    (module,) = found["ext_modules"]
    assert module.extra_compile_args == {"cxx": cxx, "nvcc": nvcc}
    assert [root / source for source in module.sources] == toolchain.sources()
    assert str(toolchain.csrc()) in module.include_dirs
    assert f"-DSURGEON_ARCHITECTURES={':'.join(built)}" in cxx


def test_flags_name_machine_code_only():
    assert toolchain.gencode_flags(["8.0", "9.0a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


def test_the_sources_are_found():
    names = [path.name for path in toolchain.sources()]
    assert {"module.cpp", "nm_select_ops.cpp", "nm_select.cu"} <= set(names)
    assert len(set(names)) == len(names)  # ninja names objects after them, without their folders


def test_the_sources_of_others_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "csrc", lambda: tmp_path)
    (tmp_path / "kernel.cu").touch()
    assert toolchain.sources() == []


@pytest.mark.skipif(toolchain.nvcc() is None, reason="there is no nvcc")
def test_another_compiler_is_another_build(toolkit, tmp_path):
    before = toolchain.compilers()
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho another 1.0\n")
    compiler.chmod(0o755)
    toolkit.setenv("CXX", str(compiler))
    assert "another 1.0\n" in toolchain.compilers() and "another 1.0\n" not in before
    toolkit.delenv("CXX")
    toolkit.setenv("NVCC_APPEND_FLAGS", "-G")
    assert toolchain.compilers() != before
    assert any("release" in line for line in before)  # nvcc's version
