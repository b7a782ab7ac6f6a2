"""Speed of a causal LM: prefill and decode, measured apart."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.config.decoding import Decoding
from llm_surgeon.errors import InputError
from llm_surgeon.formats.packed_linear import PackedLinear
from llm_surgeon.inference.decoding import Decoder, generate_seconds, wait
from llm_surgeon.models.limits import positions, text_config


@dataclass(frozen=True)
class Speed:
    """Median times of one batch of equally long prompts.

    Attributes:
        decoding: how the steps ran; with ``compiled`` the prompts' pass was compiled, too, with ``fused``
            it was one of few kernels, and with ``generate`` it is generate's, from the call on.
        batch_size, prompt, new_tokens: sequences, tokens of each prompt, tokens decoded after the first new one.
        prefill_seconds: the prompts' forward pass, up to the first new token.
        decode_seconds: of ``new_tokens`` greedy steps with a static cache.
        weight_bytes: the model's parameters and buffers in memory, dense weights kept beside packed ones included.
        peak_bytes: most memory allocated on the GPU at once, other models beside it not counted (0 elsewhere).
    """

    decoding: Decoding
    batch_size: int
    prompt: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    weight_bytes: int
    peak_bytes: int

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, all sequences together."""
        return self.batch_size * self.prompt / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """New tokens per second, all sequences together; NaN where none was decoded."""
        return self.batch_size * self.new_tokens / self.decode_seconds if self.new_tokens else float("nan")


def measure_speed(model: PreTrainedModel, **options: Any) -> Speed:
    """Time one ``model``, see :func:`measure_speeds`."""
    return measure_speeds([model], **options)[0]


@torch.no_grad()
def measure_speeds(
    models: Sequence[PreTrainedModel],
    *,
    batch_size: int = 1,
    prompt: int = 128,
    new_tokens: int = 64,
    repeats: int = 3,
    decoding: Decoding | None = None,
    turn: contextlib.AbstractContextManager[object] | None = None,
) -> list[Speed]:
    """Time ``models``, which take turns, on random prompts, so that what else the machine does hits all.

    The first, untimed run of each part compiles and tunes what is to be. What torch.compile kept from before is dropped
    where something is compiled, so that no size is compiled as one of several (``dynamic``).

    Args:
        models: of one configuration, each on one device, in evaluation mode.
        new_tokens: 0 to measure the prefill alone.
        repeats: timed runs; the medians are returned.
        decoding: left out, ``fused`` on a GPU and ``eager`` elsewhere.
        turn: entered for the timed runs, so that other processes can use the device before and afterwards.

    Raises:
        InputError: a model has too few positions or sits on several devices, or a CUDA graph is wanted elsewhere.
    """
    devices = [_device(model) for model in models]
    for model, device in zip(models, devices, strict=True):
        longest = positions(model)
        if longest is not None and prompt + new_tokens > longest:
            raise InputError(f"{prompt} + {new_tokens} tokens are more than the {longest} positions of the model")
        if decoding is Decoding.GRAPH and device.type != "cuda":
            raise InputError(f"decoding by a CUDA graph needs a CUDA device, and the model is on {device}")
    decoding = decoding or (Decoding.FUSED if devices[0].type == "cuda" else Decoding.EAGER)
    if decoding in (Decoding.COMPILED, Decoding.GENERATE):
        torch.compiler.reset()
    vocabulary = text_config(models[0]).vocab_size
    ids = torch.randint(vocabulary, (batch_size, prompt), generator=torch.Generator().manual_seed(0))
    trials, peaks = [], []
    for model, device in zip(models, devices, strict=True):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            others = torch.cuda.memory_allocated(device) - _resident_bytes(model)
        trials.append(_trial(model, ids.to(device), new_tokens, decoding))
        trials[-1]()
        peaks.append(torch.cuda.max_memory_allocated(device) - others if device.type == "cuda" else 0)
    for trial in trials if len(trials) > 1 else ():
        trial()  # what is captured, is captured anew after another model's run
    with turn or contextlib.nullcontext():
        rounds = [[trial() for trial in trials] for _ in range(repeats)]
    found = []
    for model, times, peak in zip(models, zip(*rounds, strict=True), peaks, strict=True):
        prefill_seconds, decode_seconds = map(statistics.median, zip(*times, strict=True))
        found.append(
            Speed(
                decoding,
                batch_size,
                prompt,
                new_tokens,
                prefill_seconds,
                decode_seconds,
                _resident_bytes(model),
                peak,
            )
        )
    return found


def _device(model: PreTrainedModel) -> torch.device:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        raise InputError(f"the speed of a model on one device can be measured, not on {sorted(map(str, devices))}")
    return devices.pop()


def _trial(
    model: PreTrainedModel, ids: Tensor, new_tokens: int, decoding: Decoding
) -> Callable[[], tuple[float, float]]:
    """A function that runs the prompts ``ids`` and the steps after them and returns the seconds of both."""
    device = ids.device
    forward = torch.compile(model, dynamic=False) if decoding is Decoding.COMPILED else model
    decodes = decoding is Decoding.FUSED or (new_tokens > 0 and decoding is not Decoding.GENERATE)
    decoder = Decoder(model, ids, new_tokens, decoding) if decodes else None

    def prefill() -> float:
        wait(device)
        begun = time.perf_counter()
        if decoder is not None and decoding is Decoding.FUSED:
            decoder.restart()
        else:
            forward(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        wait(device)
        return time.perf_counter() - begun

    def decode() -> float:
        if decoder is None or new_tokens == 0:
            return 0.0
        decoder.restart()
        wait(device)
        begun = time.perf_counter()
        decoder.run()
        wait(device)
        return time.perf_counter() - begun

    def both() -> tuple[float, float]:
        if decoding is Decoding.GENERATE:
            return generate_seconds(model, ids, new_tokens)
        return prefill(), decode()

    return both


def _resident_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers, shared ones once, and of dense weights kept beside packed ones."""
    kept = [module.kept_dense for module in model.modules() if isinstance(module, PackedLinear)]
    tensors = (t for t in (*model.parameters(), *model.buffers(), *kept) if t is not None)
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, tensors)}
    return sum(storages.values())
