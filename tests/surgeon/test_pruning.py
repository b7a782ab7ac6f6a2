"""Whole runs on tiny random models of every architecture: patterns, schedules, reports, failures."""

import copy
import itertools

import pytest
import torch

import llm_surgeon.methods.update
from llm_surgeon import Calibration, InputError, NumericalError, PruneConfig, prune, prune_checkpoint
from llm_surgeon.curvature.estimate import estimate_curvature
from llm_surgeon.methods.update import remove_and_compensate
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.passes import mean_loss
from llm_surgeon.progress import Progress
from surgeon_kernels import objective
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))


def matrices(model):
    return {linear.name: linear.matrix()[:, : linear.columns] for linear in find_decoder(model).linears}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "structure, method",
    [("2:4", "surgeon"), ("unstructured", "surgeon"), ("rows-columns", "surgeon"), ("2:4", "sparsegpt")],
)
def test_every_architecture_gets_its_pattern_and_a_true_report(name, structure, method):
    model = build(name)
    shots = {} if method == "sparsegpt" else {"shots": 2}
    report = prune(model, TOKENS, structure=structure, method=method, **shots)
    zeros = total = 0
    for layer in report.layers:
        matrix = matrices(model)[layer.name]
        gone = matrix == 0.0
        assert tuple(matrix.shape) == (layer.rows, layer.columns)
        assert int(gone.sum()) == layer.removed
        assert not bool(torch.signbit(matrix[gone]).any())
        if structure == "2:4":
            assert bool((gone.view(-1, 4).sum(dim=1) == 2).all())
        zeros, total = zeros + int(gone.sum()), total + gone.numel()
    assert report.sparsity == pytest.approx(zeros / total, abs=1e-12)
    wanted = 0.3 if structure == "rows-columns" else 0.5
    assert wanted <= report.sparsity <= wanted + (0.01 if structure == "rows-columns" else 1e-4)
    assert bool(torch.isfinite(model(TOKENS).logits).all())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "l-obd", "k-obd"])
def test_methods_without_update_leave_the_survivors_alone(method):
    model = build("llama")
    before = copy.deepcopy(matrices(model))
    report = prune(model, TOKENS, structure="unstructured", sparsity=0.5, method=method)
    for name, matrix in matrices(model).items():
        kept = matrix != 0.0
        assert torch.equal(matrix[kept], before[name][kept])
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert (report.shots[-1].predicted_increase is None) == (method != "k-obd")


@pytest.mark.parametrize("swaps", [0, 2])
def test_each_shot_meets_its_target_and_without_swaps_keeps_what_earlier_shots_pruned(swaps):
    masks = []

    class Watch(Progress):
        def phase(self, name):
            if name in ("curvature", "measure loss"):
                masks.append({name: matrix == 0.0 for name, matrix in matrices(model).items()})

    model = build("llama")
    options = {"structure": "unstructured", "sparsity": 0.6, "update": "joint", "shots": 3, "swaps": swaps}
    report = prune(model, TOKENS, progress=Watch(), config=PruneConfig(**options))
    total = sum(mask.numel() for mask in masks[0].values())
    assert [sum(int(m.sum()) for m in shot.values()) for shot in masks] == [
        0,
        *(round(0.6 * i / 3 * total) for i in (1, 2, 3)),
    ]
    returned = sum(
        int((mask & ~after[name]).sum()) for before, after in itertools.pairwise(masks) for name, mask in before.items()
    )
    assert (returned > 0) == (swaps > 0)
    assert [shot.target_sparsity for shot in report.shots] == pytest.approx([0.2, 0.4, 0.6])
    assert [shot.sparsity for shot in report.shots] == pytest.approx([0.2, 0.4, 0.6], abs=1e-3)


@pytest.mark.parametrize(("options", "around_dense"), [({"update": "joint"}, True), ({"update": "chunked"}, False)])
def test_joint_updates_of_later_shots_make_up_for_the_dense_weights(monkeypatch, options, around_dense):
    model = build("opt")
    before = {linear.name: linear.matrix() for linear in find_decoder(model).linears}
    increases = []

    def spy(weight, selection, factors, config, name):
        current = {linear.name: linear.matrix() for linear in find_decoder(model).linears}[name]
        later = len(increases) >= len(before)
        assert torch.equal(weight, before[name] if around_dense else current)
        assert torch.equal(current, before[name]) != later
        new = remove_and_compensate(weight, selection, factors, config, name)
        G, A = (M.damped - M.shift * torch.eye(len(M.damped)) for M in factors)
        increases.append(objective(new.weight - weight, G, A) - objective(current - weight, G, A))
        return new

    monkeypatch.setattr("llm_surgeon.shots.updates.remove_and_compensate", spy)
    report = prune(model, TOKENS, shots=2, **options)
    for shot, parts in zip(report.shots, (increases[: len(before)], increases[len(before) :]), strict=True):
        assert shot.predicted_increase == pytest.approx(sum(parts), rel=1e-3)


