"""Activations that a forward pass keeps for its backward pass, found by a pass over a few tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from llm_surgeon.models.decoder import Decoder
from llm_surgeon.models.fused_pointwise import fused_pointwise
from llm_surgeon.models.passes import evaluation_mode, frozen, run_model, starting_at

_LENGTHS = (16, 32)


@dataclass(frozen=True)
class Activations:
    """Bytes kept for the backward pass, per token of a window of ``seqlen``; attention may make it grow with that.

    Attributes:
        everything: of the whole model.
        largest_block: of one decoder block, with what lies before and after all of them.
        inputs: of the hidden states that every block is given.
    """

    everything: float
    largest_block: float
    inputs: float


def measure_activations(model: nn.Module, decoder: Decoder, seqlen: int) -> Activations:
    """Run the model on 16 and on 32 tokens and carry what it keeps on to ``seqlen`` by ``a L + b L²``."""
    short, long = (_Kept(model, decoder, length) for length in _LENGTHS)

    def per_token(of_short: int, of_long: int) -> float:
        a, b = of_short / _LENGTHS[0], of_long / _LENGTHS[1]
        growth = max(0.0, (b - a) / (_LENGTHS[1] - _LENGTHS[0]))
        return b + growth * (seqlen - _LENGTHS[1])

    return Activations(
        per_token(short.total(), long.total()),
        max(per_token(*pair) for pair in zip(short.by_block(), long.by_block(), strict=True)),
        per_token(short.inputs, long.inputs),
    )


class _Kept:
    """Bytes kept in one pass over ``length`` tokens, by decoder block; what lies before and after them is apart."""

    def __init__(self, model: nn.Module, decoder: Decoder, length: int) -> None:
        self.inputs = 0
        self._blocks = len(decoder.blocks)
        self._depth = -1
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._bytes: dict[int, tuple[int, int]] = {pointer: (0, -1) for pointer in parameters}
        self._held: list[Tensor] = []  # so that no address is used twice
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        ids = torch.arange(length, device=embedding.weight.device)[None] % embedding.weight.shape[0]
        with (
            frozen(model),
            evaluation_mode(model),
            fused_pointwise(model),
            self._counting(decoder),
            starting_at(embedding),
            torch.enable_grad(),
            saved_tensors_hooks(self._count, _never),
        ):
            run_model(model, ids, None)
        self._held.clear()

    def total(self) -> int:
        return sum(size for size, _ in self._bytes.values())

    def by_block(self) -> list[int]:
        """Every block's bytes, with those outside the blocks added to each."""
        sizes = [0] * (self._blocks + 2)
        for size, depth in self._bytes.values():
            sizes[depth + 1] += size
        return [sizes[0] + sizes[-1] + size for size in sizes[1:-1]]

    def _count(self, tensor: Tensor) -> None:
        """Stand-in for the tensor in the graph, which no backward pass goes through: the tensor would make a cycle."""
        storage = tensor.untyped_storage()
        self._bytes.setdefault(storage.data_ptr(), (storage.nbytes(), self._depth))
        self._held.append(tensor.detach())

    @contextlib.contextmanager
    def _counting(self, decoder: Decoder) -> Iterator[None]:
        def enter(depth: int, args: tuple, kwargs: dict) -> None:
            self._depth = depth
            self.inputs += (args[0] if args else kwargs["hidden_states"]).nbytes

        handles = [
            block.register_forward_pre_hook(
                lambda _, args, kwargs, depth=depth: enter(depth, args, kwargs), with_kwargs=True
            )
            for depth, block in enumerate(decoder.blocks)
        ]
        handles.append(decoder.blocks[-1].register_forward_hook(lambda *_: setattr(self, "_depth", self._blocks)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _never(_: object) -> Tensor:
    raise RuntimeError("the pass that counts activations is not gone back through")
