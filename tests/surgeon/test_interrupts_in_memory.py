"""An interrupt anywhere in ``prune()`` or ``recover()`` leaves the model as it was.

A trace function raises KeyboardInterrupt at the n-th line or call of the package's own code, for n drawn over the whole
run. ``SURGEON_INTERRUPT_POINTS=200`` tries so many of them for each kind of run in place of two.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import llm_surgeon
from llm_surgeon import prune
from llm_surgeon.interrupts import uninterrupted
from llm_surgeon.models.passes import evaluation_mode
from llm_surgeon.models.state import ModelState
from llm_surgeon.recovery.recover import recover
from llm_surgeon.structures.remove.rows_columns import compact
from tests.surgeon.tiny_models import VOCABULARY, build

PACKAGE = str(Path(llm_surgeon.__file__).parent)
POINTS = int(os.environ.get("SURGEON_INTERRUPT_POINTS", "2"))
TOKENS = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "2:4": ("llama", {"structure": "2:4", "shots": 2}),
    "unstructured": ("opt", {"structure": "unstructured", "sparsity": 0.5, "shots": 2}),
    "rows-columns": ("llama", {"structure": "rows-columns", "sparsity": 0.2, "shots": 2}),
    "groups": ("llama", {"structure": "groups", "sparsity": 0.3, "shots": 1}),
    "width": ("llama", {"structure": "width", "sparsity": 0.25, "shots": 1}),
    "layers": ("opt", {"structure": "layers", "sparsity": 0.5}),
    "lora": ("llama", {"structure": "2:4", "shots": 1, "method": "magnitude", "lora_rank": 2, "lora_steps": 1}),
    "offload": ("gpt2", {"structure": "2:4", "shots": 1, "offload": "cpu"}),
    "sparsegpt": ("llama", {"structure": "2:4", "method": "sparsegpt"}),
    "gradient steps": ("llama", {"structure": "2:4", "shots": 1, "gradient_steps": 1}),
}


class Interruption:
    """Counts the lines and calls of the package that a block runs, and raises at the one numbered ``at``."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.events, self.place, self.lost = at, 0, "", False

    def __enter__(self) -> Interruption:
        self._former = sys.gettrace(), sys.unraisablehook
        sys.settrace(self._trace)
        sys.unraisablehook = self._note_lost
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._former[0])
        sys.unraisablehook = self._former[1]

    def _note_lost(self, lost: Any) -> None:
        """Python itself drops what is raised while a generator, say, is taken down: the run goes on then."""
        self.lost = lost.exc_type is KeyboardInterrupt

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event in ("call", "line"):
            self.events += 1
            if self.events == self.at:
                self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._trace


def state_of(model: nn.Module, *, values: bool = True) -> dict[str, Any]:
    """Everything of a model, and of what lies around it, that a run may change."""
    found: dict[str, Any] = {"grad mode": torch.is_grad_enabled(), "config": model.config.to_dict()}
    source = sys.modules[type(model).__module__]
    found["rotary"] = getattr(source, "apply_rotary_pos_emb", None)
    for name, module in model.named_modules(remove_duplicate=False):
        own = vars(module)
        hooks = {key: tuple(value) for key, value in own.items() if "hooks" in key and isinstance(value, dict)}
        plain = {key: value for key, value in own.items() if isinstance(value, (bool, int, float, str))}
        found[name] = (id(module), type(module), sorted(own), hooks, plain, dict(module._modules))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        about = (id(tensor), tensor.data_ptr(), tensor.device, tensor.dtype, tensor.requires_grad, id(tensor.grad))
        bits = tensor.detach().clone().view(torch.uint8).numpy().tobytes() if values else None
        found[f"{name} "] = (*about, bits, len(tensor._post_accumulate_grad_hooks or ()))
    return found


def prepared(name: str) -> nn.Module:
    """A model that is not just as a run would leave it: flags, gradients and hooks of somebody's."""
    model = build(name).train()
    model.get_input_embeddings().eval()
    parameter = next(model.parameters())
    parameter.requires_grad_(False)
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)
    model.register_forward_hook(lambda *_: None)
    return model


def points(events: int, seed: str) -> list[int]:
    """Numbers of events: one in each of equal parts of the run, and the last ones."""
    draw = random.Random(seed)
    parts = [round(i * events / POINTS) for i in range(POINTS + 1)]
    return [draw.randint(a + 1, max(a + 1, b)) for a, b in itertools.pairwise(parts)] + [events - 1]


