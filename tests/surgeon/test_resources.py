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

import llm_surgeon.resources
from llm_surgeon.config import PruneConfig
from llm_surgeon.errors import InputError
from llm_surgeon.models import find_decoder
from llm_surgeon.resources import (
    available_memory,
    estimate,
    hub_reachable,
    human_bytes,
    matmul_rate,
    nearest_existing,
    require_disk,
    require_memory,
    windows_per_pass,
)
from tests.surgeon.tiny_models import build


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


def estimate_of(name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    monkeypatch.setattr(llm_surgeon.resources, "matmul_rate", lambda device: 2.0)
    model = build(name)
    config = PruneConfig(samples=4, seqlen=16, batch_size=2, **options)
    return model, estimate(model, find_decoder(model).linears, config)


# Two blocks of a Llama of width 32: q 32x32, k and v 16x32, o 32x32, gate and up 48x32, down 32x48.
BLOCK = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
SHARED_INPUTS = [32, 32, 32, 48]
WEIGHTS = 2 * sum(R * C for R, C in BLOCK)
A_SQUARED = 2 * sum(C**2 for C in SHARED_INPUTS)
G_SQUARED = 2 * sum(R**2 for R, _ in BLOCK)


def test_estimate_of_the_surgeon(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = estimate_of("llama", monkeypatch, method="surgeon", shots=3, max_iterations=10)
    assert plan.weights_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert plan.snapshot_bytes == 4 * WEIGHTS
    assert plan.factors_bytes == 4 * (A_SQUARED + G_SQUARED)
    assert plan.workspace_bytes == 4 * (2 * 48**2 + 2 * 32**2 + 8 * 32 * 48)
    width = 2 * (sum(SHARED_INPUTS) + sum(R for R, _ in BLOCK))
    assert plan.activations_bytes == 32 * 4 * (3 * 64 + width + width // 4)
    parts = plan.snapshot_bytes + plan.factors_bytes + plan.costs_bytes + plan.workspace_bytes
    assert plan.additional_bytes == parts + plan.activations_bytes
    assert plan.memory_bytes == plan.weights_bytes + plan.additional_bytes
    tokens = 64
    passes = 2 * (WEIGHTS + 64 * 32) * tokens
    inverses = 2 * (sum(C**3 for C in SHARED_INPUTS) + sum(R**3 for R, _ in BLOCK))
    solver = 4 * 10 * 2 * sum(R * C * (R + C) for R, C in BLOCK)
    operations = 3 * (3 * passes + 2 * tokens * (A_SQUARED + G_SQUARED) + inverses + solver) + passes
    assert plan.seconds == pytest.approx(operations / 2.0)


def test_estimate_without_gradients_or_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    _, wanda = estimate_of("llama", monkeypatch, method="wanda")
    assert wanda.factors_bytes == 4 * A_SQUARED
    assert wanda.activations_bytes == 32 * 4 * (3 * 64 + 80 + 20)
    passes = 2 * (WEIGHTS + 64 * 32) * 64
    inverses = 2 * sum(C**3 for C in SHARED_INPUTS)
    assert wanda.seconds == pytest.approx((2 * passes + 2 * 64 * A_SQUARED + inverses) / 2.0)
    _, magnitude = estimate_of("llama", monkeypatch, method="magnitude")
    assert magnitude.factors_bytes == 0
    assert magnitude.seconds == pytest.approx(passes / 2.0)


def test_estimate_counts_biases_and_the_written_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = estimate_of("opt", monkeypatch, method="l-obd")
    block_inputs = [33, 33, 33, 65]  # q, k and v share theirs; each with a one appended for the bias
    assert plan.factors_bytes == 4 * 2 * sum(C**2 for C in block_inputs)
    linears, config = find_decoder(model).linears, PruneConfig(samples=4, seqlen=16)
    written = [
        estimate(model, linears, config, saved_dtype=dtype).disk_bytes
        for dtype in (None, torch.float32, torch.bfloat16)
    ]
    parameters = sum(p.numel() for p in model.parameters())  # the tied embedding once
    assert written[0] == written[1] == written[2] + 2 * parameters


def test_default_batch_is_4096_tokens_and_no_more_than_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_surgeon.resources, "matmul_rate", lambda device: 1.0)
    model = build("llama")
    linears = find_decoder(model).linears

    def activations(**options: Any) -> int:
        return estimate(model, linears, PruneConfig(**options)).activations_bytes

    full = activations(samples=128, seqlen=1024)
    assert full == 4 * activations(samples=1, seqlen=1024) == activations(samples=128, seqlen=2048, batch_size=2)


def test_batches_on_a_gpu_follow_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    linears = find_decoder(model).linears
    config = PruneConfig()
    width = 2 * (sum(SHARED_INPUTS) + sum(R for R, _ in BLOCK))
    per_token, factors = 4 * (3 * 64 + width + width // 4), 4 * (A_SQUARED + G_SQUARED)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 4)
    monkeypatch.setattr(model, "parameters", lambda: iter([on_gpu]))
    for tokens, windows in ((10 * 512, 10), (10 * 512 - 1, 9), (3, 1), (10**9, 8192 // 512)):
        free = factors + -(-5 * per_token * tokens // 2)
        monkeypatch.setattr(llm_surgeon.resources, "available_memory", lambda device, free=free: free)
        assert windows_per_pass(model, linears, config, 128, 512) == windows
    assert windows_per_pass(model, linears, config, 5, 512) == 5
    assert windows_per_pass(model, linears, PruneConfig(batch_size=3), 128, 512) == 3


def test_computing_activations_again_needs_one_block_and_every_block_s_input(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = estimate_of("llama", monkeypatch, checkpoint_activations=True)
    width = 2 * 32 + sum(SHARED_INPUTS) + sum(R for R, _ in BLOCK)
    assert plan.activations_bytes == 32 * 4 * (3 * 64 + width + width // 4)


def test_matmul_rate_is_a_plausible_rate() -> None:
    assert 1e7 < matmul_rate(torch.device("cpu"), seconds=0.01) < 1e16
