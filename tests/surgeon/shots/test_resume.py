"""Interrupted runs go on from their states, to the bit.

``SURGEON_RESUME_POINTS=all`` tries each state of all kinds of runs in place of one of some.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_surgeon import prune
from llm_surgeon.checkpoint.run_states import FolderStates
from llm_surgeon.checkpoint.states import State
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.report.schema import PruneReport
from llm_surgeon.shots import block_updates
from llm_surgeon.shots.resume import states_bytes
from tests.surgeon.tiny_models import VOCABULARY, build

POINTS = os.environ.get("SURGEON_RESUME_POINTS", "one")
TOKENS = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "2:4": ("llama", {}),
    "2:4 in shots": ("opt", {"shots": 2}),
    "2:4, partly dense": ("llama", {"dense_fraction": 0.3, "shots": 2}),
    "unstructured": ("opt", {"structure": "unstructured", "sparsity": 0.5, "shots": 3}),
    "joint": ("llama", {"structure": "unstructured", "sparsity": 0.6, "shots": 2, "update": "joint"}),
    "joint, steps": ("llama", {"shots": 2, "update": "joint", "gradient_steps": 1}),
    "sequential, steps": ("llama", {"gradient_steps": 2, "token_weights": True}),
    "two terms": ("llama", {"update": "joint", "kron_rank": 2, "shots": 2}),
    "magnitude": ("gpt2", {"method": "magnitude"}),
    "offload": ("gpt2", {"offload": "cpu", "shots": 2}),
    "lora": ("llama", {"shots": 2, "lora_rank": 2, "lora_steps": 1}),
    "rows-columns": ("opt", {"structure": "rows-columns", "sparsity": 0.2, "shots": 2}),
    "rows-columns, fitted": ("opt", {"structure": "rows-columns", "sparsity": 0.2, "shots": 2, "reconstruct": True}),
    "groups": ("llama", {"structure": "groups", "sparsity": 0.3, "shots": 2}),
    "groups at random": ("llama", {"structure": "groups", "sparsity": 0.3, "shots": 2, "importance": "random"}),
    "width": ("llama", {"structure": "width", "sparsity": 0.25, "shots": 2}),
    "layers": ("gpt_neo", {"structure": "layers", "sparsity": 0.6}),
}


FEW = ("2:4", "unstructured", "joint, steps", "offload", "rows-columns", "groups at random", "width", "layers")
KINDS = tuple(RUNS) if POINTS == "all" else FEW


class Interrupted(BaseException):
    pass


class Late:
    """Does what it is asked to when that is waited for: as a thread that is as slow as it may be."""

    def submit(self, action: Callable[[], None]) -> Any:
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        future.action = action  # type: ignore[attr-defined]
        return future

    def shutdown(self) -> None:
        """All has been waited for."""


class Interrupting(FolderStates):
    """Counts the states that it keeps, copied late, and is interrupted in place of the one after ``most``."""

    def __init__(self, folder: Path, most: float = math.inf, resume: bool = False) -> None:
        super().__init__(folder, resume)
        self.most, self.count = most, 0
        self._copying.shutdown()
        self._copying = Late()  # type: ignore[assignment]

    def settle(self) -> None:
        for future in self._copied:
            future.action()  # type: ignore[attr-defined]
            future.set_result(None)
        super().settle()

    def put_shot(self, index: int, state: State) -> None:
        self._count()
        super().put_shot(index, state)

    def put_block(self, depth: int, state: State) -> None:
        self._count()
        super().put_block(depth, state)

    def _count(self) -> None:
        if self.count == self.most:
            raise Interrupted
        self.count += 1


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def pruned(kind: str, states: FolderStates | None = None) -> tuple[dict[str, torch.Tensor], PruneReport]:
    name, options = RUNS[kind]
    model = build(name)
    report = prune(model, TOKENS, held_out=HELD_OUT, checkpoint=states, **options)
    for shot in report.shots:
        shot.seconds = {}
    return weights(model), report


def interrupted(kind: str, folder: Path, most: int) -> None:
    """Leave the first states of a run, and nothing in the model."""
    name, options = RUNS[kind]
    states, model = Interrupting(folder, most), build(name)
    with pytest.raises(Interrupted):
        prune(model, TOKENS, held_out=HELD_OUT, checkpoint=states, **options)
    states.close()
    assert same(weights(model), weights(build(name)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_its_states_to_the_bit(kind: str, tmp_path: Path) -> None:
    """From one of its states, another for every kind, and from the last."""
    whole = Interrupting(tmp_path / "whole")
    wanted, report = pruned(kind, whole)
    whole.close()
    every = range(1, whole.count)
    points = every if POINTS == "all" else [every[list(RUNS).index(kind) % len(every)]] if every else []
    for point in points:
        interrupted(kind, tmp_path / "cut", point)
        states = Interrupting(tmp_path / "cut", resume=True)
        found, resumed = pruned(kind, states)
        assert same(found, wanted) and states.count == whole.count - point
        assert resumed.held_out == report.held_out and resumed.layers == report.layers
        assert resumed.shots == report.shots
        states.remove()
    states = Interrupting(tmp_path / "whole", resume=True)
    found, resumed = pruned(kind, states)
    assert same(found, wanted) and states.count == 0 and resumed.shots == report.shots
    states.close()


def test_states_change_nothing_and_go_once_all_is_done(tmp_path: Path) -> None:
    name, options = RUNS["2:4 in shots"]
    plain, kept = build(name), build(name)
    prune(plain, TOKENS, **options)
    prune(kept, TOKENS, checkpoint=tmp_path / "states", **options)
    assert same(weights(plain), weights(kept)) and list(tmp_path.iterdir()) == []


def test_the_blocks_of_a_last_fit_lie_beside_those_before_it() -> None:
    model = build("opt")
    decoder = find_decoder(model)

    def disk(**options: Any) -> int:
        return states_bytes(model, decoder, PruneConfig(structure="rows-columns", shots=2, **options))[0]

    linears = sum(p.nbytes for linear in decoder.linears for p in linear.module.parameters(recurse=False))
    assert disk(gradient_steps=0, reconstruct=True) - disk(gradient_steps=0) == linears


@pytest.mark.parametrize("offload, device, waits", [("cpu", "cuda", 1), ("none", "cuda", 0), ("cpu", "cpu", 0)])
def test_masks_are_read_once_they_are_in_main_memory(
    monkeypatch: pytest.MonkeyPatch, offload: Any, device: str, waits: int
) -> None:
    calls: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: calls.append("waits"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    run: Any = SimpleNamespace(config=PruneConfig(offload=offload), plan=SimpleNamespace(device=torch.device(device)))
    block_updates.arrived(run)
    assert len(calls) == waits
