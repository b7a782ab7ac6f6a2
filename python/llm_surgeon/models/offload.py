"""Keep weights and curvature in main memory and stream them to the GPU one decoder block or layer ahead of their use.

Everything goes through page-locked ("pinned") memory, the only kind that a GPU can copy from and to while it computes.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.errors import InputError
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.resources import human_bytes
from surgeon_kernels import SymmetricAccumulator

# cudaHostRegisterPortable: locked for every GPU.
_PORTABLE = 1
# Bytes of each of the two pinned buffers that copies to pageable memory go through.
_STAGED = 2**26


def compute_device(model: nn.Module, config: PruneConfig) -> torch.device:
    """Device of a run: the model's; with offloading the current GPU if there is one."""
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    if config.offloads and device.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


class PinnedMemory:
    """Page-locked main memory for tensors: locked once, used again, and unlocked when it is closed.

    Locking takes longer than copying. PyTorch's own pinned memory comes in powers of two, up to twice what is asked
    for, is touched page by page by one thread, and stays locked for good.
    """

    def __init__(self) -> None:
        self._used: dict[int, Tensor] = {}  # by their address
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)  # by their number of bytes

    def empty(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any values."""
        nbytes = math.prod(shape) * dtype.itemsize
        free = self._free[max(nbytes, 1)]
        memory = free.pop() if free else _locked(nbytes)
        self._used[memory.data_ptr()] = memory
        return memory[:nbytes].view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, for which later work on the GPU's stream waits, but not the host."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)

    def store(self, sums: SymmetricAccumulator) -> SymmetricAccumulator:
        """A copy of ``sums``, see :meth:`copy`."""
        return SymmetricAccumulator(sums.n, self.copy(sums.storage))

    def free(self, tensor: Tensor) -> None:
        """One tensor that was given out may be overwritten by the next ones: no device must be reading it."""
        memory = self._used.pop(tensor.data_ptr())
        self._free[memory.numel()].append(memory)

    def reuse(self) -> None:
        """All tensors given out so far may be overwritten, as by :meth:`free`."""
        for memory in self._used.values():
            self._free[memory.numel()].append(memory)
        self._used = {}

    def close(self) -> None:
        """Unlock everything; tensors stay what they are, in memory like any other."""
        self.reuse()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            for memory in [memory for same in self._free.values() for memory in same]:
                torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())))
        self._free.clear()


def _locked(nbytes: int) -> Tensor:
    """New memory of ``nbytes`` (at least 1), locked where there is a GPU; :class:`InputError` if it cannot be had."""
    private = {} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    try:
        pages = mmap.mmap(-1, max(nbytes, 1), **private)
    except OSError as error:
        raise InputError(f"{human_bytes(nbytes)} more of main memory cannot be had: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if torch.cuda.is_available():
        memory.zero_()  # several threads touch the pages, which locking would do one by one
        status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE))
        if status != 0:
            raise InputError(f"{human_bytes(nbytes)} more of main memory cannot be locked: CUDA error {status}")
    return memory


class Prefetcher:
    """Copies lists of tensors to ``device`` on a stream of its own, at most one list ahead of its use.

    The memory of copies is the current stream's, which waits for them before it uses or frees it: what a pass lets go
    of serves them, and the other way round.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[object, list[Tensor], torch.cuda.Event | None] | None = None

    def __del__(self) -> None:
        self._give_up()

    def start(self, key: object, tensors: Sequence[Tensor]) -> None:
        """Begin to copy what :meth:`take` will ask for next; what was begun before and not taken is given up."""
        self._give_up()
        if self._stream is None:
            self._ahead = (key, [tensor.to(self._device, copy=True) for tensor in tensors], None)
            return
        copies = [torch.empty_like(tensor, device=self._device) for tensor in tensors]
        # What is computed by now may still write the tensors, and reads what was in the memory that the copies take.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
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
            torch.cuda.current_stream(self._device).wait_event(event)
        return copies

    def _give_up(self) -> None:
        if self._ahead is not None and self._ahead[2] is not None:
            torch.cuda.current_stream(self._device).wait_event(self._ahead[2])
        self._ahead = None

    def fetch_back(self, tensor: Tensor, out: Tensor) -> Tensor:
        """Copy ``tensor`` to ``out``, pinned memory that later copies of this object alone may read, and return it.

        ``tensor`` may be let go of, but not written to.
        """
        if self._stream is None or not tensor.is_cuda:
            return out.copy_(tensor)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            out.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return out


@contextlib.contextmanager
def offloaded(model: nn.Module, decoder: Decoder, device: torch.device) -> Iterator[None]:
    """Context manager: the decoder's weights live in pinned main memory, everything else of the model on ``device``.

    A block's weights are on the device while its ``forward`` runs, those of the next one are copied meanwhile. In a
    backward pass they are there only if the block runs again for its activations, so these must be checkpointed.
    Afterwards every tensor is back where it was, with the values that it has then. If anything is raised, tensors that
    came from main memory have their first values again: copies of them were at work.
    """
    tensors = [*model.parameters(), *model.buffers()]
    homes = [tensor.device for tensor in tensors]
    originals = [tensor.data if tensor.device.type == "cpu" else None for tensor in tensors]
    inside = {id(parameter) for block in decoder.blocks for parameter in block.parameters()}
    forwards = [block.__dict__.get("forward") for block in decoder.blocks]
    memory = PinnedMemory()
    try:
        for tensor in tensors:
            tensor.data = memory.copy(tensor.data) if id(tensor) in inside else tensor.data.to(device)
        stream = _BlockStream(decoder.blocks, device)
        for index, block in enumerate(decoder.blocks):
            block.forward = _StreamedForward(stream, index, block.forward)
        yield
    except BaseException:
        for tensor, original in zip(tensors, originals, strict=True):
            if original is not None:
                tensor.data = original
        raise
    finally:
        for block, forward in zip(decoder.blocks, forwards, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # weights may still be on their way back
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = tensor.data.to(home)
        memory.close()


@contextlib.contextmanager
def resident(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager: the weights of a block that is :func:`offloaded` are on ``device`` all the time, and are run and
    written to there; back in main memory on exit. Others are where they are.
    """
    streamed = block.__dict__.get("forward")
    if not isinstance(streamed, _StreamedForward):
        yield
        return
    parameters = list(block.parameters())
    homes = [parameter.data for parameter in parameters]
    try:
        block.forward = streamed.forward
        for parameter in parameters:
            parameter.data = parameter.data.to(device, non_blocking=True, copy=True)
        yield
    finally:
        block.forward = streamed
        for parameter, home in zip(parameters, homes, strict=True):
            copy, parameter.data = parameter.data, home
            # By way of the parameter, so that copies of it from before are known to be old.
            parameter.detach().copy_(copy, non_blocking=home.is_pinned())


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


class _StreamedForward:
    """The ``forward`` of a block whose weights are streamed; ``forward`` is the block's own."""

    def __init__(self, stream: _BlockStream, index: int, forward: Callable[..., Any]) -> None:
        self.forward, self._stream, self._index = forward, stream, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._stream.run(self._index, self.forward, *args, **kwargs)


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
    """Context manager: the block's parameters are ``tensors``, plain ones, which autograd keeps alive at need."""
    locations = [
        (module, name, parameter)
        for module in block.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    copies = dict(zip(map(id, block.parameters()), tensors, strict=True))
    try:
        for module, name, parameter in locations:
            module._parameters[name] = copies[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in locations:
            module._parameters[name] = parameter
