"""How fast a causal LM generates: prefill and decode, measured apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from llm_surgeon.errors import InputError
from llm_surgeon.packed.linear import PackedLinear


@dataclass(frozen=True)
class Speed:
    """Median times of one batch of equally long prompts.

    Attributes:
        batch_size, prompt, new_tokens: sequences, tokens of each prompt, tokens decoded after it.
        prefill_seconds: the prompts' forward pass, up to the first new token.
        decode_seconds: of ``new_tokens`` greedy steps with a static cache of ``prompt + new_tokens`` positions.
        cuda_graph: decode steps were replays of one CUDA graph.
        compiled: decode steps went through torch.compile.
        weight_bytes: the model's parameters and buffers in memory, dense weights kept beside packed ones included.
        peak_bytes: most memory allocated on the GPU at once (0 elsewhere).
    """

    batch_size: int
    prompt: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cuda_graph: bool
    compiled: bool
    weight_bytes: int
    peak_bytes: int

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, all sequences together."""
        return self.batch_size * self.prompt / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """New tokens per second, all sequences together."""
        return self.batch_size * self.new_tokens / self.decode_seconds


@torch.no_grad()
def measure_speed(
    model: PreTrainedModel,
    *,
    batch_size: int = 1,
    prompt: int = 128,
    new_tokens: int = 64,
    repeats: int = 3,
    cuda_graph: bool | None = None,
    compiled: bool = False,
) -> Speed:
    """Time ``model`` on random prompts; the first, untimed run of each part compiles and tunes what is to be.

    Args:
        model: on one device, in evaluation mode.
        repeats: timed runs; the medians are returned.
        cuda_graph: capture the decode step; left out, on a GPU.
        compiled: compile the decode step with torch.compile.

    Raises:
        InputError: the model has too few positions, or sits on several devices.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        raise InputError(f"the speed of a model on one device can be measured, not on {sorted(map(str, devices))}")
    (device,) = devices
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and prompt + new_tokens > longest:
        raise InputError(f"{prompt} + {new_tokens} tokens are more than the {longest} positions of the model")
    on_gpu = device.type == "cuda"
    cuda_graph = on_gpu if cuda_graph is None else cuda_graph
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    ids = torch.randint(model.config.vocab_size, (batch_size, prompt), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)

    def prefill() -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    prefill_seconds = _median_seconds(prefill, repeats, device)
    decoder = GreedyDecoder(model, ids, new_tokens, cuda_graph=cuda_graph, compiled=compiled)
    decode_seconds = _median_seconds(decoder.run, repeats, device, before=decoder.restart)
    return Speed(
        batch_size,
        prompt,
        new_tokens,
        prefill_seconds,
        decode_seconds,
        cuda_graph,
        compiled,
        _resident_bytes(model),
        torch.cuda.max_memory_allocated(device) if on_gpu else 0,
    )


class GreedyDecoder:
    """Greedy decoding after ``ids`` ``[batch, prompt]`` with a static cache; each step is the same work on the device.

    :meth:`restart` runs the prompt, :meth:`run` the steps; ``tokens`` ``[batch, 1 + new_tokens]`` is what came out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        new_tokens: int,
        *,
        cuda_graph: bool = False,
        compiled: bool = False,
    ) -> None:
        self._model, self._ids, self._steps = model, ids, new_tokens
        self._forward = torch.compile(model, dynamic=False) if compiled else model
        self._cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new_tokens)
        self._token = ids[:, -1:].clone()
        self.tokens = ids.new_zeros(ids.shape[0], 1 + new_tokens)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.restart()
        if cuda_graph:
            self._capture()

    def restart(self) -> None:
        self._cache.reset()
        output = self._model(input_ids=self._ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._token.copy_(output.logits[:, -1:].argmax(-1))
        self.tokens[:, :1] = self._token

    def run(self) -> None:
        for position in range(1, 1 + self._steps):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
            self.tokens[:, position : position + 1] = self._token

    def _step(self) -> None:
        output = self._forward(input_ids=self._token, past_key_values=self._cache, use_cache=True)
        self._token.copy_(output.logits[:, -1:].argmax(-1))

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self._ids.device)
        stream.wait_stream(torch.cuda.current_stream(self._ids.device))
        with torch.cuda.stream(stream):
            self._step()  # what is made lazily must be there before the capture
        torch.cuda.current_stream(self._ids.device).wait_stream(stream)
        self.restart()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph


def _median_seconds(
    work: Callable[[], None], repeats: int, device: torch.device, before: Callable[[], None] = lambda: None
) -> float:
    seconds = []
    for _ in range(1 + repeats):
        before()
        _wait(device)
        begun = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def _resident_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers, shared ones once, and of dense weights kept beside packed ones."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    kept = (module.kept_dense for module in model.modules() if isinstance(module, PackedLinear))
    return sum(t.nbytes for t in tensors.values()) + sum(t.nbytes for t in kept if t is not None)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
