"""Models with every other weight zero, text that can be learned, and options of short recoveries."""

import torch

from llm_surgeon.models.decoder import find_decoder
from tests.surgeon.tiny_models import VOCABULARY, build

OPTIONS = {"steps": 12, "batch_size": 4, "eval_every": 4, "rank": 4, "alpha": 8.0}


def text_windows(count, seed=0):
    """Sequences with something to learn: every token follows from the one before it."""
    starts = torch.randint(1, VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (starts * 3 ** torch.arange(16)) % 61 + 1


WINDOWS, HELD_OUT = text_windows(64), text_windows(8, seed=1)


def half_zero(name):
    """Every other weight of every linear zero, in a pattern that differs from row to row."""
    model = build(name)
    for linear in find_decoder(model).linears:
        weight = linear.module.weight.data
        rows, columns = torch.meshgrid(*map(torch.arange, weight.shape), indexing="ij")
        weight[(rows + columns) % 2 == 0] = 0.0
    return model


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
