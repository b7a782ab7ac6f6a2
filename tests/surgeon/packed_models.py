"""Tiny 2:4 models for tests."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.formats import packed_linear
from llm_surgeon.inference import merged_linears
from llm_surgeon.models.decoder import find_decoder
from surgeon_kernels import nm_select, unpack_2_4
from tests.surgeon.tiny_models import build

IDS = torch.arange(12).view(2, 6) * 5


def build_2_4(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model whose decoder's linears are 2:4 by magnitude."""
    model = build(name)
    with torch.no_grad():
        for linear in find_decoder(model).linears:
            weight = linear.module.weight
            matrix = weight.T if isinstance(linear.module, Conv1D) else weight
            matrix.masked_fill_(nm_select(matrix.abs(), 2, 4), 0.0)
    return model.to(dtype)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


def continuation(model: PreTrainedModel, **options) -> list[list[int]]:
    """Greedy tokens after two prompts; tiny random models never end by themselves here."""
    ids = IDS.to(model.device)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False, **options
    ).tolist()


def pretend_kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From here on packed layers of 16 bits hold fragments, as they do on CUDA; the outputs of every launch."""
    rows: list[int] = []

    def linear_2_4(x, weight, bias=None):
        rows.append(weight.rows)
        return functional.linear(x, unpack_2_4(weight.packed()), bias)

    prepare = packed_linear.prepare_2_4
    monkeypatch.setenv("SURGEON_TUNE", "0")
    monkeypatch.setattr(packed_linear, "DENSE_BELOW", 0)
    monkeypatch.setattr(packed_linear, "_may_have_kernel", lambda packed: packed.values.element_size() == 2)
    for module in (packed_linear, merged_linears):
        monkeypatch.setattr(module, "prepare_2_4", lambda packed, **_: prepare(packed)._replace(kernel=True))
        monkeypatch.setattr(module, "linear_2_4", linear_2_4)
    return rows
