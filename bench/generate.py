"""Speed of generation with packed 2:4 weights against dense ones, on a random model of Llama-2-7B's shape.

    python bench/generate.py

The decoder's linears are made 2:4 by magnitude, measured dense, packed in place and measured again, and once more with
the layers fused that read the same input (llm_surgeon.packed.fuse_linears), and with cuSPARSELt for the prompts besides
(use_cusparselt). Decoding is greedy, with a static cache: a CUDA graph of the plain forward pass, one of the pass
compiled by torch.compile, and transformers' generate, which compiles and captures by itself. Prefill is one forward
pass, plain or compiled. Rows are appended to results/generate.csv; rates are tokens per second, all sequences together.
The floor of a decoding step is the time to read every weight that it needs and the filled part of the cache once, at
the copy bandwidth measured here. For any model there is surgeon bench generate.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from environment import append_row, environment
from llm_surgeon.cli.bench import speed_record
from llm_surgeon.models import find_decoder
from llm_surgeon.packed import fuse_linears, pack_model, unpack_model, use_cusparselt
from llm_surgeon.packed.decoding import Decoding
from llm_surgeon.packed.speed import Speed, measure_speed
from surgeon_kernels import nm_select
from timing import copy_bandwidth

WEIGHTS = ["dense", "packed", "fused", "cusparselt"]
# Batch size, prompt, new tokens; compiling takes most of the time, so each size is compiled for one purpose only.
CASES = {
    Decoding.GRAPH: [(1, 128, 128), (16, 128, 128), (1, 4096, 0)],
    Decoding.COMPILED: [(16, 128, 128), (1, 128, 128), (1, 4096, 0)],
    Decoding.GENERATE: [(16, 128, 128), (1, 128, 128)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decoding", nargs="+", type=Decoding, default=list(CASES), help="graph, compiled, generate")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, help="dense first")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "generate.csv")
    options = parser.parse_args()
    begun = time.perf_counter()
    model = random_llama(options.layers, options.hidden, options.device)
    about = environment(options.device)
    bandwidth = copy_bandwidth()
    for decoding in options.decoding:
        cases = [case for case in CASES[decoding] if case[0] in options.batch_size]
        dense: dict[tuple[int, int, int], tuple[float, float]] = {}
        for weights in options.weights:
            convert(model, weights)
            for case in cases:
                if weights == "cusparselt" and case[1] < 1024:  # it has no part in these
                    continue
                print(f"{time.perf_counter() - begun:.1f} s", end=" ", flush=True)
                batch_size, prompt, new_tokens = case
                speed = measure_speed(
                    model,
                    batch_size=batch_size,
                    prompt=prompt,
                    new_tokens=new_tokens,
                    repeats=options.repeats,
                    decoding=decoding,
                )
                base = dense.setdefault(case, (speed.prefill_rate, speed.decode_rate))
                row = {
                    "model": "llama-2-7b shape",
                    "layers": options.layers,
                    "dtype": "bfloat16",
                    "weights": weights,
                    **speed_record(speed),
                    "prefill_over_dense": f"{speed.prefill_rate / base[0]:.3f}",
                    "decode_over_dense": f"{speed.decode_rate / base[1]:.3f}",
                    "decode_step_floor_ms": f"{1e3 * bytes_of_a_step(model, speed) / bandwidth:.4g}",
                    **about,
                }
                print(*row.values(), flush=True)
                append_row(options.out, row)


def convert(model: PreTrainedModel, weights: str) -> None:
    unpack_model(model)
    if weights != "dense":
        pack_model(model)
    if weights == "cusparselt":
        use_cusparselt(model)
    if weights in ("fused", "cusparselt"):
        fuse_linears(model)


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
