"""Steps along the natural gradient of the kept weights."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from llm_surgeon import InputError, PruneConfig, prune, prune_checkpoint
from llm_surgeon.curvature.estimate import estimate_curvature
from llm_surgeon.curvature.factors import DampedFactor, DampedFactors, KroneckerFactors
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.methods.gradient_steps import _least_of_parabola, direction, split_windows, step
from llm_surgeon.methods.step_objective import StepObjective
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.dense_weights import DenseWeights
from llm_surgeon.models.passes import mean_loss
from llm_surgeon.shots.gradient_steps import GradientSteps
from surgeon_kernels import damp
from tests.surgeon.checkpoints import save_folder
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
    found = StepObjective(model, decoder, 6).gradients(data)
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


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("target", ["labels", "dense"])
def test_gradients_are_the_same_where_activations_are_computed_again(kind: str, target: str) -> None:
    model = build(kind).double()
    decoder, data, runs = find_decoder(model), Calibration(windows()), []
    dense = DenseWeights(decoder) if target == "dense" else None
    for linear in decoder.linears:
        linear.write(linear.matrix() * 0.9)
    decoder.linears[0].module.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    found = []
    for again in (False, True):
        objective = StepObjective(model, decoder, 8, dense=dense, checkpoint_activations=again)
        runs.clear()
        found.append(objective.gradients(data))
        assert sum(runs) == 2 * (1 + again)  # batches of four windows
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-15)


def divergence_from(dense: PreTrainedModel, model: PreTrainedModel, data: Calibration) -> float:
    """Mean ``KL(dense ‖ model)`` of the tokens of all windows, which have no padding."""
    with torch.no_grad():
        log_p, log_q = (m(input_ids=data.input_ids).logits.double().log_softmax(-1) for m in (dense, model))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_gradients_of_the_divergence_from_the_dense_model(kind: str) -> None:
    dense, model = build(kind).double(), build(kind).double()
    decoder, data = find_decoder(model), Calibration(windows())
    objective = StepObjective(model, decoder, 3, dense=DenseWeights(decoder))
    for gradient in objective.gradients(data).values():
        assert float(gradient.abs().max()) < 1e-15  # an optimum
    for linear in decoder.linears:
        linear.write(1.1 * linear.matrix())
    assert objective.mean(data) == pytest.approx(divergence_from(dense, model, data), rel=1e-5)
    found = objective.gradients(data)
    for linear in decoder.linears[:: max(1, len(decoder.linears) // 4)]:
        W = linear.matrix()
        towards = torch.randn(W.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        losses = []
        for sign in (1.0, -1.0):
            linear.write(W + sign * 1e-5 * towards)
            losses.append(objective.mean(data))
        linear.write(W)
        expected = (losses[0] - losses[1]) / 2e-5
        assert float((found[linear.name] * towards).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("target", ["dense", "labels"])
def test_gradients_in_bfloat16_passes(target: str) -> None:
    model = build("llama")
    decoder, data = find_decoder(model), Calibration(windows())
    dense = DenseWeights(decoder) if target == "dense" else None
    for linear in decoder.linears:
        linear.write(1.3 * linear.matrix())
    exact, rounded = (StepObjective(model, decoder, 6, dense=dense, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert rounded.mean(data) == pytest.approx(exact.mean(data), rel=0.02)
    for name, gradient in rounded.gradients(data).items():
        expected = exact.gradients(data)[name]
        assert gradient.dtype == torch.float32
        assert 0 < (gradient - expected).norm() < 0.2 * expected.norm(), name


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
def test_a_step_has_the_best_length(least: float) -> None:
    linear = find_decoder(build("llama")).linears[0]
    weight, towards = linear.matrix(), torch.zeros_like(linear.matrix())
    towards[0, 0] = 1.0
    moves = []

    def loss() -> float:
        length = float((weight - linear.matrix())[0, 0])
        return 3.0 + (length - least) ** 2

    taken = step([linear], {linear.name: towards}, loss, lambda *move: moves.append(move))
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


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("apart", [False, True])
def test_steps_after_a_sequential_update_go_towards_the_dense_model(kind: str, apart: bool) -> None:
    data, lengths, others = (windows(24, seed=seed) for seed in (0, 2, 3))
    dense, plain, stepped = build(kind), build(kind), build(kind)
    config = PruneConfig(structure="2:4", update="sequential", gradient_steps=0)
    prune(plain, data, config=config)
    config = dataclasses.replace(config, gradient_steps=3, gradient_samples=None if apart else 4)
    report = prune(stepped, data, config=config, step_windows=lengths if apart else None)
    (shot,) = report.shots
    assert shot.gradient_steps[0].length > 0.0
    for earlier, later in itertools.pairwise(shot.gradient_steps):
        assert later.loss_before == earlier.loss_after < earlier.loss_before
    measured_on = Calibration(lengths if apart else data[-4:])
    for found, model in ((shot.gradient_steps[0].loss_before, plain), (shot.gradient_steps[-1].loss_after, stepped)):
        assert found == pytest.approx(divergence_from(dense, model, measured_on), rel=1e-4)
    before, after = (divergence_from(dense, model, Calibration(others)) for model in (plain, stepped))
    assert after < 0.95 * before
    for linear in find_decoder(stepped).linears:
        assert bool(((linear.weight == 0.0).unflatten(1, (-1, 4)).sum(dim=2) == 2).all())


def test_shots_before_a_sequential_update_take_no_steps() -> None:
    options = {"structure": "unstructured", "update": "sequential", "shots": 2, "gradient_steps": 1}
    first, last = prune(build("llama"), windows(16), **options).shots
    assert not first.gradient_steps and len(last.gradient_steps) == 1


def test_factors_of_steps_after_a_sequential_update(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = windows(24), build("llama")
    seen = []

    def take(self: GradientSteps, selections: object, factors: DampedFactors) -> list[object]:
        seen.extend(factors.of(linear) for linear in self._run.decoder.linears)
        return []

    monkeypatch.setattr(GradientSteps, "take", take)
    prune(model, data, structure="2:4", update="sequential", gradient_steps=1, fisher="empirical")
    of_dense, of_pruned = (
        (estimate_curvature(m, find_decoder(m), Calibration(data), batch_size=8), find_decoder(m).linears)
        for m in (build("llama"), model)
    )
    for found, linear, pruned in zip(seen, of_dense[1], of_pruned[1], strict=True):
        torch.testing.assert_close(found.g.undamped(), of_dense[0].factors(linear)[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.a.undamped(), of_pruned[0].factors(pruned)[1], rtol=1e-4, atol=1e-5)


def test_windows_for_lengths_need_steps() -> None:
    with pytest.raises(InputError, match="windows for the lengths of gradient steps mean nothing without"):
        prune(build("llama"), windows(8), step_windows=windows(2), gradient_steps=0)
    with pytest.raises(InputError, match="gradient_samples 3 are not the 2 windows that were given for the lengths"):
        prune(build("llama"), windows(8), step_windows=windows(2), gradient_steps=1, gradient_samples=3)


def test_windows_for_lengths_that_the_text_lacks_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{token}" for token in windows(40).flatten().tolist()))
    source, options = save_folder(tmp_path / "dense", build("llama")), {"samples": 4, "seqlen": 16, "device": "cpu"}
    with pytest.raises(
        InputError, match=r"^gradient_samples 99 need more text: beside the other windows it has \d+ of"
    ):
        prune_checkpoint(
            source, tmp_path / "out", calibration=str(tmp_path / "text.txt"), gradient_steps=1, gradient_samples=99,
            **options,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_windows_are_held_out() -> None:
    first, last = split_windows(Calibration(windows(17)), 5)
    assert (len(first.input_ids), len(last.input_ids)) == (12, 5)
    with pytest.raises(InputError, match="at least 18 calibration windows, not 17"):
        split_windows(Calibration(windows(17)), 17)
    first, last = split_windows(Calibration(windows(17)), None)
    assert (len(first.input_ids), len(last.input_ids)) == (15, 2)
    assert torch.equal(torch.cat([first.input_ids, last.input_ids]), windows(17))
    with pytest.raises(InputError, match="at least 2 calibration windows"):
        prune(build("llama"), windows(1), structure="2:4", gradient_steps=1)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_steps_lower_the_loss_and_keep_every_zero(kind: str) -> None:
    data = windows(24)
    config = PruneConfig(structure="2:4", update="joint", shots=2)
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
        {"structure": "groups", "reconstruct": False},
        {"method": "wanda"},
        {"kron_rank": 2},
        {"offload": "cpu"},
        {"lora_rank": 2},
        {"gradient_steps": -1},
        {"gradient_steps": True},
    ],
)
def test_what_steps_do_not_go_with_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="gradient_steps"):
        PruneConfig(**{"gradient_steps": 1, **options})  # type: ignore[arg-type]
