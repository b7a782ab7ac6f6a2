"""Passes through a model leave it as it was, and compute what they say."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import NumericalError
from llm_surgeon.isolation import plain_arithmetic
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.passes import (
    compute_dtype,
    evaluation_mode,
    frozen,
    mean_loss,
    run_model,
    starting_at,
    to_list,
)
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

IDS = torch.randint(0, VOCABULARY, (5, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fails", [False, True])
def test_flags_are_restored_each_to_its_own(fails: bool) -> None:
    model = build("opt").train()
    model.model.decoder.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    training = [module.training for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    try:
        with evaluation_mode(model), frozen(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            if fails:
                raise RuntimeError("in between")
    except RuntimeError:
        assert fails
    assert [module.training for module in model.modules()] == training
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert True in training and False in training and {True, False} == set(gradients)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", [None, 1])
def test_gradients_flow_from_where_they_start(name: str, start: int | None) -> None:
    model = build(name)
    blocks = find_decoder(model).blocks
    module = model.get_input_embeddings() if start is None else blocks[start]
    reached: dict[int, bool] = {}
    hooks = [
        block.register_forward_hook(lambda _, args, y, depth=depth: reached.update({depth: _tensor(y).requires_grad}))
        for depth, block in enumerate(blocks)
    ]
    with frozen(model), starting_at(module), torch.enable_grad():
        logits = run_model(model, IDS, None).logits
    assert logits.requires_grad and reached == {0: start is None, 1: True}
    for hook in hooks:
        hook.remove()
    with frozen(model), torch.enable_grad():
        assert not run_model(model, IDS, None).logits.requires_grad


def _tensor(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_counted_from_the_first_real_token(name: str) -> None:
    model = build(name, torch.float64).eval()
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[:, :2] = False
    alone = run_model(model, IDS[:, 2:], None).logits
    torch.testing.assert_close(run_model(model, IDS, mask).logits[:, 2:], alone, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_mean_loss_is_of_all_tokens(batch_size: int) -> None:
    model = build("llama", torch.float64)
    logits = model(IDS).logits[:, :-1].flatten(0, 1)
    expected = functional.cross_entropy(logits, IDS[:, 1:].flatten()).item()
    assert mean_loss(model, Calibration(IDS), batch_size) == pytest.approx(expected, rel=1e-6)
    model.lm_head.weight.data[0, 0] = torch.inf
    with pytest.raises(NumericalError, match=r"NaN or infinity in the loss \(batch 1 of"):
        mean_loss(model, Calibration(IDS), batch_size)


def test_values_of_scalars() -> None:
    assert to_list([torch.tensor(1.5), torch.tensor(2.0)]) == [1.5, 2.0] and to_list([]) == []


def test_passes_in_bfloat16_see_weights_that_changed() -> None:
    model, data = build("llama"), Calibration(IDS)
    losses = []
    with plain_arithmetic():
        for _ in range(2):
            losses.append([mean_loss(model, data, 2, dtype) for dtype in (None, torch.bfloat16)])
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight.mul_(3.0)
    assert losses[0][0] != pytest.approx(losses[1][0], rel=1e-2)
    for exact, rounded in losses:
        assert rounded == pytest.approx(exact, rel=2e-3) and rounded != exact


def test_the_dtype_of_passes() -> None:
    model, cpu = build("llama"), torch.device("cpu")
    assert compute_dtype("auto", model, cpu) is compute_dtype("float32", model, cpu) is None
    assert compute_dtype("bfloat16", model, cpu) == torch.bfloat16
    assert compute_dtype("bfloat16", model.half(), cpu) is compute_dtype("bfloat16", model.double(), cpu) is None