def test_losses_in_the_report_are_the_model_s_own():
    model = build("opt")
    dense = mean_loss(model, Calibration(TOKENS), 2)
    report = prune(model, TOKENS, structure="2:4", shots=2)
    pruned = mean_loss(model, Calibration(TOKENS), 2)
    assert report.shots[0].loss_before == pytest.approx(dense, rel=1e-6)
    assert sum(shot.measured_increase for shot in report.shots) == pytest.approx(pruned - dense, abs=1e-6)


def test_predicted_increase_is_the_quadratic_form_of_the_curvature():
    model = build("opt")
    decoder = find_decoder(model)
    curvature = estimate_curvature(model, decoder, Calibration(TOKENS), batch_size=8)
    before = {linear.name: linear.matrix() for linear in decoder.linears}
    report = prune(model, TOKENS, structure="2:4", update="joint", shots=1, fisher="empirical")
    expected = 0.0
    for linear in decoder.linears:
        G, A = (factor.double() for factor in curvature.factors(linear))
        delta = (linear.matrix() - before[linear.name]).double()
        expected += 0.5 * float((delta * (G @ delta @ A)).sum())
    assert report.shots[0].predicted_increase == pytest.approx(expected, rel=1e-4)


def test_solver_traces_are_reported_for_the_joint_update_only():
    joint = prune(build("llama"), TOKENS, update="joint", shots=1, max_iterations=3, tolerance=1e-9)
    assert [trace.layer for trace in joint.shots[0].solver] == [layer.name for layer in joint.layers]
    for trace in joint.shots[0].solver:
        assert trace.iterations <= 3
        assert all(b <= a for a, b in zip(trace.objective, trace.objective[1:], strict=False))
    assert prune(build("llama"), TOKENS, shots=1, update="chunked").shots[0].solver == []


def test_the_same_seed_gives_the_same_weights_and_another_fisher_other_ones():
    def weights(**options):
        model = build("qwen2")
        prune(model, TOKENS, shots=2, **options)
        return torch.cat([matrix.flatten() for matrix in matrices(model).values()])

    sampled = weights(fisher="sampled", seed=3)
    assert torch.equal(sampled, weights(fisher="sampled", seed=3))
    assert not torch.equal(sampled, weights(fisher="sampled", seed=4))
    assert not torch.equal(sampled, weights(fisher="empirical", seed=3))


def test_a_schedule_removes_more_in_the_early_shots():
    options = {"structure": "unstructured", "method": "magnitude", "sparsity": 0.4, "shots": 4}
    for schedule, targets in ((1.0, [0.1, 0.2, 0.3, 0.4]), (2.0, [0.175, 0.3, 0.375, 0.4])):
        report = prune(build("llama"), TOKENS, schedule=schedule, **options)
        assert [shot.target_sparsity for shot in report.shots] == pytest.approx(targets)
        assert [shot.sparsity for shot in report.shots] == pytest.approx(targets, abs=1e-3)


def test_sampled_labels_are_fresh_in_every_shot(monkeypatch):
    seeds = []

    def spy(*args, **options):
        seeds.append((options["fisher"], options["seed"]))
        return estimate_curvature(*args, **options)

    monkeypatch.setattr("llm_surgeon.shots.run.estimate_curvature", spy)
    prune(build("llama"), TOKENS, method="k-obd", fisher="sampled", shots=3, seed=5)
    assert seeds == [("sampled", 6), ("sampled", 7), ("sampled", 8)]


def test_padding_does_not_change_what_is_pruned():
    padded = torch.nn.functional.pad(TOKENS, (0, 5), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(TOKENS), (0, 5)).bool()
    plain, with_padding = build("llama"), build("llama")
    # Rounding must not decide where the solver stops, nor draw labels; of a sequential update see its own tests.
    options = {"update": "joint", "shots": 1, "fisher": "empirical", "tolerance": 1e-8}
    prune(plain, TOKENS, **options)
    prune(with_padding, Calibration(padded, mask), **options)
    for name, matrix in matrices(plain).items():
        torch.testing.assert_close(matrix, matrices(with_padding)[name], rtol=1e-3, atol=1e-5)


