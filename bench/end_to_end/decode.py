"""Speed of decoding by fused passes, dense and packed by turns, on a random model of Llama-2-7B's shape.

    python -m bench.end_to_end.decode

Both models run by llm_surgeon.inference.fused_passes, a step in one CUDA graph, after prompts of 128 tokens, one
sequence and sixteen; and they take a prompt of 4096. The packed one's kernels are those that tune_2_4 measured for
these numbers of tokens; by default it measures none as long as that prompt. Rows are appended to results/generate.csv
as those of bench.end_to_end.generate, with which it shares the model. Then it prints where a step's time goes, from a
trace of replays: of every kind of kernel (name and grid) how much later it ends than everything before it, which adds
up to the whole step although kernels overlap.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from bench.end_to_end.generate import CASES, bytes_of_a_step, free_memory, random_llama
from bench.environment import append_row, environment, require_gpu
from bench.timing import copy_bandwidth
from llm_surgeon.cli.generate import speed_record
from llm_surgeon.config.decoding import Decoding
from llm_surgeon.formats import packed_linear
from llm_surgeon.inference import pack_model
from llm_surgeon.inference.decoding import Decoder, wait
from llm_surgeon.inference.speed import measure_speeds

_TRACED = 8  # replays


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "generate.csv")
    options = parser.parse_args()
    require_gpu(options.device)
    begun = time.perf_counter()
    about = environment(options.device)
    bandwidth = copy_bandwidth() if options.device == "cuda" else float("nan")
    free_memory()
    dense = random_llama(options.layers, options.hidden, options.device)
    models = {"dense": dense, "packed": copy.deepcopy(dense)}
    packed_linear.TUNED_TOKENS = (1, 16, 4096)  # one and sixteen sequences, and the prompt
    pack_model(models["packed"])
    free_memory()
    print(f"models made after {time.perf_counter() - begun:.0f} s", flush=True)
    for case in options.cases:
        batch_size, prompt, new_tokens = CASES[case]
        speeds = measure_speeds(
            list(models.values()),
            batch_size=batch_size,
            prompt=prompt,
            new_tokens=new_tokens,
            repeats=options.repeats,
            decoding=Decoding.FUSED,
        )
        for (name, model), speed in zip(models.items(), speeds, strict=True):
            row = {
                "model": "llama-2-7b shape",
                "layers": options.layers,
                "dtype": "bfloat16",
                "weights": name,
                "parts": "passes",
                **speed_record(speed),
                "prefill_over_dense": f"{speed.prefill_rate / speeds[0].prefill_rate:.3f}",
                "decode_over_dense": f"{speed.decode_rate / speeds[0].decode_rate:.3f}",
                "decode_step_floor_ms": f"{1e3 * bytes_of_a_step(model, speed) / bandwidth:.4g}",
                **about,
            }
            print(*row.values(), flush=True)
            append_row(options.out, row)
        free_memory()
    for case in options.cases if options.device == "cuda" else ():
        for name, model in models.items():
            print_trace(f"{name}, {case}", model, *CASES[case])
            free_memory()
    print(f"done after {time.perf_counter() - begun:.0f} s", flush=True)


@torch.no_grad()
def print_trace(what: str, model: PreTrainedModel, batch_size: int, prompt: int, new_tokens: int) -> None:
    """Where the time of a step goes, or that of the prompt where there are no steps."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch_size, prompt), generator=generator).to(model.device)
    decoder = Decoder(model, ids, max(new_tokens, 1), Decoding.FUSED)
    # The cache is half full, as in the mean of a run.
    repeats = _TRACED if new_tokens else 1
    decoder.restart()
    for _ in range(new_tokens // 2):
        decoder.step()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            decoder.step() if new_tokens else decoder.restart()
        wait(ids.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels.sort(key=lambda kernel: kernel["ts"] + kernel["dur"])
    advances: dict[str, list[float]] = collections.defaultdict(list)
    durations: dict[str, list[float]] = collections.defaultdict(list)
    end = kernels[0]["ts"]
    for kernel in kernels:
        key = f"{kernel['name'][:60]} {kernel['args'].get('grid', '')}"
        mine = kernel["ts"] + kernel["dur"]
        advances[key].append(mine - end)
        durations[key].append(kernel["dur"])
        end = max(end, mine)
    total = end - kernels[0]["ts"]
    print(f"\n{what}: {total / repeats:.1f} us, {len(kernels) / repeats:.0f} launches")
    print("   us of all   a launch   its duration   launches")
    for key, times in sorted(advances.items(), key=lambda item: -sum(item[1]))[:16]:
        mean, duration = statistics.mean(times), statistics.median(durations[key])
        print(f"{sum(times) / repeats:12.1f} {mean:10.2f} {duration:14.2f} {len(times) / repeats:10.0f}   {key}")


if __name__ == "__main__":
    main()
