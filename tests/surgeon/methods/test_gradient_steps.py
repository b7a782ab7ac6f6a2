"""Steps along the natural gradient of the kept weights."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from llm_surgeon import InputError, PruneConfig, prune
from llm_surgeon.curvature.factors import DampedFactor, KroneckerFactors
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.methods.gradient_steps import _least_of_parabola, direction, mean_gradients, split_windows, step
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.passes import mean_loss
from surgeon_kernels import damp
from tests.surgeon.tiny_models import VOCABULARY, build

CPU = torch.device("cpu")


def windows(count: int = 8, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Sequences that count: something to learn."""
    start = torch.randint(VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (start + torch.arange(length)) % VOCABULARY


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_gradients_are_those_of_the_mean_loss(kind: str) -> None:
    model = build(kind).double()
    decoder = find_decoder(model)
    mask = torch.ones(8, 12, dtype=torch.bool)
    mask[2, 7:] = False
    data = Calibration(windows(), mask)
    own = next(model.parameters())
    own.grad = torch.ones_like(own)
    found = mean_gradients(model, decoder, data, batch_size=3)
    assert bool((own.grad == 1.0).all())
    assert all(p.grad is None for p in model.parameters() if p is not own)
    for linear in decoder.linears[:: max(1, len(decoder.linears) // 4)]:
        W = linear.matrix(torch.float64)
        towards = torch.randn(W.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        losses = []
        for sign in (1.0, -1.0):
            linear.write(W + sign * 1e-5 * towards)
            losses.append(mean_loss(model, data, 4))
        linear.write(W)
        expected = (losses[0] - losses[1]) / 2e-5
        assert float((found[linear.name] * towards).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_a_direction_is_the_newton_step_of_the_kept_weights(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    R, C = 5, 7
    gradient = torch.randn(R, C, dtype=torch.float64, generator=generator)
    pruned = torch.rand(R, C, generator=generator) < density
    g, a = (DampedFactor(damp(x @ x.T, 0.1), 0.0) for x in (torch.randn(n, 9, dtype=torch.float64) for n in (R, C)))
    kept = ~pruned.flatten()
    F = torch.kron(g.damped, a.damped)[kept][:, kept]
    expected = torch.zeros(R * C, dtype=torch.float64)
    expected[kept] = torch.linalg.solve(F, gradient.flatten()[kept])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_surgeon.methods.gradient_steps._TOLERANCE", 1e-12)
        found = direction(gradient, pruned, KroneckerFactors(g, a), max_iterations=500)
    assert bool((found[pruned] == 0.0).all())
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("least", [0.0, 2e-5, 4e-4, 0.0021, 0.07, 5.0])
def test_a_step_has_the_best_length(least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = find_decoder(build("llama")).linears[0]
    weight, towards = linear.matrix(), torch.zeros_like(linear.matrix())
    towards[0, 0] = 1.0
    moves = []

    def loss(*_: object) -> float:
        length = float((weight - linear.matrix())[0, 0])
        return 3.0 + (length - least) ** 2

    monkeypatch.setattr("llm_surgeon.methods.gradient_steps.mean_loss", loss)
    taken = step(None, [linear], {linear.name: towards}, None, 1, lambda *move: moves.append(move))  # type: ignore[arg-type]
    if least == 0.0:
        assert taken.length == 0.0 and not moves and torch.equal(linear.matrix(), weight)
        return
    assert taken.length == pytest.approx(min(least, 0.81), rel=0.35)
    torch.testing.assert_close(linear.matrix(), weight - taken.length * towards)
    assert taken.loss_after < taken.loss_before == pytest.approx(3.0 + least**2)
    ((moved, change),) = moves
    assert moved is linear and torch.equal(change, taken.length * towards)


def test_the_least_of_a_parabola() -> None:
    parabola = {x: 2.0 * (x - 0.3) ** 2 for x in (1.0, 0.0, 0.1, 0.5)}
    assert _least_of_parabola(parabola) == pytest.approx(0.3)
    assert _least_of_parabola({0.0: 1.0, 1.0: 0.5, 3.0: math.inf}) is None
    assert _least_of_parabola({0.0: 1.0, 1.0: 2.0}) is None and _least_of_parabola({0.0: 1.0, 1.0: 0.0}) is None


def test_windows_are_held_out() -> None:
    first, last = split_windows(Calibration(windows(17)))
    assert (len(first.input_ids), len(last.input_ids)) == (15, 2)
    assert torch.equal(torch.cat([first.input_ids, last.input_ids]), windows(17))
    with pytest.raises(InputError, match="at least 2 calibration windows"):
        prune(build("llama"), windows(1), structure="2:4", gradient_steps=1)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_steps_lower_the_loss_and_keep_every_zero(kind: str) -> None:
    data = windows(24)
    config = PruneConfig(structure="2:4", shots=2)
    plain, stepped = build(kind), build(kind)
    prune(plain, data, config=config)
    report = prune(stepped, data, config=dataclasses.replace(config, gradient_steps=2))
    for shot in report.shots:
        assert 1 <= len(shot.gradient_steps) <= 2 and shot.gradient_steps[0].length > 0.0
        for s in shot.gradient_steps:  # the last is of length 0 where none helped
            assert s.loss_after < s.loss_before if s.length else s.loss_after == s.loss_before
    assert (
        "Gradient steps" in report.summary()
        and "Gradient steps" not in prune(build(kind), data, config=config).summary()
    )
    assert type(report).from_json(report.to_json()) == report
    losses = [mean_loss(model, Calibration(windows(24, seed=1)), 4) for model in (plain, stepped)]
    assert losses[1] < losses[0] - 0.1
    for linear in find_decoder(stepped).linears:
        groups = (linear.weight == 0.0).unflatten(1, (-1, 4)).sum(dim=2)
        assert bool((groups == 2).all())


@pytest.mark.parametrize(
    "options",
    [
        {"update": "chunked"},
        {"structure": "rows-columns"},
        {"structure": "groups"},
        {"method": "wanda"},
        {"kron_rank": 2},
        {"offload": "cpu"},
        {"checkpoint_activations": True},
        {"lora_rank": 2},
        {"gradient_steps": -1},
        {"gradient_steps": True},
    ],
)
def test_what_steps_do_not_go_with_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="gradient_steps"):
        PruneConfig(**{"gradient_steps": 1, **options})  # type: ignore[arg-type]
