"""Keep weights and curvature in main memory and stream them to the GPU one decoder block or layer ahead of their use.

Everything goes through page-locked ("pinned") memory, the only kind that a GPU can copy from and to while it computes.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from llm_surgeon.models import Decoder
from surgeon_kernels import SymmetricAccumulator

# Bytes of each of the two pinned buffers that copies to pageable memory go through.
_STAGED = 2**26


class Prefetcher:
    """Copies lists of tensors to ``device`` on a stream of its own, at most one list ahead of its use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[object, list[Tensor], torch.cuda.Event | None] | None = None

    def start(self, key: object, tensors: Sequence[Tensor]) -> None:
        """Begin to copy what :meth:`take` will ask for next; what was begun before and not taken is given up."""
        if self._stream is None:
            self._ahead = (key, [tensor.to(self._device, copy=True) for tensor in tensors], None)
            return
        # What is computed by now may still write the tensors, and frees the memory that the copies take.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True, copy=True) for tensor in tensors]
            event = torch.cuda.Event()
            event.record(self._stream)
        self._ahead = (key, copies, event)

    def take(self, key: object, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of ``tensors`` on the device, ready for the current stream."""
        if self._ahead is None or self._ahead[0] != key:
            self.start(key, tensors)
        assert self._ahead is not None
        _, copies, event = self._ahead
        self._ahead = None
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            for copy in copies:
                copy.record_stream(stream)
        return copies


@contextlib.contextmanager
def offloaded(model: nn.Module, decoder: Decoder, device: torch.device) -> Iterator[None]:
    """The decoder's weights live in pinned main memory for a while, everything else of the model on ``device``.

    A block's weights are on the device while its ``forward`` runs, those of the next one are copied meanwhile. In a
    backward pass they are there only if the block runs again for its activations, so these must be checkpointed.
    Afterwards every tensor is back where it was, with the values that it has then.
    """
    homes = [(tensor, tensor.device) for tensor in [*model.parameters(), *model.buffers()]]
    inside = {id(parameter) for block in decoder.blocks for parameter in block.parameters()}
    forwards = [block.__dict__.get("forward") for block in decoder.blocks]
    try:
        for tensor, _ in homes:
            tensor.data = pinned(tensor.data) if id(tensor) in inside else tensor.data.to(device)
        stream = _BlockStream(decoder.blocks, device)
        for index, block in enumerate(decoder.blocks):
            block.forward = partial(stream.run, index, block.forward)
        yield
    finally:
        for block, forward in zip(decoder.blocks, forwards, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # weights may still be on their way back
        for tensor, home in homes:
            tensor.data = tensor.data.to(home)


def pinned(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` in main memory, pinned where there is a GPU; later work on the GPU's stream waits for it."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
    return copy.copy_(tensor, non_blocking=True)


def copies_in_main_memory(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in pageable main memory, by way of two small pinned buffers and, from a GPU, on a stream of their own.

    Copied there directly, pages being mapped one by one, they would keep other threads from launching kernels
    meanwhile; pinning the copies themselves would, too.
    """
    if not tensors or not tensors[0].is_cuda:
        return [tensor.to("cpu", copy=True) for tensor in tensors]
    device = tensors[0].device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
    buffers = cycle([torch.empty(_STAGED, dtype=torch.uint8, pin_memory=True) for _ in range(2)])
    on_their_way: deque[tuple[torch.cuda.Event, Tensor, Tensor]] = deque()

    def receive() -> None:
        arrived, buffer, target = on_their_way.popleft()
        arrived.synchronize()
        target.copy_(buffer)

    with torch.cuda.stream(stream):
        for tensor, copy in zip(tensors, copies, strict=True):
            for source, target in zip(_pieces(tensor), _pieces(copy), strict=True):
                if len(on_their_way) == 2:
                    receive()
                buffer = next(buffers)[: len(source)]
                buffer.copy_(source, non_blocking=True)
                # Of tensors on further devices, the streams that are current there make the copies.
                on_their_way.append((torch.cuda.current_stream(tensor.device).record_event(), buffer, target))
    while on_their_way:
        receive()
    return copies


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.contiguous().view(-1).view(torch.uint8).split(_STAGED)


def store(sums: SymmetricAccumulator) -> SymmetricAccumulator:
    """``sums`` in pinned main memory."""
    return SymmetricAccumulator(sums.n, pinned(sums.storage))


class _BlockStream:
    """Runs blocks with copies of their parameters, in order forwards and then, as a backward pass does, in reverse."""

    def __init__(self, blocks: list[nn.Module], device: torch.device) -> None:
        self._blocks = blocks
        self._prefetcher = Prefetcher(device)
        self._last = -1

    def run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        copies = self._prefetcher.take(*self._parameters(index))
        following = self._following(index)
        self._last = index
        self._prefetcher.start(*self._parameters(following))
        with _replaced(self._blocks[index], copies):
            return forward(*args, **kwargs)

    def _following(self, index: int) -> int:
        """The block that will run after ``index``: a wrong guess costs time, nothing else."""
        if index < self._last:  # going back, and then forwards again
            return max(index - 1, 0)
        if index + 1 < len(self._blocks):
            return index + 1
        return index if torch.is_grad_enabled() else 0

    def _parameters(self, index: int) -> tuple[object, list[Tensor]]:
        """A block's parameters and a key that changes when they are written to."""
        parameters = list(self._blocks[index].parameters())
        return (index, *(p._version for p in parameters)), [p.data for p in parameters]


@contextlib.contextmanager
def _replaced(block: nn.Module, tensors: list[Tensor]) -> Iterator[None]:
    """The block's parameters are ``tensors`` for a while: plain ones, which autograd keeps alive as it needs them."""
    places = [
        (module, name, parameter)
        for module in block.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    copies = dict(zip(map(id, block.parameters()), tensors, strict=True))
    try:
        for module, name, parameter in places:
            module._parameters[name] = copies[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
