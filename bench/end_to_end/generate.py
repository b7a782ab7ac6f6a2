"""Speed of generation with packed 2:4 weights against dense ones, on a random model of Llama-2-7B's shape.

    python -m bench.end_to_end.generate

The decoder's linears are made 2:4 by magnitude and measured dense, packed, packed with the layers fused that read the
same input (merge_packed_linears), and so with cuSPARSELt for the prompts besides (use_cusparselt).
Decoding is greedy, with a static cache: a CUDA graph of the plain forward pass, one of the pass compiled by
torch.compile, and transformers' generate, which compiles and captures by itself. Prefill is one forward pass, plain or
compiled, or generate's own. ``--parts fused``: norms, rotary embeddings and SwiGLU are one kernel each
(llm_surgeon.models.fused_pointwise), on the dense side, too. What is compiled runs in a process for each row: they
compile at the same time and are timed one after the other. Rows are appended to results/generate.csv; rates are tokens
per second, all sequences together. The floor of a decoding step is the time to read every weight that it needs and the
filled part of the cache once, at the copy bandwidth measured here. A plain pass over 128 tokens takes the host's time,
not the device's: its prefill column tells of the host alone. For any model there is surgeon bench generate.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bench.environment import append_row, environment, require_gpu
from bench.timing import copy_bandwidth
from llm_surgeon.cli.generate import speed_record
from llm_surgeon.config.decoding import Decoding
from llm_surgeon.inference import merge_packed_linears, pack_model, unpack_model, use_cusparselt
from llm_surgeon.inference.speed import Speed, measure_speed
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.fused_pointwise import fused_pointwise
from surgeon_kernels import nm_select

WEIGHTS = ["dense", "packed", "fused", "cusparselt"]
# Batch size, tokens of a prompt, new tokens.
CASES = {"1": (1, 128, 128), "16": (16, 128, 128), "prefill": (1, 4096, 0)}


class Setting(NamedTuple):
    weights: str
    decoding: Decoding
    parts: str
    case: str

    @property
    def compiles(self) -> bool:
        return self.decoding is Decoding.COMPILED or (self.decoding is Decoding.GENERATE and self.case != "prefill")

    @property
    def differs(self) -> bool:
        """From the others: cuSPARSELt takes no part in short products, nor fused parts in what is compiled; and the
        steps of generate are compiled ones."""
        if self.case != "prefill" and (self.weights == "cusparselt" or self.decoding is Decoding.COMPILED):
            return False
        return self.parts == "plain" or not self.compiles


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS, help="dense first")
    parser.add_argument("--decoding", nargs="+", type=Decoding, default=[Decoding.GRAPH, Decoding.GENERATE])
    parser.add_argument("--parts", nargs="+", choices=["plain", "fused"], default=["plain", "fused"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "generate.csv")
    options = parser.parse_args()
    require_gpu(options.device)
    settings = [
        setting
        for setting in itertools.starmap(
            Setting, itertools.product(options.weights, options.decoding, options.parts, options.cases)
        )
        if setting.differs
    ]
    about = environment(options.device)
    bandwidth = copy_bandwidth() if options.device == "cuda" else float("nan")
    free_memory()
    compiled, others = ([s for s in settings if s.compiles is compiles] for compiles in (True, False))
    dense: dict[tuple[object, ...], Speed] = {}
    for setting, speed, step_bytes in itertools.chain(here(others, options), in_processes(compiled, options)):
        base = dense.setdefault(setting[1:], speed)
        row = {
            "model": "llama-2-7b shape",
            "layers": options.layers,
            "dtype": "bfloat16",
            "weights": setting.weights,
            "parts": setting.parts,
            **speed_record(speed),
            "prefill_over_dense": f"{speed.prefill_rate / base.prefill_rate:.3f}",
            "decode_over_dense": f"{speed.decode_rate / base.decode_rate:.3f}",
            "decode_step_floor_ms": f"{1e3 * step_bytes / bandwidth:.4g}",
            **about,
        }
        print(*row.values(), flush=True)
        append_row(options.out, row)


Measured = tuple[Setting, Speed, float]


def measure(
    model: PreTrainedModel, setting: Setting, repeats: int, turn: AbstractContextManager[object] | None = None
) -> Measured:
    batch_size, prompt, new_tokens = CASES[setting.case]
    with fused_pointwise(model) if setting.parts == "fused" else contextlib.nullcontext():
        speed = measure_speed(
            model,
            batch_size=batch_size,
            prompt=prompt,
            new_tokens=new_tokens,
            repeats=repeats,
            decoding=setting.decoding,
            turn=turn,
        )
    return setting, speed, bytes_of_a_step(model, speed)


def here(settings: list[Setting], options: argparse.Namespace) -> Iterator[Measured]:
    if settings:
        model = random_llama(options.layers, options.hidden, options.device)
    for weights, with_these in itertools.groupby(settings, key=lambda setting: setting.weights):
        convert(model, weights)
        for setting in with_these:
            yield measure(model, setting, options.repeats)


def in_processes(settings: list[Setting], options: argparse.Namespace) -> Iterator[Measured]:
    """Each setting in a process of its own: they compile at the same time, and are timed when all have."""
    if not settings:
        return
    free_memory()
    context = multiprocessing.get_context("spawn")
    common = context.Lock(), context.Barrier(len(settings))
    with ProcessPoolExecutor(len(settings), mp_context=context, initializer=set_common, initargs=common) as pool:
        yield from pool.map(in_process, settings, itertools.repeat(options))


_common: list[Any] = []  # in such a process: the device's lock, and the barrier at which all wait


def set_common(*common: object) -> None:
    _common[:] = common


def in_process(setting: Setting, options: argparse.Namespace) -> Measured:
    device, ready = _common
    turn = Turn(device, ready)
    try:
        with device:  # kernels are chosen by measurement
            model = random_llama(options.layers, options.hidden, options.device)
            convert(model, setting.weights)
        return measure(model, setting, options.repeats, turn)
    finally:
        turn.arrive()


class Turn:
    """On a device that is ``lock``'s, as soon as everybody is ``ready``."""

    def __init__(self, lock: Any, ready: Any) -> None:
        self._lock, self._ready, self._arrived = lock, ready, False

    def arrive(self) -> None:
        if not self._arrived:
            self._arrived = True
            self._ready.wait()

    def __enter__(self) -> None:
        self.arrive()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def convert(model: PreTrainedModel, weights: str) -> None:
    unpack_model(model)
    if weights != "dense":
        pack_model(model)
    if weights == "cusparselt":
        use_cusparselt(model)
    if weights in ("fused", "cusparselt"):
        merge_packed_linears(model)
    free_memory()


def free_memory() -> None:
    """For other processes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bytes_of_a_step(model: PreTrainedModel, speed: Speed) -> float:
    """Bytes that a decoding step has to read: all weights but the embeddings, and keys and values, in the mean."""
    config = model.config
    embeddings = model.get_input_embeddings().weight.nbytes
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    position = numbers * model.dtype.itemsize
    return speed.weight_bytes - embeddings + speed.batch_size * position * (speed.prompt + speed.new_tokens / 2)


@torch.no_grad()
def random_llama(layers: int, hidden: int, device: str) -> PreTrainedModel:
    """Llama-2-7B's shape at ``hidden = 4096``, bfloat16, the linears of its blocks 2:4 by magnitude."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        max_position_embeddings=8192,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for linear in find_decoder(model).linears:
        weight = linear.module.get_parameter("weight")
        weight.masked_fill_(nm_select(weight.float().abs(), 2, 4), 0.0)
    return model


if __name__ == "__main__":
    main()
