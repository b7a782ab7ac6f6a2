"""Calibration batches on their way through the decoder, a block at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
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

    def run(self, block: nn.Module) -> Tensor:
        """Output of ``block``, of which ``hidden`` is the input."""
        args, kwargs = self.arguments[block]
        output = block(self.hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def apart(self) -> BlockBatch:
        """The same batch for another model: with containers of its own, where blocks leave something to later ones."""
        copies: dict[int, Any] = {}

        def own(value: Any) -> Any:
            if isinstance(value, (MutableMapping, MutableSequence)):
                return copies.setdefault(id(value), copy.copy(value))
            return value

        arguments = {
            block: (tuple(map(own, args)), {key: own(value) for key, value in kwargs.items()})
            for block, (args, kwargs) in self.arguments.items()
        }
        return replace(self, arguments=arguments)


def record_batches(
    model: PreTrainedModel, decoder: Decoder, windows: Iterable[tuple[Tensor, Tensor | None]]
) -> Iterator[BlockBatch]:
    """Run the model on every batch of token ids and mask, and note the blocks' arguments: masks and rotary embeddings.

    Blocks compute nothing from the second batch on, where the first batch's arguments do not depend on that.
    """
    returned: dict[nn.Module, int] = {}
    for number, window in enumerate(windows):
        if number > 0:
            yield _record(model, decoder, *window, returned)
            continue
        with ExitStack() as hooks:
            for block in decoder.blocks:
                hooks.enter_context(block.register_forward_hook(partial(_count, returned)))
            batch = _record(model, decoder, *window, {})
        if not _same_without_computing(batch, model, decoder, *window, returned):
            returned = {}
        yield batch


def _record(
    model: PreTrainedModel,
    decoder: Decoder,
    input_ids: Tensor,
    mask: Tensor | None,
    returned: Mapping[nn.Module, int],
) -> BlockBatch:
    """One batch; blocks of ``returned`` give their inputs back, in the form of so many outputs."""
    inputs: list[Tensor] = []  # of the first block only
    arguments: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = {key: _without_cache(value) for key, value in kwargs.items() if key != "hidden_states"}
        if not inputs:
            inputs.append(args[0] if args else kwargs["hidden_states"])
        arguments[block] = (tuple(map(_without_cache, args[1:])), others)

    own = {block: block.__dict__.get("forward") for block in returned}
    with ExitStack() as hooks:
        for block in decoder.blocks:
            hooks.enter_context(block.register_forward_pre_hook(note, with_kwargs=True))
        try:
            for block, count in returned.items():
                block.forward = partial(_give_back, count)
            run_model(model.base_model, input_ids, mask)  # not the model: its logits are large and not needed
        finally:
            for block, forward in own.items():
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward
    return BlockBatch(inputs[0], mask, arguments)


def _count(returned: dict[nn.Module, int], block: nn.Module, _: object, output: object) -> None:
    """Number of a block's outputs, 0 of one that is no tuple."""
    returned[block] = len(output) if isinstance(output, tuple) else 0


def _give_back(count: int, *args: Any, **kwargs: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *[None] * (count - 1)) if count else hidden


def _same_without_computing(batch: BlockBatch, *arguments: Any) -> bool:
    try:
        other = _record(*arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the model's own code makes of outputs that are missing
        return False
    if batch.arguments.keys() != other.arguments.keys():
        return False
    (ours, our_form), (theirs, their_form) = (tree_flatten(list(x.arguments.values())) for x in (batch, other))
    return our_form == their_form and all(map(_equal, ours, theirs))


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return torch.equal(x, y)
    return x is y or (type(x) is type(y) and isinstance(x, (int, float, str)) and x == y)


def _without_cache(value: Any) -> Any:
    return None if isinstance(value, Cache) else value
