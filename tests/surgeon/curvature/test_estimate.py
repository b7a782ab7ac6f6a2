from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.curvature.estimate import Curvature, estimate_curvature
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import NumericalError
from llm_surgeon.models.decoder import Decoder, find_decoder
from llm_surgeon.models.passes import mean_loss
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
    monkeypatch.setattr("llm_surgeon.models.loss.CHUNK", 7 * VOCABULARY)
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


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_float32_models_in_bfloat16_passes(name: str, checkpoint: bool) -> None:
    model = build(name)
    decoder = find_decoder(model)
    mask = torch.ones(16, 12, dtype=torch.bool)
    mask[3, 8:] = False
    data = Calibration(tokens(16, 12), mask)
    options = {"batch_size": 5, "squared_norms": True, "checkpoint_activations": checkpoint}
    expected = estimate_curvature(model, decoder, data, **options)
    rounded = build(name, torch.bfloat16)
    half = all_factors(estimate_curvature(rounded, find_decoder(rounded), data, **options), decoder)
    seen: set[torch.dtype] = set()
    hook = decoder.linears[-1].module.register_forward_hook(lambda _, args, y: seen.add(y.dtype))
    found = estimate_curvature(model, decoder, data, **options, dtype=torch.bfloat16)
    hook.remove()
    assert torch.bfloat16 in seen and not torch.is_autocast_enabled("cpu")
    assert found.loss == pytest.approx(expected.loss, rel=1e-3)
    assert mean_loss(model, data, 3, torch.bfloat16) == pytest.approx(found.loss, rel=1e-4)
    errors, of_rounded = [], []
    for linear in decoder.linears:
        triples = zip(found.factors(linear), expected.factors(linear), half[linear.name], strict=True)
        for factor, exact, worse in triples:
            assert factor is not None and exact is not None and factor.dtype == torch.float32
            errors.append(float((factor - exact).norm() / exact.norm()))
            of_rounded.append(float((worse - exact).norm() / exact.norm()))
        norms, exact = found.squared_norms[linear.name], expected.squared_norms[linear.name]
        assert (norms - exact).norm() < 0.15 * exact.norm() and bool((norms[3, 8:] == 0.0).all())
    # No farther from those of float32 than the factors of a bfloat16 model are, but for luck.
    assert 0 < min(errors) < max(errors) < 0.1 and sum(errors) < 1.2 * sum(of_rounded)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), build(name).parameters(), strict=True))


def test_heads_that_cap_their_logits_in_bfloat16_passes() -> None:
    model = build("llama")
    model.lm_head.register_forward_hook(lambda _, args, z: 0.5 * torch.tanh(z / 0.5))
    decoder, data = find_decoder(model), Calibration(tokens(16, 12))
    expected, found = (estimate_curvature(model, decoder, data, batch_size=4, dtype=d) for d in (None, torch.bfloat16))
    for linear in decoder.linears:
        for factor, exact in zip(found.factors(linear), expected.factors(linear), strict=True):
            assert factor is not None and exact is not None
            assert (factor - exact).norm() < 0.05 * exact.norm(), linear.name


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


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_squared_norms_of_every_tokens_gradients(name: str) -> None:
    model = build(name)
    decoder = find_decoder(model)
    ids = tokens(5, 12)
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[2, 7:] = False
    options = {"batch_size": 2, "squared_norms": True, "blocks_per_pass": 1, "checkpoint_activations": True}
    curvature = estimate_curvature(model, decoder, Calibration(ids, mask), **options)
    alone = estimate_curvature(model, decoder, Calibration(ids[2:3, :7]), batch_size=1, squared_norms=True)
    for linear in decoder.linears:
        norms = curvature.squared_norms[linear.name]
        assert norms.shape == (5, 12)
        assert norms.dtype == torch.float32
        assert bool((norms[2, 7:] == 0).all())
        torch.testing.assert_close(norms[2, :7], alone.squared_norms[linear.name][0], **CLOSE)
        torch.testing.assert_close(norms.sum() / curvature.tokens, curvature.output_factor(linear).trace(), **CLOSE)
    assert estimate_curvature(model, decoder, Calibration(ids), batch_size=2).squared_norms == {}


def test_norms_alone_need_no_output_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    decoder, data = find_decoder(model), Calibration(tokens(5, 12))
    options = {"batch_size": 2, "squared_norms": True, "inputs": False}
    whole = estimate_curvature(model, decoder, data, **options)
    monkeypatch.setattr("llm_surgeon.curvature.estimate.gram_accumulate_", lambda *_, **__: pytest.fail("summed"))
    found = estimate_curvature(model, decoder, data, output_factors=False, **options)
    assert found.loss == whole.loss and found.squared_norms.keys() == whole.squared_norms.keys()
    assert all(torch.equal(norms, whole.squared_norms[name]) for name, norms in found.squared_norms.items())
    decoder.linears[5].module.register_forward_hook(lambda _, args, y: y.register_hook(lambda g: g / 0.0) and None)
    with pytest.raises(NumericalError, match=rf"^NaN or infinity in the gradients of {decoder.linears[5].name} "):
        estimate_curvature(model, decoder, data, output_factors=False, **options)


def test_the_input_factors_can_be_left_out() -> None:
    model = build("opt")
    decoder = find_decoder(model)
    with_inputs, without = (
        estimate_curvature(model, decoder, Calibration(tokens(3, 12)), batch_size=2, inputs=inputs)
        for inputs in (True, False)
    )
    for linear in decoder.linears:
        assert torch.equal(without.output_factor(linear), with_inputs.factors(linear)[0])
    assert without.loss == with_inputs.loss
