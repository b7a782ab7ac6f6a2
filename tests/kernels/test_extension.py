import warnings

import pytest
import torch

from surgeon_kernels import extension


@pytest.fixture
def fresh(monkeypatch):
    """As in a new process with a CUDA device and no ahead-of-time build."""
    extension._load.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension, "ahead_of_time", lambda: False)
    monkeypatch.delenv("SURGEON_CUDA", raising=False)
    yield monkeypatch
    extension._load.cache_clear()


def tools(monkeypatch, *present):
    monkeypatch.setattr(extension.shutil, "which", lambda name, path=None: name if name in present else None)


def test_without_a_device_there_is_no_extension_and_no_warning(fresh):
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not extension.available()
    assert extension.obstacle() == "torch finds no CUDA device"


@pytest.mark.parametrize(("present", "missing"), [((), "nvcc"), (("nvcc",), "ninja")])
def test_a_missing_tool_is_said_once(fresh, present, missing):
    tools(fresh, *present)
    with pytest.warns(UserWarning, match=f"{missing} is not on the PATH; the PyTorch references run instead"):
        assert not extension.available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not extension.available()


def test_a_failing_build_is_said_and_the_references_run(fresh):
    tools(fresh, "nvcc", "ninja")

    def fail():
        raise RuntimeError("nvcc exited with 1")

    fresh.setattr(extension, "_build", fail)
    with pytest.warns(UserWarning, match=r"could not be built or loaded: nvcc exited with 1"):
        assert not extension.available()


def test_switched_off_silently(fresh):
    fresh.setenv("SURGEON_CUDA", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not extension.available()
    assert extension.obstacle() == "switched off by SURGEON_CUDA=0"


def test_it_is_built_once_for_the_devices_found(fresh):
    built = []
    tools(fresh, "nvcc", "ninja")
    fresh.setattr(extension, "_build", lambda: built.append(True))
    assert extension.available() and extension.available()
    assert built == [True]
    fresh.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    fresh.setattr(torch.cuda, "device_count", lambda: 3)
    fresh.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (8, 0), (9, 0)][index])
    assert extension._architectures() == ["8.0", "9.0a"]
    fresh.setenv("TORCH_CUDA_ARCH_LIST", "8.9;10.0")
    assert extension._architectures() == ["8.9", "10.0"]


def test_flags_name_machine_code_only():
    assert extension.gencode_flags(["8.0", "9.0a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


def test_the_sources_are_found():
    names = [path.name for path in extension.sources()]
    assert {"module.cpp", "nm_select_ops.cpp", "nm_select.cu"} <= set(names)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_ops_are_registered():
    assert extension.available(), extension.obstacle()
    assert torch.ops.surgeon_kernels.nm_select is not None
