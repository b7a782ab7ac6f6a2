"""Activations that a forward pass keeps for its backward pass, found by passes over a few tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from llm_surgeon.models.decoder import Decoder
from llm_surgeon.models.fused_pointwise import fused_pointwise
from llm_surgeon.models.passes import autocast, evaluation_mode, frozen, run_model, starting_at

_LENGTHS = (16, 32, 48)


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


def measure_activations(
    model: nn.Module, decoder: Decoder, seqlen: int, dtype: torch.dtype | None = None
) -> Activations:
    """Run the model on 16 and on 32 tokens and carry what it keeps on to ``seqlen`` by ``a L + b L²``.

    Under autocast to ``dtype``, if there is one, on 48 as well, by ``b L + c L²`` of ``a + b L + c L²``: ``a`` are
    weights rounded to it.
    """
    lengths = _LENGTHS[:2] if dtype is None else _LENGTHS
    kept = [_Kept(model, decoder, length, partial(_curvature_pass, dtype=dtype)) for length in lengths]

    def per_token(*sizes: int) -> float:
        if dtype is not None:
            return _without_weights(sizes, seqlen)
        a, b = (size / length for size, length in zip(sizes, lengths, strict=True))
        growth = max(0.0, (b - a) / (lengths[1] - lengths[0]))
        return b + growth * (seqlen - lengths[1])

    return Activations(
        per_token(*(each.total() for each in kept)),
        max(per_token(*sizes) for sizes in zip(*(each.by_block() for each in kept), strict=True)),
        per_token(*(each.inputs for each in kept)),
    )


def measure_training(model: nn.Module, decoder: Decoder, seqlen: int, dtype: torch.dtype | None) -> float:
    """Bytes per token of a window of ``seqlen`` that a pass keeps where all parameters are trained in float32.

    That is ``b + c L`` of ``a + b L + c L²`` over 16, 32 and 48 tokens; ``a`` are weights rounded to ``dtype``, under
    autocast to which the pass runs if there is one.
    """
    passes = partial(_training_pass, dtype=dtype)
    return _without_weights([_Kept(model, decoder, length, passes).total() for length in _LENGTHS], seqlen)


def _without_weights(sizes: Sequence[int], seqlen: int) -> float:
    """Per token of ``seqlen`` what grows with the tokens, of bytes kept of 16, 32 and 48."""
    (short, middle, long), step = sizes, _LENGTHS[0]
    growth = max(0.0, (long - 2 * middle + short) / (2 * step**2))
    return (long - short) / (2 * step) + growth * (seqlen - _LENGTHS[0] - _LENGTHS[2])


# Addresses of weights, which do not count.
_Weights = set[int]


@contextlib.contextmanager
def _curvature_pass(model: nn.Module, _: _Weights, dtype: torch.dtype | None) -> Iterator[None]:
    """Context manager of a pass whose gradients flow from the embeddings on."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    under = autocast(embedding.weight.device, dtype)
    with frozen(model), evaluation_mode(model), fused_pointwise(model), starting_at(embedding), under:
        yield


@contextlib.contextmanager
def _training_pass(model: nn.Module, weights: _Weights, dtype: torch.dtype | None) -> Iterator[None]:
    """Context manager of a pass that trains all parameters; those of 16 bits are float32 while their module runs."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    own: dict[nn.Parameter, torch.Tensor] = {}

    def widen(module: nn.Module, _: object) -> None:
        for p in module.parameters(recurse=False):
            if p.element_size() < 4:
                own[p], p.data = p.data, p.data.float()
                weights.add(p.data_ptr())

    def restore(module: nn.Module, *_: object) -> None:
        for p in module.parameters(recurse=False):
            if p in own:
                weights.discard(p.data_ptr())
                p.data = own.pop(p)

    with contextlib.ExitStack() as hooks, evaluation_mode(model), autocast(device, dtype):
        hooks.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        for module in model.modules():
            hooks.callback(module.register_forward_pre_hook(widen).remove)
            hooks.callback(module.register_forward_hook(restore, always_call=True).remove)
        model.train()
        yield


class _Kept:
    """Bytes kept in one pass over ``length`` tokens, by decoder block; what lies before and after them is apart.

    The pass runs within ``surroundings`` of the model and the addresses of its weights.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        length: int,
        surroundings: Callable[[nn.Module, _Weights], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.inputs = 0
        self._blocks = len(decoder.blocks)
        self._depth = -1
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._bytes: dict[int, tuple[int, int]] = {}
        self._held: list[Tensor] = []  # so that no address is used twice
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        ids = torch.arange(length, device=embedding.weight.device)[None] % embedding.weight.shape[0]
        with (
            surroundings(model, self._weights),
            self._counting(decoder),
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
        if storage.data_ptr() in self._weights:
            return
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
