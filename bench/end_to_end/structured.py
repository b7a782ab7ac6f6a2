"""Time to prune whole structures from a model of Llama-2-7B's shape (random weights), speed and memory either side.

    python -m bench.end_to_end.structured --shots 1 10
    python -m bench.end_to_end.structured --structure rows-columns --layers 4

Calibration is random tokens: times are those of a trained model, losses mean nothing. Nor does it tell which heads and
neurons a trained model would lose: with random weights heads cost little, and allocation "global" takes most of them;
"local" takes the same fraction of both everywhere. A model without rows and columns is compacted. Decode steps are
replays of one CUDA graph. Modes: the code of transformers as it is ("plain"); with fused kernels for norms, SwiGLU and
rotary embedding; with q, k and v, and gate and up, joined for single tokens besides; and this through torch.compile
(steps of one sequence only, prompts are not compiled). A row for every mode is appended to results/structured.csv,
before pruning and after each run.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bench.environment import append_row, environment, require_gpu
from llm_surgeon import PruneConfig, prune
from llm_surgeon.config.decoding import Decoding
from llm_surgeon.formats.modeling_pruned import CompactLinear
from llm_surgeon.inference import merge_linears
from llm_surgeon.inference.decoding import Decoder, wait
from llm_surgeon.inference.speed import measure_speed
from llm_surgeon.models.fused_pointwise import fused_pointwise
from llm_surgeon.structures.remove.rows_columns import compact

MODES = ("plain", "fused", "joined", "compiled")
RUN_FIELDS = (
    "structure",
    "allocation",
    "sparsity",
    "shots",
    "reconstruct",
    "round_to",
    "samples",
    "prune_seconds",
    "phases",
    "prune_peak_gb",
)


def build(options: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    if options.tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 128}
    config = LlamaConfig(num_hidden_layers=options.layers, max_position_embeddings=4096, **sizes)
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def measure(model: PreTrainedModel, row: dict[str, Any], options: argparse.Namespace) -> None:
    """Append ``row`` with the model's sizes and speed, once for every mode."""
    for mode in options.modes:
        with ExitStack() as stack:
            if mode != "plain":
                stack.enter_context(fused_pointwise(model))
            if mode in ("joined", "compiled"):
                stack.enter_context(merge_linears(model))
            found = speed(model, options, compiled=mode == "compiled")
        append_row(options.out, {**row, "mode": mode, **found})
        print(row["state"], mode, found, flush=True)


def speed(model: PreTrainedModel, options: argparse.Namespace, *, compiled: bool) -> dict[str, Any]:
    """Milliseconds, bytes, parameters and multiply-accumulates per token (attention scores left out)."""
    row: dict[str, Any] = {}
    new = 64
    for batch in (1, 8):
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        if batch not in options.batches:
            row |= dict.fromkeys((f"prefill_ms_b{batch}", f"decode_ms_per_step_b{batch}", f"peak_gb_b{batch}"), "")
            continue
        if compiled:
            row |= dict.fromkeys((f"prefill_ms_b{batch}", f"peak_gb_b{batch}"), "")
            row[f"decode_ms_per_step_b{batch}"] = f"{compiled_step_ms(model, options, new):.3f}" if batch == 1 else ""
            continue
        found = measure_speed(model, batch_size=batch, prompt=options.prompt, new_tokens=new)
        row[f"prefill_ms_b{batch}"] = f"{1000 * found.prefill_seconds:.2f}"
        row[f"decode_ms_per_step_b{batch}"] = f"{1000 * found.decode_seconds / new:.3f}"
        row[f"peak_gb_b{batch}"] = f"{found.peak_bytes / 1e9:.2f}"
    row["weights_gb"] = f"{sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e9:.3f}"
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    linears = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, CompactLinear))]
    row["macs_per_token"] = sum(linear.weight.numel() for linear in linears)
    row["heads"] = spread(model, "self_attn.o_proj", model.config.head_dim)
    row["neurons"] = spread(model, "mlp.down_proj", 1)
    return row


def spread(model: PreTrainedModel, name: str, of: int) -> str:
    """Mean, smallest and largest number of inputs, in units ``of`` so many, of the linears named so."""
    sizes = [m.get_parameter("weight").shape[1] // of for path, m in model.named_modules() if path.endswith(name)]
    return f"{statistics.mean(sizes):.1f} {min(sizes)}-{max(sizes)}"


@torch.no_grad()
def compiled_step_ms(model: PreTrainedModel, options: argparse.Namespace, new: int) -> float:
    """Median milliseconds of a decoding step of one sequence through torch.compile."""
    torch.compiler.reset()
    ids = torch.randint(model.config.vocab_size, (1, options.prompt)).to(model.device)
    decoder = Decoder(model, ids, new, Decoding.COMPILED)
    seconds = []
    for _ in range(4):
        decoder.restart()
        wait(ids.device)
        begun = time.perf_counter()
        decoder.run()
        wait(ids.device)
        seconds.append(time.perf_counter() - begun)
    return 1000 * statistics.median(seconds[1:]) / new


def remove(
    model: PreTrainedModel, allocation: str, shots: int, reconstruct: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """Prune ``model`` in place: what was removed, in which time and memory."""
    groups = options.structure == "groups"
    config = PruneConfig(
        structure=options.structure,
        sparsity=options.sparsity,
        shots=shots,
        round_to=options.round_to if groups else 1,
        reconstruct=reconstruct,
        allocation=allocation,
    )
    ids = torch.randint(model.config.vocab_size, (options.samples, options.seqlen))
    begun = time.perf_counter()
    report = prune(model, ids, config=config)
    if not groups:
        compact(model)
    seconds = time.perf_counter() - begun
    phases: dict[str, float] = {}
    for shot in report.shots:
        for phase, taken in shot.seconds.items():
            phases[phase] = phases.get(phase, 0.0) + taken
    found = (
        options.structure,
        allocation,
        f"{report.sparsity:.4f}",
        shots,
        "yes" if reconstruct else "no",
        config.round_to,
        options.samples,
        f"{seconds:.1f}",
        " ".join(f"{phase}={taken:.1f}" for phase, taken in phases.items()),
        f"{report.peak_memory_bytes / 1e9:.1f}",
    )
    return dict(zip(RUN_FIELDS, found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--structure", choices=("groups", "rows-columns"), default="groups")
    parser.add_argument("--shots", type=int, nargs="+", default=[1])
    parser.add_argument("--allocation", nargs="+", choices=("global", "local"), default=["global"])
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--round-to", type=int, default=128)
    parser.add_argument("--reconstruct", nargs="+", choices=("yes", "no"), default=["yes"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--batches", type=int, nargs="+", choices=(1, 8), default=[1, 8])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["plain", "joined"])
    parser.add_argument("--no-dense", action="store_true", help="do not measure the dense model (again)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights instead: to try this script")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "structured.csv")
    options = parser.parse_args()
    require_gpu(options.device)
    about = {**environment(options.device), "model": "llama-2-7b shape", "layers": options.layers}
    model = build(options)
    if not options.no_dense:
        measure(model, {**about, "state": "dense", **dict.fromkeys(RUN_FIELDS, "")}, options)
    fits = options.reconstruct if options.structure == "groups" else ["no"]
    for index, (allocation, shots, reconstruct) in enumerate(product(options.allocation, options.shots, fits)):
        if index:
            del model
            gc.collect()
            model = build(options)
        run = remove(model, allocation, shots, reconstruct == "yes", options)
        print("removed", run, flush=True)
        measure(model, {**about, "state": "pruned", **run}, options)


if __name__ == "__main__":
    main()
