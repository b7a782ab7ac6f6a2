"""Speed of generation with packed 2:4 weights against dense ones, on a random model of Llama-2-7B's shape.

    python bench/generate.py --compile

The decoder's linears are made 2:4 by magnitude, measured dense, packed in place and measured again. Prefill is one
eager forward pass; decoding is greedy, with a static cache, each step one replay of a CUDA graph; with --compile the
decoding cases are measured once more through torch.compile, as transformers' generate does with a static cache. Rows
are appended to results/generate.csv; rates are tokens per second, all sequences together. For any model there is
surgeon bench generate.
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
from llm_surgeon.packed import pack_model, unpack_model
from llm_surgeon.packed.speed import measure_speed
from surgeon_kernels import nm_select

CASES = [(1, 128, 128), (16, 128, 128), (1, 4096, 8)]  # batch size, prompt, new tokens
COMPILED_CASES = [(16, 128, 128), (1, 128, 128)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "generate.csv")
    options = parser.parse_args()
    begun = time.perf_counter()
    model = random_llama(options.layers, options.hidden, options.device)
    about = environment(options.device)
    passes = [(case, False) for case in CASES], [(case, True) for case in COMPILED_CASES]
    for cases in passes if options.compile else passes[:1]:
        dense: dict[tuple[int, int, int], tuple[float, float]] = {}
        for weights, convert in (("dense", unpack_model), ("packed", pack_model)):
            convert(model)
            for case, compiled in cases:
                print(f"{time.perf_counter() - begun:.1f} s", end=" ", flush=True)
                batch_size, prompt, new_tokens = case
                speed = measure_speed(
                    model,
                    batch_size=batch_size,
                    prompt=prompt,
                    new_tokens=new_tokens,
                    repeats=options.repeats,
                    compiled=compiled,
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
                    **about,
                }
                print(*row.values(), flush=True)
                append_row(options.out, row)


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
