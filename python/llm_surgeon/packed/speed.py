"""How fast a causal LM generates: prefill and decode, measured apart."""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llm_surgeon.data import positions, text_config
from llm_surgeon.errors import InputError
from llm_surgeon.packed.decoding import Decoding, GreedyDecoder, generate_seconds, wait
from llm_surgeon.packed.linear import PackedLinear


@dataclass(frozen=True)
class Speed:
    """Median times of one batch of equally long prompts.

    Attributes:
        decoding: how the steps ran; with ``compiled`` the prompts' pass was compiled, too, and with ``generate`` it
            is generate's, from the call on.
        batch_size, prompt, new_tokens: sequences, tokens of each prompt, tokens decoded after the first new one.
        prefill_seconds: the prompts' forward pass, up to the first new token.
        decode_seconds: of ``new_tokens`` greedy steps with a static cache.
        weight_bytes: the model's parameters and buffers in memory, dense weights kept beside packed ones included.
        peak_bytes: most memory allocated on the GPU at once (0 elsewhere).
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


@torch.no_grad()
def measure_speed(
    model: PreTrainedModel,
    *,
    batch_size: int = 1,
    prompt: int = 128,
    new_tokens: int = 64,
    repeats: int = 3,
    decoding: Decoding | None = None,
    turn: contextlib.AbstractContextManager[object] | None = None,
) -> Speed:
    """Time ``model`` on random prompts; the first, untimed run of each part compiles and tunes what is to be.

    What torch.compile kept from before is dropped where something is compiled, so that no size is compiled as
    one of several (``dynamic``).

    Args:
        model: on one device, in evaluation mode.
        new_tokens: 0 to measure the prefill alone.
        repeats: timed runs; the medians are returned.
        decoding: left out, ``graph`` on a GPU and ``eager`` elsewhere.
        turn: entered for the timed runs, so that other processes can use the device before and afterwards.

    Raises:
        InputError: the model has too few positions or sits on several devices, or a CUDA graph is wanted elsewhere.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        raise InputError(f"the speed of a model on one device can be measured, not on {sorted(map(str, devices))}")
    (device,) = devices
    longest = positions(model)
    if longest is not None and prompt + new_tokens > longest:
        raise InputError(f"{prompt} + {new_tokens} tokens are more than the {longest} positions of the model")
    on_gpu = device.type == "cuda"
    decoding = decoding or (Decoding.GRAPH if on_gpu else Decoding.EAGER)
    if decoding is Decoding.GRAPH and not on_gpu:
        raise InputError(f"decoding by a CUDA graph needs a CUDA device, and the model is on {device}")
    if decoding in (Decoding.COMPILED, Decoding.GENERATE):
        torch.compiler.reset()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    ids = torch.randint(text_config(model).vocab_size, (batch_size, prompt), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    forward = torch.compile(model, dynamic=False) if decoding is Decoding.COMPILED else model

    def prefill() -> float:
        wait(device)
        begun = time.perf_counter()
        forward(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        wait(device)
        return time.perf_counter() - begun

    def decode(decoder: GreedyDecoder) -> float:
        decoder.restart()
        wait(device)
        begun = time.perf_counter()
        decoder.run()
        wait(device)
        return time.perf_counter() - begun

    def both() -> tuple[float, float]:
        if decoding is Decoding.GENERATE:
            return generate_seconds(model, ids, new_tokens)
        return prefill(), 0.0 if decoder is None else decode(decoder)

    decodes = new_tokens > 0 and decoding is not Decoding.GENERATE
    decoder = GreedyDecoder(model, ids, new_tokens, decoding) if decodes else None
    both()
    with turn or contextlib.nullcontext():
        times = [both() for _ in range(repeats)]
    prefill_seconds, decode_seconds = map(statistics.median, zip(*times, strict=True))
    return Speed(
        decoding,
        batch_size,
        prompt,
        new_tokens,
        prefill_seconds,
        decode_seconds,
        _resident_bytes(model),
        torch.cuda.max_memory_allocated(device) if on_gpu else 0,
    )


def _resident_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers, shared ones once, and of dense weights kept beside packed ones."""
    kept = [module.kept_dense for module in model.modules() if isinstance(module, PackedLinear)]
    tensors = (t for t in (*model.parameters(), *model.buffers(), *kept) if t is not None)
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, tensors)}
    return sum(storages.values())
