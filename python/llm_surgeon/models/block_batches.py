"""Calibration batches on their way through the decoder, a block at a time."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from llm_surgeon.models.decoder import Decoder
from llm_surgeon.models.passes import run_model


@dataclass
class BlockBatch:
    """A calibration batch on its way through the blocks."""

    hidden: Tensor  # the next block's input  [batch, seqlen, hidden size]
    mask: Tensor | None  # bool [batch, seqlen], False = padding
    arguments: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]  # what each block gets besides

    @property
    def tokens(self) -> int:
        return self.hidden.shape[:-1].numel() if self.mask is None else int(self.mask.sum())

    def run(self, block: nn.Module, like: nn.Module | None = None) -> Tensor:
        """Output of ``block``, or of another block with the arguments of ``like``."""
        args, kwargs = self.arguments[like or block]
        output = block(self.hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def record_batch(model: PreTrainedModel, decoder: Decoder, input_ids: Tensor, mask: Tensor | None) -> BlockBatch:
    """Run the model once and note each block's arguments: masks and rotary embeddings may differ."""
    inputs: list[Tensor] = []  # of the first block only
    arguments: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = {key: _without_cache(value) for key, value in kwargs.items() if key != "hidden_states"}
        if not inputs:
            inputs.append(args[0] if args else kwargs["hidden_states"])
        arguments[block] = (tuple(map(_without_cache, args[1:])), others)

    with ExitStack() as hooks:
        for block in decoder.blocks:
            hooks.enter_context(block.register_forward_pre_hook(note, with_kwargs=True))
        run_model(model.base_model, input_ids, mask)  # not the model: its logits are large and not needed
    return BlockBatch(inputs[0], mask, arguments)


def _without_cache(value: Any) -> Any:
    return None if isinstance(value, Cache) else value
