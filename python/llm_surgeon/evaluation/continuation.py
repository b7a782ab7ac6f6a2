"""Greedy continuations of text by a causal language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_surgeon.isolation import plain_arithmetic
from llm_surgeon.models.passes import evaluation_mode
from llm_surgeon.models.wrappers import unwrapped


@plain_arithmetic()
@torch.no_grad()
def continuations(model: Any, prompts: Tensor, tokens: int) -> Tensor:
    """The most likely next ``tokens`` of every prompt, each appended before the next is chosen; int64 ``[n, tokens]``.

    Without a cache, whose form differs between models: one pass a token.

    Args:
        prompts: integer token ids ``[n, T]``; ``T + tokens`` positions must be known to the model.
    """
    ids = prompts.to(unwrapped(model).get_input_embeddings().weight.device).long()
    with evaluation_mode(model):
        for _ in range(tokens):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True).to(ids.device)], dim=1)
    return ids[:, prompts.shape[1] :].cpu()
