from __future__ import annotations

import ssl
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

from llm_surgeon.errors import InputError
from llm_surgeon.resources import (
    available_memory,
    hub_reachable,
    human_bytes,
    matmul_rate,
    nearest_existing,
    parse_bytes,
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GB", 24 * 10**9),
        ("22.5 GiB", 22.5 * 2**30),
        ("500M", 5 * 10**8),
        ("1024", 1024),
        (4096, 4096),
        ("1kB", 1000),
    ],
)
def test_parse_bytes(text: str | int, expected: float) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "24 parsecs", "-1GB", "1e9"])
def test_no_amount_of_memory(text: str) -> None:
    with pytest.raises(InputError, match="is no amount of memory"):
        parse_bytes(text)


def test_matmul_rate_is_a_plausible_rate() -> None:
    assert 1e7 < matmul_rate(torch.device("cpu"), seconds=0.01) < 1e16