def interrupted_everywhere(
    made: Callable[[], nn.Module],
    run: Callable[[nn.Module], Any],
    seed: str,
    check: Callable[[nn.Module, dict[str, Any]], None],
) -> None:
    run(made())  # imports, and verdicts that are kept
    with Interruption() as whole:
        run(made())
    for at in points(whole.events, seed):
        model = made()
        before = state_of(model)
        with Interruption(at) as interruption:
            try:
                run(model)
            except KeyboardInterrupt:
                pass
            else:
                # Runs differ by a few events: one of the last may not be reached.
                assert interruption.lost or not interruption.place, f"swallowed at {interruption.place}"
                continue
        try:
            check(model, before)
        except AssertionError as error:
            raise AssertionError(f"interrupted at event {at} of {whole.events}, {interruption.place}") from error


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


@pytest.mark.parametrize("kind", RUNS)
def test_an_interrupted_prune_leaves_the_model_as_it_was(kind: str) -> None:
    name, options = RUNS[kind]

    def as_it_was(model: nn.Module, before: dict[str, Any]) -> None:
        assert differing(before, state_of(model)) == []

    interrupted_everywhere(partial(prepared, name), lambda model: prune(model, TOKENS, **options), kind, as_it_was)


def test_an_interrupted_compact_leaves_the_model_as_it_was() -> None:
    def zeroed() -> nn.Module:
        model = prepared("llama")
        with torch.no_grad():
            for block in model.model.layers:
                block.mlp.up_proj.weight[:16] = 0.0
        return model

    def as_it_was(model: nn.Module, before: dict[str, Any]) -> None:
        assert differing(before, state_of(model)) == []

    interrupted_everywhere(zeroed, compact, "compact", as_it_was)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_recovery_keeps_zeros_and_all_but_the_weights(method: str) -> None:
    zeros: dict[str, torch.Tensor] = {}

    def run(model: nn.Module) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("proj.weight"):
                    parameter[:, ::2] = 0.0
                    zeros[name] = parameter == 0
        options = {"method": method, "steps": 2, "batch_size": 2, "eval_every": 1}
        recover(model, TOKENS[:4], TOKENS[4:], **options)

    def zeros_kept(model: nn.Module, before: dict[str, Any]) -> None:
        values = {key for key in before if key.endswith(" ")}
        after = state_of(model)
        assert differing(before, after) == [] or set(differing(before, after)) <= values
        assert all(before[key][:6] == after[key][:6] and before[key][7] == after[key][7] for key in values)
        for name, zero in zeros.items():
            assert not bool(model.get_parameter(name)[zero].any())

    interrupted_everywhere(partial(prepared, "llama"), run, method, zeros_kept)


def test_clean_up_comes_to_its_end_however_often_it_is_interrupted() -> None:
    done: list[int] = []

    def clean() -> None:
        for step in range(4):
            if len(done) in (1, 3, 5):
                done.append(-1)
                raise KeyboardInterrupt
            done.append(step)

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(clean)
    assert done[-4:] == [0, 1, 2, 3]
    uninterrupted(lambda: done.clear())
    assert done == []
    with pytest.raises(ZeroDivisionError):
        uninterrupted(lambda: 1 // 0)


def test_flags_come_back_although_putting_them_back_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared("llama")
    before = state_of(model)
    state = ModelState(model)
    interrupts, own = [KeyboardInterrupt(), KeyboardInterrupt()], torch.set_grad_enabled

    def set_grad_enabled(mode: bool) -> object:
        if interrupts:
            raise interrupts.pop()
        return own(mode)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.eval()
        model.config.use_cache = False
        model.lm_head = nn.Linear(2, 2)
        monkeypatch.setattr(torch, "set_grad_enabled", set_grad_enabled)
        with pytest.raises(KeyboardInterrupt):
            state.restore()
    assert interrupts == [] and differing(before, state_of(model)) == []


def test_evaluation_mode_is_left_as_it_was_entered() -> None:
    for at in range(1, 12):
        model = prepared("llama")
        before = {module: module.training for module in model.modules()}
        with Interruption(at) as interruption:
            try:
                with evaluation_mode(model):
                    assert not any(module.training for module in model.modules())
            except KeyboardInterrupt:
                pass
        assert {module: module.training for module in model.modules()} == before, interruption.place


def test_a_failed_copy_of_the_weights_is_the_error_that_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(tensors: object) -> None:
        raise MemoryError("no memory for copies")

    monkeypatch.setattr("llm_surgeon.models.state.copies_in_main_memory", exhausted)
    model = prepared("llama")
    before = state_of(model)
    with pytest.raises(MemoryError, match="no memory for copies"):
        prune(model, TOKENS, method="magnitude")
    assert differing(before, state_of(model)) == []
