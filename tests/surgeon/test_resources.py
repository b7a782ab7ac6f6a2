from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import psutil
import pytest
import torch

import llm_surgeon.resources
from llm_surgeon.errors import InputError
from llm_surgeon.resources import (
    _group_memory,
    available_memory,
    hub_reachable,
    human_bytes,
    matmul_rate,
    nearest_existing,
    require_disk,
    require_memory,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (13_540_000_000, "13.5 GB"), (999_700_000, "1 GB"),
     (2_500_000_000_000, "2.5 TB"), (1_234_000_000_000_000, "1234 TB")],
)  # fmt: skip
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_require_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5_000_000))
    assert available_memory("cpu") == 5_000_000
    require_memory(5_000_000, torch.device("cpu"))
    with pytest.raises(InputError, match="about 6 MB of memory are needed on cpu and 5 MB are available"):
        require_memory(6_000_000, "cpu")
    with pytest.raises(InputError, match="about 6 MB of memory are needed on cpu for the run in 3 processes and 5 MB"):
        require_memory(2_000_000, "cpu", processes=3)


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_control_groups_of_version_2_limit_memory_and_so_do_those_around_them(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    groups.write_text("0::/slurm/job\n")
    write_group(
        tmp_path / "slurm/job", memory__max="max\n", memory__current="70\n", memory__stat="anon 3\ninactive_file 5\n"
    )
    write_group(
        tmp_path / "slurm", memory__max="1000\n", memory__current="300\n", memory__stat="inactive_file 20\nanon 3\n"
    )
    assert list(_group_memory(tmp_path, groups)) == [720]
    write_group(tmp_path / "slurm/job", memory__max="100\n")
    assert sorted(_group_memory(tmp_path, groups)) == [35, 720]
    groups.write_text("0::/of/the/host\n")  # inside a container: only the root of the tree is there
    assert list(_group_memory(tmp_path, groups)) == []
    write_group(tmp_path, memory__max="500\n", memory__current="100\n", memory__stat="anon 1\n")
    assert list(_group_memory(tmp_path, groups)) == [400]
    assert list(_group_memory(tmp_path, tmp_path / "missing")) == []


def test_control_groups_of_version_1_limit_memory(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    groups.write_text("5:cpu,cpuacct:/x\n4:memory:/docker/abc\n1:name=systemd:/\n")
    files = {
        "memory__limit_in_bytes": "900\n",
        "memory__usage_in_bytes": "400\n",
        "memory__stat": "total_inactive_file 50\n",
    }
    write_group(tmp_path / "memory/docker/abc", **files)
    assert list(_group_memory(tmp_path, groups)) == [550]
    write_group(tmp_path / "memory", **files | {"memory__limit_in_bytes": "9223372036854771712\n"})
    assert min(_group_memory(tmp_path, groups)) == 550


def test_the_smallest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5_000_000))
    monkeypatch.setattr(llm_surgeon.resources, "_group_memory", lambda: [7_000_000, 3_000_000])
    monkeypatch.setattr(llm_surgeon.resources, "_address_space", lambda: [4_000_000])
    assert available_memory("cpu") == 3_000_000
    monkeypatch.setattr(llm_surgeon.resources, "_address_space", lambda: [-1])
    assert available_memory("cpu") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited on Linux alone")
def test_a_limited_address_space_counts() -> None:
    import resource

    read, write = os.pipe()
    if not (child := os.fork()):  # the limit is for this process alone
        try:
            used = psutil.Process().memory_info().vms
            resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, resource.RLIM_INFINITY))
            within = 200_000_000 < available_memory("cpu") <= 300_000_000
            os.write(write, f"{within}\n".encode())
            require_memory(400_000_000, "cpu", "a test")
        except InputError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    lines = os.read(read, 1000).decode().splitlines()
    os.close(read)
    os.close(write)
    assert lines[0] == "True"
    assert lines[1].startswith("about 400 MB of memory are needed on cpu for a test and ")


def test_available_gpu_memory_includes_what_pytorch_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert available_memory("cuda:0") == 130


def test_require_disk_asks_the_nearest_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    usage = namedtuple("usage", "free")

    def disk_usage(path: Path) -> Any:
        asked.append(path)
        return usage(2_000_000)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    require_disk(tmp_path / "new" / "deep", 2_000_000)
    assert asked == [tmp_path.resolve()] == [nearest_existing(tmp_path.resolve() / "new" / "deep")]
    with pytest.raises(InputError, match=r"about 3 MB of disk are needed for .*deep' and 2 MB are available in"):
        require_disk(tmp_path / "new" / "deep", 3_000_000)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, True),
        (urllib.error.HTTPError("u", 403, "no", {}, None), True),  # type: ignore[arg-type]
        (urllib.error.URLError(ssl.SSLError("certificate")), True),
        (urllib.error.URLError(OSError("no route")), False),
        (TimeoutError(), False),
    ],
)
def test_hub_reachable(error: Exception | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(request: urllib.request.Request, timeout: float) -> Any:
        assert request.get_method() == "HEAD" and timeout <= 10
        if error is not None:
            raise error
        return memoryview(b"")  # any context manager

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert hub_reachable() is expected
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub_reachable() is False


def test_matmul_rate_is_a_plausible_rate() -> None:
    assert 1e7 < matmul_rate(torch.device("cpu"), seconds=0.01) < 1e16
