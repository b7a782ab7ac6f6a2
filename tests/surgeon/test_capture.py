from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.capture import Curvature, estimate_curvature, mean_loss
from llm_surgeon.data import Calibration
from llm_surgeon.errors import InputError, NumericalError, UnsupportedModelError
from llm_surgeon.models import Decoder, find_decoder
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

# The models compute their norms and rotations in float32 whatever the dtype.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def brute_force(model: PreTrainedModel, sequences: list[Tensor]) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """Mean loss and (G, A) of every linear: each sequence alone, gradients by retain_grad, dense sums."""
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        y.retain_grad()
        x = x.detach().reshape(-1, x.shape[-1])
        inputs.setdefault(name, []).append(F.pad(x, (0, 1), value=1.0) if module.bias is not None else x)
        outputs.setdefault(name, []).append(y)

    linears = {linear.name: linear.module for linear in find_decoder(model).linears}
    handles = [
        module.register_forward_hook(lambda module, args, y, name=name: keep(name, module, args[0], y))
        for name, module in linears.items()
    ]
    loss, targets = 0.0, 0
    for sequence in sequences:
        logits = model(input_ids=sequence[None]).logits[0, :-1]
        total = F.cross_entropy(logits.double(), sequence[1:], reduction="sum")
        total.backward()
        loss, targets = loss + total.item(), targets + len(sequence) - 1
    for handle in handles:
        handle.remove()
    model.zero_grad()
    N = sum(len(sequence) for sequence in sequences)
    factors = {}
    for name in linears:
        a = torch.cat(inputs[name]).double()
        g = torch.cat([y.grad.reshape(-1, y.shape[-1]) for y in outputs[name]]).double()
        assert len(a) == len(g) == N
        factors[name] = (torch.einsum("ni,nj->ij", g, g) / N, torch.einsum("ni,nj->ij", a, a) / N)
    return loss / targets, factors


def assert_factors(curvature: Curvature, decoder: Decoder, expected: dict[str, tuple[Tensor, Tensor]], **close) -> None:
    for linear in decoder.linears:
        G, A = curvature.factors(linear)
        assert G is not None
        torch.testing.assert_close(G, expected[linear.name][0].to(G.dtype), **(close or CLOSE), msg=f"G {linear.name}")
        torch.testing.assert_close(A, expected[linear.name][1].to(A.dtype), **(close or CLOSE), msg=f"A {linear.name}")


def all_factors(curvature: Curvature, decoder: Decoder) -> dict[str, tuple[Tensor, Tensor]]:
    return {linear.name: curvature.factors(linear) for linear in decoder.linears}  # type: ignore[misc]


