"""Runs go on where the memory of a GPU does not suffice, or where some windows hold NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_surgeon import PruneConfig, prune
from llm_surgeon.checkpoint.run_states import FolderStates
from llm_surgeon.errors import BadBatchError
from llm_surgeon.methods import sequential
from llm_surgeon.methods import update as updates
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.shots import run as shots_run
from tests.surgeon.shots.test_resume import HELD_OUT, TOKENS, same, weights
from tests.surgeon.tiny_models import VOCABULARY, build

RUNS: dict[str, dict[str, Any]] = {
    "2:4": {"structure": "2:4"},
    "joint": {"structure": "unstructured", "sparsity": 0.5, "shots": 2, "update": "joint"},
}
BAD = 60  # a token, none of those that models are probed with


def masks(model: torch.nn.Module) -> list[torch.Tensor]:
    return [linear.weight == 0.0 for linear in find_decoder(model).linears]


@pytest.mark.parametrize("kind", RUNS)
def test_capture_goes_on_with_half_the_batch_and_comes_to_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, halved = build("llama"), build("llama")
    prune(plain, TOKENS, batch_size=5, **RUNS[kind])
    seen: list[int] = []
    estimate = shots_run.estimate_curvature

    def small(*arguments: Any, batch_size: int, **options: Any) -> Any:
        seen.append(batch_size)
        if batch_size > 2 and len(seen) > 1 - (kind == "2:4"):  # in the second shot, where there is one
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return estimate(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(shots_run, "estimate_curvature", small)
    report = prune(halved, TOKENS, batch_size=5, **RUNS[kind])
    assert seen == ([5, 2] if kind == "2:4" else [5, 5, 2])
    assert all(map(torch.equal, masks(plain), masks(halved)))
    for one, other in zip(plain.parameters(), halved.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    said = "GPU memory ran out in a pass over 5 windows at once: the run goes on with 2."
    assert [warning for warning in report.warnings if "GPU" in warning] == [said]


def test_capture_of_one_window_that_does_not_fit_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, offloaded = build("llama"), build("llama")
    prune(plain, TOKENS, batch_size=1)
    estimate = shots_run.estimate_curvature

    def fits(*arguments: Any, checkpoint_activations: bool, **options: Any) -> Any:
        if not checkpoint_activations:  # as where it is offloaded
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return estimate(*arguments, checkpoint_activations=checkpoint_activations, **options)

    monkeypatch.setattr(shots_run, "estimate_curvature", fits)
    report = prune(offloaded, TOKENS, batch_size=1)
    assert report.config["offload"] == "cpu" and all(map(torch.equal, masks(plain), masks(offloaded)))


class Failing:
    """The update of a linear, for which there is no memory once, the ``at``-th time."""

    def __init__(self, at: int) -> None:
        self.at, self.calls, self._update = at, 0, updates.remove_and_compensate

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self._update(*arguments)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("kept", [False, True])
def test_an_update_that_does_not_fit_goes_on_offloaded(
    kept: bool, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = build("llama"), build("llama")
    wanted = prune(plain, TOKENS, held_out=HELD_OUT, gradient_steps=0)
    failing = Failing(9)  # in the second block of two, of seven linears each
    monkeypatch.setattr(sequential, "remove_and_compensate", failing)
    states = FolderStates(tmp_path / "states", resume=False) if kept else None
    report = prune(model, TOKENS, held_out=HELD_OUT, checkpoint=states, gradient_steps=steps)
    assert failing.calls == (9 + 7 if kept else 9 + 14)
    assert same(weights(model), weights(plain))
    assert report.config["offload"] == "cpu" and wanted.config["offload"] == "none"
    said = "GPU memory ran out: weights and factors wait in main memory from there on (offload cpu)"
    said += ", and there are no gradient steps." if steps else "."
    assert said in report.warnings and report.layers == wanted.layers
    assert report.held_out == wanted.held_out
    if states is not None:  # whoever goes on with it finds it offloaded
        states.close()
        again = build("llama")
        report = prune(
            again, TOKENS, held_out=HELD_OUT, checkpoint=tmp_path / "states", resume=True, gradient_steps=steps
        )
        assert same(weights(again), weights(plain))
        assert report.config["offload"] == "cpu" and said in report.warnings


def test_what_cannot_be_offloaded_fails_and_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    monkeypatch.setattr(sequential, "remove_and_compensate", Failing(9))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        prune(model, TOKENS, update="sequential", lora_rank=2)
    assert same(weights(model), weights(build("llama")))


def with_bad_token(name: str = "llama") -> torch.nn.Module:
    """A model whose hidden states are NaN at one token."""
    model = build(name)

    def spoil(_: torch.nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        return y.masked_fill((args[0] == BAD)[..., None], math.nan)

    model.get_input_embeddings().register_forward_hook(spoil)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "unstructured", "sparsity": 0.5, "shots": 2},
        {"gradient_steps": 1, "token_weights": True},
        {"structure": "groups", "sparsity": 0.3, "shots": 1, "importance": "taylor1"},
        {"structure": "width", "sparsity": 0.25, "shots": 1},
        {"structure": "layers", "sparsity": 0.5},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_windows_that_hold_nan_stop_a_run_or_are_named_and_left_out(options: dict[str, Any], tmp_path: Path) -> None:
    tokens, held_out = TOKENS.clone(), torch.cat([HELD_OUT, HELD_OUT + 1]) % VOCABULARY
    for each in (tokens, held_out):
        each[each == BAD] = BAD + 1
    tokens[2, 5] = held_out[0, 3] = BAD
    model = with_bad_token()
    with pytest.raises(BadBatchError, match=r"^NaN or infinity in .* \(batch \d of \d\)$"):
        prune(model, tokens, batch_size=2, **options)
    one_by_one = options.get("importance") == "taylor1"  # such gradients are of single sequences
    left = [0, 1, 3, 4, 5] if one_by_one else [0, 1, 4, 5]
    wanted = with_bad_token()
    prune(wanted, tokens[left], batch_size=2, held_out=held_out[2:], **options)
    states = FolderStates(tmp_path / "states", resume=False)
    more = {"batch_size": 2, "held_out": held_out, "skip_bad_batches": True, **options}
    report = prune(model, tokens, checkpoint=states, **more)
    assert same(weights(model), weights(wanted))
    numbers = "3 to 3" if one_by_one else "3 to 4"
    named = [warning for warning in report.warnings if "left out" in warning]
    assert any(warning.startswith("Held-out windows 1 to 2 are left out: NaN or") for warning in named)
    assert any(warning.startswith(f"Calibration windows {numbers} are left out: NaN or") for warning in named)
    states.close()
    again = with_bad_token()
    assert prune(again, tokens, checkpoint=tmp_path / "states", resume=True, **more).warnings == report.warnings
    assert same(weights(again), weights(wanted))


def test_a_run_of_nothing_but_bad_windows_stops() -> None:
    tokens = TOKENS.clone()
    tokens[:, 2] = BAD
    with pytest.raises(BadBatchError, match=r"\(batch 1 of 1\)"):
        prune(with_bad_token(), tokens, batch_size=2, skip_bad_batches=True)
    assert not PruneConfig().skip_bad_batches


def test_further_windows_that_hold_nan_are_left_out_of_gradient_steps() -> None:
    lengths = TOKENS[:3].clone()
    lengths[1, 2] = BAD
    report = prune(
        with_bad_token(), TOKENS, batch_size=1, gradient_steps=1, step_windows=lengths, skip_bad_batches=True
    )
    assert any(warning.startswith("Gradient step windows 2 to 2 are left out") for warning in report.warnings)
    assert len(report.shots[0].gradient_steps) == 1


def test_a_run_to_which_too_few_windows_are_left_takes_no_gradient_steps() -> None:
    data = TOKENS[:8].clone() if len(TOKENS) >= 8 else TOKENS.repeat(2, 1)[:8]
    data[1:, 2] = BAD
    report = prune(with_bad_token(), data, batch_size=1, skip_bad_batches=True)
    assert "Too few windows are left for gradient steps." in report.warnings
    assert not report.shots[0].gradient_steps and report.sparsity == 0.5
