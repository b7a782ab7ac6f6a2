"""The sequences that a model takes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, Gemma3Config

from llm_surgeon import prune
from llm_surgeon.errors import InputError
from llm_surgeon.models.limits import choose_seqlen, positions
from tests.surgeon.tiny_models import VOCABULARY, build


def test_the_positions_of_a_model_of_several_modalities_are_those_of_its_text() -> None:
    config = Gemma3Config(text_config={"max_position_embeddings": 256, "num_hidden_layers": 2})

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config

    assert positions(Model()) == 256 and choose_seqlen(None, Model()) == 256
    with pytest.raises(InputError, match="seqlen 1000 is longer than the 256 positions of the model"):
        choose_seqlen(1000, Model())
    assert choose_seqlen(None, build("gpt2")) == 64 and AutoConfig.for_model("gpt2").n_positions == 1024


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_ids_that_do_not_fit_the_model_are_refused(name: str) -> None:
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for ids, message in (
        (torch.zeros(2, 65, dtype=torch.int64), "calibration sequences have 65 tokens, and the model has 64 positions"),
        (torch.full((2, 8), VOCABULARY), "calibration sequences hold token id 64, and the model has 64 embeddings"),
    ):
        with pytest.raises(InputError, match=message):
            prune(model, ids, method="magnitude")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
