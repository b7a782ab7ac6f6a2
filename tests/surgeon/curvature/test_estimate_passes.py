"""Hooked passes: traces they leave, memory they keep and their report when they fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.curvature.estimate import estimate_curvature
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import InputError, NumericalError, UnsupportedModelError
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.passes import mean_loss
from tests.surgeon.curvature.test_estimate import tokens
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build


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