def test_flags_gradients_and_hooks_are_left_as_they_were():
    model = build("llama")
    model.train()
    parameters = dict(model.named_parameters())
    next(iter(parameters.values())).requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    prune(model, TOKENS, shots=1)
    assert model.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


@pytest.mark.parametrize("error", [NumericalError("boom"), KeyboardInterrupt()])
def test_a_failure_in_a_later_shot_restores_every_weight(error):
    class Fail(Progress):
        def shot(self, index):
            if index == 2:
                raise error

    model = build("opt")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(type(error)):
        prune(model, TOKENS, shots=3, progress=Fail())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_bfloat16_models_are_pruned_in_place():
    model = build("llama", dtype=torch.bfloat16)
    report = prune(model, TOKENS, shots=1)
    assert report.sparsity == 0.5
    for layer in report.layers:
        gone = matrices(model)[layer.name] == 0.0
        assert int(gone.sum()) >= layer.removed


@pytest.mark.parametrize(
    "options, message",
    [
        ({"structure": "2:5"}, "2:5.*widths divisible by 5.*has 32"),
        ({"structure": "two-four"}, "unknown structure 'two-four'"),
        ({"structure": "unstructured", "sparsity": 1.0}, r"sparsity must be a number in \(0, 1\)"),
        ({"structure": "unstructured", "sparsity": 0.0}, "sparsity must be"),
        ({"config": PruneConfig(), "shots": 2}, "not both"),
    ],
)
def test_bad_requests_change_nothing(options, message):
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        prune(model, TOKENS, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unknown_options_are_input_errors():
    model = build("llama")
    with pytest.raises(InputError, match=r"unknown option 'shot': do you mean 'shots'\?"):
        prune(model, TOKENS, shot=1)
    with pytest.raises(InputError, match="unknown option 'colour': choose among"):
        prune_checkpoint("model", "out", colour=1)


def test_bad_calibration_is_refused():
    for calibration in (torch.empty(0, 16, dtype=torch.long), TOKENS.float(), [], TOKENS[:, :1]):
        with pytest.raises(InputError):
            prune(build("llama"), calibration)


def test_nan_in_weights_and_activations_is_named():
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj"):
        prune(model, TOKENS)
    model = build("llama")
    model.model.layers[0].input_layernorm.weight.data.fill_(float("inf"))
    with pytest.raises(NumericalError, match=r"^model\.layers\.0\.input_layernorm\.weight holds NaN or infinity$"):
        prune(model, TOKENS)
    model.model.layers[0].input_layernorm.weight.data.fill_(3e38)  # finite, and products with it are not
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj.*batch 1 of"):
        prune(model, TOKENS)


def test_an_update_that_is_not_finite_is_named_and_taken_back(monkeypatch):
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    calls = itertools.count()

    def broken(weight, *_):
        return torch.full_like(weight, float("inf") if next(calls) == 9 else 0.0)

    monkeypatch.setattr(llm_surgeon.methods.update, "independent_update", broken)
    with pytest.raises(NumericalError, match=r"update of model\.layers\.1\.self_attn\.v_proj holds NaN or infinity"):
        prune(model, TOKENS, shots=1, update="independent")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_fused_experts_are_refused():
    with pytest.raises(InputError, match="expert"):
        prune(build("mixtral"), TOKENS)


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "2:4"},
        {"structure": "2:4", "update": "chunked"},
        {"structure": "unstructured", "method": "k-obd"},
        {"structure": "rows-columns", "sparsity": 0.2, "shots": 1},
        {"structure": "groups", "sparsity": 0.3, "shots": 1},
        {"structure": "2:4", "gradient_steps": 1, "shots": 1},
        {"structure": "2:4", "method": "sparsegpt"},
        {"structure": "width", "sparsity": 0.3, "shots": 1},
        {"structure": "layers", "sparsity": 0.5, "shots": 1},
        {"structure": "2:4", "kron_rank": 2, "shots": 1},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_float64_models_are_pruned_as_float32_ones_are(options):
    ids = torch.randint(VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for dtype in (torch.float32, torch.float64):
        model = build("llama", dtype)
        prune(model, ids, **options)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        losses.append(mean_loss(model, Calibration(ids), 2))
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
