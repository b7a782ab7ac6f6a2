"""Fused parts in a bfloat16 model on a CUDA device: its factors are as close to float32's as those of stock parts."""

from __future__ import annotations

import contextlib
import copy
from importlib.resources import as_file, files

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from llm_surgeon.curvature import estimate as capture
from llm_surgeon.data.calibration import Calibration, calibration_windows
from llm_surgeon.data.documents import read_text
from llm_surgeon.data.tokens import tokenize
from llm_surgeon.models.decoder import find_decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


DRAWS = 4


def trained() -> tuple[PreTrainedModel, list[Calibration]]:
    """The demo's model and draws of its text."""
    with as_file(files("llm_surgeon.demo") / "assets") as assets:
        model = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.bfloat16).cuda()
        text = read_text(str(assets / "wikitext2-train-slice.txt"), "calibration")
        tokens = tokenize(text, AutoTokenizer.from_pretrained(assets / "model"))
    return model, [calibration_windows(tokens, 16, 256, seed=seed) for seed in range(DRAWS)]


def wide() -> tuple[PreTrainedModel, list[Calibration]]:
    """Blocks of Llama-2-7B's widths, with random weights."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=3), dtype=torch.bfloat16)
    return model, [Calibration(torch.randint(model.config.vocab_size, (4, 512))) for _ in range(DRAWS)]


def factors(model: PreTrainedModel, calibration: Calibration) -> dict[str, Tensor]:
    decoder = find_decoder(model)
    curvature = capture.estimate_curvature(model, decoder, calibration, batch_size=4)
    return {
        f"{kind} of {linear.name}": factor
        for linear in decoder.linears
        for kind, factor in zip("GA", curvature.factors(linear), strict=True)
    }


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> Tensor:
    """Relative Frobenius errors of all factors."""
    return torch.stack([(found[name] - exact[name]).norm() / exact[name].norm() for name in exact])


@pytest.mark.parametrize("build", [trained, wide])
def test_factors_are_as_good_as_with_stock_parts(build, monkeypatch):
    model, draws = build()
    single = copy.deepcopy(model).float()
    fused = [factors(model, draw) for draw in draws]
    monkeypatch.setattr(capture, "fused_pointwise", lambda _: contextlib.nullcontext())
    stock = [factors(model, draw) for draw in draws]
    exact = [factors(single, draw) for draw in draws]
    fused_errors = torch.stack([errors(*pair) for pair in zip(fused, exact, strict=True)])
    stock_errors = torch.stack([errors(*pair) for pair in zip(stock, exact, strict=True)])
    assert stock_errors.min() > 1e-4  # bfloat16's
    assert fused_errors.mean() <= 1.02 * stock_errors.mean()
    # The rounding of one factor in one draw is luck: the stock error of the same factor varies 1.7-fold between draws.
    assert (fused_errors.square().mean(0).sqrt() <= 1.5 * stock_errors.square().mean(0).sqrt()).all()
