"""The CUDA extension: when it is built, loaded and used."""

import contextlib
import errno
import fcntl
import multiprocessing
import re
import shutil
import time
import types
import warnings

import pytest
import torch

from surgeon_kernels.runtime import extension, toolchain


@pytest.fixture
def fresh(monkeypatch):
    """As in a new process with a CUDA device and no ahead-of-time build."""
    extension._load.cache_clear()
    extension._holds.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension, "ahead_of_time", lambda: False)
    for name in ("SURGEON_CUDA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    extension._load.cache_clear()
    extension._holds.cache_clear()


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


def holding(*architectures):
    return types.SimpleNamespace(architectures=":".join(architectures))


def test_it_is_built_once(fresh):
    built = []
    tools(fresh, "nvcc", "ninja")
    fresh.setattr(extension, "_build", lambda: built.append(True) or holding("8.0", "9.0a"))
    assert extension.available() and extension.available()
    assert extension.built_architectures() == ("8.0", "9.0a")
    assert built == [True]


def test_of_several_devices_those_with_machine_code_are_served(fresh):
    """One GPU served, another not: said once, for the kind of device."""
    tools(fresh, "nvcc", "ninja")
    fresh.setattr(extension, "_build", lambda: holding("8.0", "9.0a"))
    capabilities = [(9, 0), (12, 0), (8, 9), (12, 0)]
    fresh.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    h200, rtx, ada, rtx_too = (torch.device("cuda", index) for index in range(4))
    assert extension.available() and extension.available(h200) and extension.available(ada)
    assert not extension.available(torch.device("cpu"))
    with pytest.warns(UserWarning, match=r"no machine code for devices of capability 12\.0, only for 8\.0, 9\.0a; the"):
        assert not extension.available(rtx)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not extension.available(rtx) and not extension.available(rtx_too)
        assert extension.available(h200)


MODULE = """
#include <Python.h>
#include "architectures.h"
#define INIT_(name) PyInit_##name
#define INIT(name) INIT_(name)
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "stand-in"};
extern "C" __attribute__((visibility("default"))) PyObject* INIT(TORCH_EXTENSION_NAME)() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddStringConstant(module, "architectures", surgeon::kArchitectures.data());
  return module;
}
"""


COMPILER = """#!/bin/sh
case " $* " in *" -c "*) echo $$ >> compiled; while [ -e hold ]; do sleep 0.02; done ;; esac
exec c++ "$@"
"""


@pytest.fixture
def builds(toolkit, tmp_path):
    """Real builds, each in a process of its own, of a module that stands for the extension: `start(name)` starts one.

    What a build holds is in the file of that name, what it said in the one with the suffix .err.
    """
    csrc, cache = tmp_path / "csrc", tmp_path / "cache"
    csrc.mkdir()
    shutil.copy(toolchain.csrc() / "architectures.h", csrc)
    (csrc / "module.cpp").write_text(MODULE)
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.replace("hold", f"{tmp_path}/hold").replace(">> compiled", f">> {tmp_path}/compiled"))
    compiler.chmod(0o755)
    toolkit.setenv("CXX", str(compiler))
    toolkit.setenv("TORCH_EXTENSIONS_DIR", str(cache))
    toolkit.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0")
    toolkit.setattr(toolchain, "sources", lambda: [csrc / "module.cpp"])
    toolkit.setattr(torch.cuda, "device_count", lambda: 0)  # which a forked process cannot ask more about

    def build(name):
        with (tmp_path / f"{name}.err").open("w") as said, contextlib.redirect_stderr(said):
            (tmp_path / name).write_text(extension._build().architectures)

    started = []

    def start(name):
        started.append(multiprocessing.get_context("fork").Process(target=build, args=(name,)))
        started[-1].start()
        return started[-1]

    yield start
    (tmp_path / "hold").unlink(missing_ok=True)
    for process in started:
        process.kill()
        process.join()


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def compilations(folder):
    return len((folder / "compiled").read_text().split()) if (folder / "compiled").exists() else 0


@pytest.mark.skipif(toolchain.nvcc() is None, reason="there is no nvcc")
def test_a_build_killed_half_way_holds_up_no_other(builds, tmp_path):
    (tmp_path / "hold").touch()
    killed = builds("killed")
    wait_for(lambda: compilations(tmp_path) == 1)
    killed.kill()  # its compiler lives on
    killed.join()
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.glob("building-*"))) == 1
    following = builds("following")
    wait_for(lambda: compilations(tmp_path) == 2)
    (tmp_path / "hold").unlink()
    following.join(60)
    assert following.exitcode == 0
    assert (tmp_path / "following").read_text() == "8.0:9.0a"
    assert (tmp_path / "following.err").read_text() == ""
    assert sorted(path.name for path in folder.iterdir()) == ["building.lock", f"{folder.name}.so"]


@pytest.mark.skipif(toolchain.nvcc() is None, reason="there is no nvcc")
def test_two_processes_build_once(builds, tmp_path):
    (tmp_path / "hold").touch()
    first = builds("first")
    wait_for(lambda: compilations(tmp_path) == 1)
    second = builds("second")
    said = tmp_path / "second.err"
    wait_for(lambda: said.exists() and "waiting for another process that builds" in said.read_text())
    (tmp_path / "hold").unlink()
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "first").read_text() == (tmp_path / "second").read_text() == "8.0:9.0a"
    assert compilations(tmp_path) == 1


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    message = f"{tmp_path}/lock cannot be locked, No locks available; TORCH_EXTENSIONS_DIR may name"
    with pytest.raises(OSError, match=re.escape(message)), extension._locked(tmp_path / "lock"):
        raise AssertionError


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_ops_are_registered():
    assert extension.available(), extension.obstacle()
    assert torch.ops.surgeon_kernels.nm_select is not None
