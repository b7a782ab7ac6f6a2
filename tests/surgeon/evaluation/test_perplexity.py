from __future__ import annotations

import math

import pytest
import torch

from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.evaluation.perplexity import perplexity
from tests.surgeon.tiny_models import VOCABULARY, build


def windows_of(count: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, seqlen), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_perplexity_against_float64(name: str, batch_size: int | None) -> None:
    model, windows = build(name), windows_of(5, 12)
    reference = build(name).double()
    total = 0.0
    with torch.no_grad():
        for window in windows:
            probabilities = reference(window[None]).logits[0].softmax(-1)
            for position in range(11):
                total -= math.log(probabilities[position, window[position + 1]])
    assert perplexity(model, windows, batch_size) == pytest.approx(math.exp(total / (5 * 11)), rel=1e-5)


def test_windows_longer_than_a_chunk() -> None:
    model = build("gpt2")
    model.transformer.wpe = torch.nn.Embedding.from_pretrained(torch.zeros(1500, 32))
    model.config.n_positions = 1500
    windows = windows_of(2, 1500)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    nll = -logits.log_softmax(-1).gather(-1, windows[:, 1:, None])
    assert perplexity(model, windows, 1) == pytest.approx(float(nll.mean().exp()), rel=1e-5)


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = build("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, windows_of(3, 4).int()) == pytest.approx(VOCABULARY, rel=1e-6)


def test_state_of_the_model_is_left_alone() -> None:
    model = build("opt").train()
    model.model.decoder.layers[1].eval()
    flags = [module.training for module in model.modules()]
    for layer in model.model.decoder.layers:
        layer.dropout = 0.5
    seen: list[tuple[int, int]] = []
    values = {perplexity(model, windows_of(5, 6), 2, progress=lambda *step: seen.append(step)) for _ in range(2)}
    assert len(values) == 1  # no dropout
    assert seen == [(2, 5), (4, 5), (5, 5)] * 2
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_nan_names_the_window() -> None:
    model = build("llama")
    windows = windows_of(4, 6) % 32
    windows[2, 3] = 63
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = math.nan
    with pytest.raises(NumericalError, match="evaluation window 2 of 4"):
        perplexity(model, windows, 2)
    assert not model.training


def test_infinite_perplexity_is_not_an_error() -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, windows_of(2, 6)) == math.inf


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.tensor([[1, VOCABULARY]]), "token id 64, and the model has 64 embeddings"),
        (torch.tensor([[1, -1]]), "negative token id -1"),
        (torch.ones(1, 65, dtype=torch.int64), "evaluation windows have 65 tokens, and the model has 64 positions"),
        (torch.zeros(0, 4, dtype=torch.int64), "at least 2 tokens"),
        (torch.zeros(4, 1, dtype=torch.int64), "at least 2 tokens"),
        (torch.arange(4), "evaluation windows must be"),
        (torch.rand(2, 4), "integers"),
    ],
)
def test_windows_that_are_refused(windows: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        perplexity(build("llama"), windows)