@pytest.mark.parametrize("name", NAMES)
def test_factors_are_those_of_brute_force(name: str) -> None:
    model = build(name, torch.float64)
    decoder = find_decoder(model)
    ids = tokens(5, 9)
    loss, expected = brute_force(model, list(ids))
    curvature = estimate_curvature(model, decoder, Calibration(ids), batch_size=2)
    assert curvature.tokens == 45
    assert curvature.loss == pytest.approx(loss, rel=1e-6)
    assert mean_loss(model, Calibration(ids), 3) == pytest.approx(loss, rel=1e-6)
    assert_factors(curvature, decoder, expected)
    G, A = curvature.factors(decoder.linears[-1])
    assert G is not None and G.dtype == A.dtype == torch.float64
    assert G.trace() > 0 and A.trace() > 0


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_counts_for_nothing(name: str, side: str) -> None:
    model = build(name, torch.float64)
    decoder = find_decoder(model)
    sequences = [tokens(length, seed=length) for length in (9, 4, 7, 2)]
    ids = tokens(4, 9, seed=99)  # padding holds arbitrary tokens
    mask = torch.zeros(4, 9, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        part = slice(0, len(sequence)) if side == "right" else slice(9 - len(sequence), 9)
        ids[row, part], mask[row, part] = sequence, True
    loss, expected = brute_force(model, sequences)
    calibration = Calibration(ids, mask)
    curvature = estimate_curvature(model, decoder, calibration, batch_size=3)
    assert curvature.tokens == 22
    assert curvature.loss == pytest.approx(loss, rel=1e-6)
    assert mean_loss(model, calibration, 4) == pytest.approx(loss, rel=1e-6)
    assert_factors(curvature, decoder, expected)


def test_a_gap_in_the_mask_is_no_target() -> None:
    model = build("llama", torch.float64)
    ids, mask = tokens(1, 6), torch.tensor([[True, True, False, True, True, False]])
    logits = model(input_ids=ids, attention_mask=mask, position_ids=torch.tensor([[0, 1, 1, 2, 3, 3]])).logits[0]
    expected = F.cross_entropy(logits[[0, 3]], ids[0, [1, 4]]).item()
    assert mean_loss(model, Calibration(ids, mask), 1) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batch_size_does_not_matter(batch_size: int) -> None:
    model = build("qwen2", torch.float64)
    decoder = find_decoder(model)
    calibration = Calibration(tokens(7, 8))
    reference = all_factors(estimate_curvature(model, decoder, calibration, batch_size=2), decoder)
    curvature = estimate_curvature(model, decoder, calibration, batch_size=batch_size)
    assert_factors(curvature, decoder, reference)


def test_long_batches_are_cut_into_chunks_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.float64)
    decoder = find_decoder(model)
    calibration = Calibration(tokens(3, 11))
    whole = estimate_curvature(model, decoder, calibration, batch_size=3)
    monkeypatch.setattr("llm_surgeon.capture._CHUNK", 7)
    cut = estimate_curvature(model, decoder, calibration, batch_size=3)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-12)
    assert_factors(cut, decoder, all_factors(whole, decoder), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("with_bias", ["q_proj", "k_proj"])
def test_a_shared_input_of_layers_with_and_without_bias(with_bias: str) -> None:
    model = build("llama", torch.float64)
    attention = model.model.layers[0].self_attn
    getattr(attention, with_bias).bias = nn.Parameter(torch.randn(getattr(attention, with_bias).out_features).double())
    decoder = find_decoder(model)
    ids = tokens(3, 7)
    curvature = estimate_curvature(model, decoder, Calibration(ids), batch_size=3)
    assert_factors(curvature, decoder, brute_force(model, list(ids))[1])
    sizes = {linear.kind: curvature.factors(linear)[1].shape[0] for linear in decoder.linears[:3]}
    assert sizes == {f"self_attn.{kind}": 32 + (kind == with_bias) for kind in ("q_proj", "k_proj", "v_proj")}


def test_bfloat16_models_accumulate_in_float32() -> None:
    model = build("llama", torch.bfloat16)
    decoder = find_decoder(model)
    ids = tokens(4, 12)
    loss, expected = brute_force(model, list(ids))
    curvature = estimate_curvature(model, decoder, Calibration(ids), batch_size=1)
    assert curvature.loss == pytest.approx(loss, rel=1e-3)
    for linear in decoder.linears:
        for factor, exact in zip(curvature.factors(linear), expected[linear.name], strict=True):
            assert factor is not None and factor.dtype == torch.float32
            assert (factor - exact).norm() < 0.05 * exact.norm()


def test_factors_are_new_tensors() -> None:
    model = build("qwen2")
    decoder = find_decoder(model)
    curvature = estimate_curvature(model, decoder, Calibration(tokens(2, 6)), batch_size=2)
    for linear in decoder.linears:
        first = curvature.factors(linear)
        copies = [factor.clone() for factor in first]
        for factor in first:
            assert not factor.requires_grad
            factor.zero_()
        assert all(torch.equal(x, y) for x, y in zip(copies, curvature.factors(linear), strict=True))


def test_without_gradients_there_is_no_G() -> None:
    model = build("opt", torch.float64)
    decoder = find_decoder(model)
    calibration = Calibration(tokens(3, 6))
    full = estimate_curvature(model, decoder, calibration, batch_size=2)
    only_a = estimate_curvature(model, decoder, calibration, batch_size=2, gradients=False)
    assert only_a.loss == pytest.approx(full.loss, rel=1e-12)
    for linear in decoder.linears:
        G, A = only_a.factors(linear)
        assert G is None
        torch.testing.assert_close(A, full.factors(linear)[1])


def test_sampled_labels_depend_on_the_seed_alone() -> None:
    model = build("llama", torch.float64)
    decoder = find_decoder(model)
    calibration = Calibration(tokens(4, 8))

    def last_G(fisher: str, seed: int) -> Tensor:
        curvature = estimate_curvature(model, decoder, calibration, batch_size=2, fisher=fisher, seed=seed)
        assert curvature.loss == pytest.approx(data_loss, rel=1e-12)
        G, _ = curvature.factors(decoder.linears[-1])
        assert G is not None
        return G

    data_loss = mean_loss(model, calibration, 4)
    first = last_G("sampled", 3)
    torch.rand(5)  # the global generator plays no part
    assert torch.equal(first, last_G("sampled", 3))
    assert (first - last_G("sampled", 4)).norm() > 0.05 * first.norm()
    assert (first - last_G("empirical", 3)).norm() > 0.05 * first.norm()


def test_sampled_labels_give_the_fisher_of_the_models_own_distribution() -> None:
    """For the last linear, after which positions do not mix: E[G] = mean_n Jₙᵀ (diag pₙ - pₙ pₙᵀ) Jₙ."""
    model = build("llama", torch.float64)
    decoder = find_decoder(model)
    last = decoder.linears[-1]
    sequence = tokens(1, 3)
    jacobians, logits = jacobian_of_last(model, last.module, sequence)
    p = logits.softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = torch.einsum("nvi,nvw,nwj->ij", jacobians, fisher, jacobians) / 3
    repeated = Calibration(sequence.repeat(1500, 1))
    G, _ = estimate_curvature(model, decoder, repeated, batch_size=500, fisher="sampled").factors(last)
    assert G is not None
    assert (G - exact).norm() < 0.1 * exact.norm()
    empirical, _ = estimate_curvature(model, decoder, Calibration(sequence), batch_size=1).factors(last)
    assert empirical is not None and (empirical - exact).norm() > 0.5 * exact.norm()


def jacobian_of_last(model: PreTrainedModel, module: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """d logits_n / d y_n ``[n, V, R]`` for the last linear's output y, and the logits ``[n, V]``."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, y: kept.append(y))
    logits = model(input_ids=ids).logits[0]
    handle.remove()
    rows = [torch.autograd.grad(logits[:, v].sum(), kept[0], retain_graph=True)[0][0] for v in range(VOCABULARY)]
    return torch.stack(rows, dim=1), logits.detach()


def state(model: PreTrainedModel) -> Iterator[object]:
    for module in model.modules():
        yield module.training, len(module._forward_hooks), len(module._forward_pre_hooks)
    for parameter in model.parameters():
        yield parameter.requires_grad, parameter.grad is None


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, gradients: bool) -> None:
    model = build("llama").train()
    decoder = find_decoder(model)
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    if fails:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    before = list(state(model))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    calibration = Calibration(tokens(2, 6))
    with torch.no_grad():  # the caller's mode is of no matter and comes back too
        if fails:
            with pytest.raises(NumericalError):
                estimate_curvature(model, decoder, calibration, batch_size=1, gradients=gradients)
        else:
            estimate_curvature(model, decoder, calibration, batch_size=1, gradients=gradients)
        assert not torch.is_grad_enabled()
    assert list(state(model)) == before
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0, equal_nan=True)


def test_no_weight_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    decoder = find_decoder(model)
    asked: list[bool] = []
    original = type(model).forward

    def forward(self, *args, **kwargs):
        asked.extend(parameter.requires_grad for parameter in self.parameters())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    estimate_curvature(model, decoder, Calibration(tokens(2, 6)), batch_size=2)
    assert len(asked) == len(list(model.parameters())) and not any(asked)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off() -> None:
    model = build("opt")
    model.config.dropout = model.model.decoder.layers[0].dropout = 0.9
    calibration = Calibration(tokens(2, 6))
    quiet = mean_loss(model, calibration, 2)
    model.train()
    assert mean_loss(model, calibration, 2) == quiet
    assert estimate_curvature(model, find_decoder(model), calibration, batch_size=2).loss == pytest.approx(quiet)
    assert model.training


def test_progress_is_told_of_every_batch() -> None:
    model = build("llama")
    seen: list[tuple[int, int]] = []
    estimate_curvature(
        model,
        find_decoder(model),
        Calibration(tokens(5, 4)),
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("poisoned", "place"),
    [
        ("model.decoder.layers.0.fc1.bias", "the inputs of model.decoder.layers.0.fc2"),
        ("model.decoder.layers.0.fc2.weight", "the inputs of model.decoder.layers.1.self_attn.q_proj"),
        ("model.decoder.layers.1.fc2.bias", "the loss"),
    ],
)
def test_nan_is_traced_to_where_it_began(poisoned: str, place: str, value: float, fisher: str) -> None:
    model = build("opt")
    decoder = find_decoder(model)
    with torch.no_grad():
        model.get_parameter(poisoned).fill_(value)
    with pytest.raises(NumericalError) as error:
        estimate_curvature(model, decoder, Calibration(tokens(4, 6)), batch_size=2, fisher=fisher)
    assert str(error.value) == f"NaN or infinity in {place} (batch 1 of 2)"


def test_nan_of_a_later_batch_is_reported_with_its_number() -> None:
    model = build("llama")
    decoder = find_decoder(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    ids = tokens(6, 5) % 7
    ids[4, 2] = 7
    with pytest.raises(NumericalError, match=r"the inputs of model\.layers\.0\.self_attn\.q_proj \(batch 3 of 3\)$"):
        estimate_curvature(model, decoder, Calibration(ids), batch_size=2)
    with pytest.raises(NumericalError, match=r"the loss \(batch 2 of 2\)$"):
        mean_loss(model, Calibration(ids), 3)


def test_nan_in_gradients_alone_names_the_last_layer_it_reached_first() -> None:
    class PoisonGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            return g * torch.nan

    model = build("llama")
    decoder = find_decoder(model)
    model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda _, args, y: PoisonGradient.apply(y))
    with pytest.raises(NumericalError, match=r"the gradients of model\.layers\.1\.self_attn\.o_proj \(batch 1 of 1\)$"):
        estimate_curvature(model, decoder, Calibration(tokens(2, 5)), batch_size=2)


def test_a_layer_without_influence_on_the_loss_is_refused() -> None:
    model = build("llama")
    decoder = find_decoder(model)
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, y: y.detach())
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.gate_proj$"):
        estimate_curvature(model, decoder, Calibration(tokens(2, 5)), batch_size=2)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (Calibration(tokens(1, 4), torch.tensor([[True, False, True, False]])), "empty"),
        (Calibration(torch.tensor([[1, VOCABULARY]])), f"token {VOCABULARY}, but the vocabulary has {VOCABULARY}"),
    ],
)
def test_unusable_data_are_refused(calibration: Calibration, message: str) -> None:
    model = build("llama")
    with pytest.raises(InputError, match=message):
        estimate_curvature(model, find_decoder(model), calibration, batch_size=2)
    with pytest.raises(InputError, match=message):
        mean_loss(model, calibration, 2)


def test_unknown_fisher_is_refused() -> None:
    model = build("llama")
    with pytest.raises(InputError, match="fisher"):
        estimate_curvature(model, find_decoder(model), Calibration(tokens(1, 4)), batch_size=1, fisher="exact")


@pytest.mark.parametrize("name", NAMES)
def test_computing_activations_again_changes_no_factor(name: str) -> None:
    model = build(name, dtype=torch.float64)
    decoder = find_decoder(model)
    ids, mask = tokens(4, 9), torch.ones(4, 9, dtype=torch.bool)
    mask[1, 5:] = False
    plain, again = (
        estimate_curvature(model, decoder, Calibration(ids, mask), batch_size=2, checkpoint_activations=checkpoint)
        for checkpoint in (False, True)
    )
    assert again.loss == plain.loss
    for linear in decoder.linears:
        for expected, actual in zip(plain.factors(linear), again.factors(linear), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0.0)
    assert not any("forward" in block.__dict__ for block in decoder.blocks)


def test_computing_activations_again_keeps_little() -> None:
    model = build("llama")
    decoder = find_decoder(model)
    kept = {}
    for checkpoint in (False, True):
        saved: list[int] = []

        def count(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            estimate_curvature(
                model, decoder, Calibration(tokens(4, 16)), batch_size=4, checkpoint_activations=checkpoint
            )
        kept[checkpoint] = sum(saved)
    assert kept[True] < 0.5 * kept[False]


def test_blocks_get_their_own_forward_back_after_an_error() -> None:
    model = build("llama")
    decoder = find_decoder(model)
    patched = decoder.blocks[0].forward
    decoder.blocks[0].forward = patched  # as a library that wraps modules leaves it
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(NumericalError):
        estimate_curvature(model, decoder, Calibration(tokens(2, 8)), batch_size=2, checkpoint_activations=True)
    assert decoder.blocks[0].__dict__["forward"] == patched
    assert "forward" not in decoder.blocks[1].__dict__
