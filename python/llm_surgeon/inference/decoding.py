"""Decoding, one token of every sequence a step, in the modes that :mod:`~llm_surgeon.inference.speed` times."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StaticCache

from llm_surgeon.config.decoding import Decoding
from llm_surgeon.inference.fused_passes import FusedPasses
from llm_surgeon.inference.fusible import unfused_part


class Decoder:
    """Decoding after ``ids`` ``[batch, prompt]`` by a loop that leaves the device to itself: no step waits.

    :meth:`restart` runs the prompt, :meth:`run` all steps, :meth:`step` one; ``tokens`` ``[batch, 1 + new_tokens]`` is
    what came out. ``decoding`` is any but ``generate``. Tokens are the most likely ones or, at a ``temperature`` T > 0,
    drawn from softmax(logits / T) on the device. ``unfused`` names what keeps the model from ``fused`` passes where
    these are asked for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        new_tokens: int,
        decoding: Decoding = Decoding.EAGER,
        temperature: float = 0.0,
    ) -> None:
        self._model, self._ids, self._steps, self._temperature = model, ids, new_tokens, temperature
        compiled = decoding is Decoding.COMPILED
        self._forward = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
        length = ids.shape[1] + new_tokens
        self.unfused = unfused_part(model, length) if decoding is Decoding.FUSED else None
        fused = decoding is Decoding.FUSED and self.unfused is None
        self._fused = FusedPasses(model, len(ids), length) if fused else None
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self._token = ids[:, -1:].clone()
        self._position = ids.new_zeros(1)
        self.tokens = ids.new_zeros(ids.shape[0], 1 + new_tokens)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.restart()
        captured = decoding is Decoding.GRAPH or (ids.is_cuda and decoding in (Decoding.FUSED, Decoding.COMPILED))
        if captured and new_tokens > 0:
            self._capture()

    @torch.no_grad()
    def restart(self) -> None:
        if self._fused is None:
            self._cache.reset()
            options = {"past_key_values": self._cache, "use_cache": True, "logits_to_keep": 1}
            self._choose(self._model(input_ids=self._ids, **options).logits)
        else:
            self._choose(self._fused.prompt(self._ids))
        self._position.fill_(self._ids.shape[1])
        self.tokens[:, :1] = self._token

    def run(self) -> None:
        for position in range(1, 1 + self._steps):
            self.step()
            self.tokens[:, position : position + 1] = self._token

    @torch.no_grad()
    def step(self) -> None:
        """The next token, of which there must be fewer than ``new_tokens``."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _step(self) -> None:
        if self._fused is None:
            self._choose(self._forward(input_ids=self._token, past_key_values=self._cache, use_cache=True).logits)
        else:
            self._choose(self._fused.step(self._token, self._position))
            self._position.add_(1)

    def _choose(self, logits: Tensor) -> None:
        last = logits[:, -1:]
        if self._temperature > 0:
            # Of p_i / e_i, e_i exponential, the i-th is the largest with probability p_i: no number reaches the host.
            last = torch.softmax(last.float() / self._temperature, dim=-1)
            last = last / torch.empty_like(last).exponential_()
        self._token.copy_(last.argmax(-1))

    @torch.no_grad()
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


def generate_seconds(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds that ``model.generate`` with a static cache takes to the logits after the prompt, and from there on for
    ``new_tokens`` steps."""
    clock = _Clock(ids, new_tokens)
    length: dict[str, Any] = {"min_new_tokens": 1 + new_tokens, "max_new_tokens": 1 + new_tokens}
    wait(ids.device)
    begun = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        pad_token_id=0,  # no sequence ends early
        cache_implementation="static",
        logits_processor=LogitsProcessorList([clock]),
        **length,
    )
    first, last = clock.times[0], clock.times[-1]
    return first - begun, last - first


class _Clock(LogitsProcessor):
    """Notes when the logits after the prompt and those of the last step are there."""

    def __init__(self, ids: Tensor, new_tokens: int) -> None:
        self._lengths = (ids.shape[1], ids.shape[1] + new_tokens)
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] in self._lengths:
            wait(scores.device)
            self.times.append(time.perf_counter())
        return scores


def wait(device: torch.device) -> None:
    """Wait until the work that ``device`` was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
