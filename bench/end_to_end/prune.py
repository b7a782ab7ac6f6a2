"""Time per phase and peak memory of whole runs on a model of Llama-2-7B's shape with random bfloat16 weights.

    python -m bench.end_to_end.prune --runs 2:4 unstructuredx5 2:4x5+joint rows-columns 2:4/llm-compressor

A run is ``structure[xshots][+update][/method]``, one shot where none are given; ``llm-compressor`` stands for its
SparseGPT (see bench/studies/peer_sparsegpt.py). Of a sequential update it is printed, too, how much of its time goes to
passes and moments. The model is made on the device and calibrated on random tokens; where ``--options``
has it offloaded it lies in main memory when the run begins. Rows are appended to results/end_to_end.csv: seconds of all
shots by phase, the planned seconds and memory beside the true ones; the peak is that of torch's allocator.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bench.environment import append_row, environment, require_gpu
from llm_surgeon import PruneConfig, prune
from llm_surgeon.checkpoint import save_checkpoint
from llm_surgeon.methods import sequential
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.planning.plan import make_plan
from llm_surgeon.progress import Progress

PHASES = ("curvature", "selection", "update", "measure loss")
OTHERS = ("write", "iterations", "worst_gap", "sparsity", "peak_gb", "planned_gb", "planned_seconds")
COLUMNS = ("model", "layers", "samples", "seqlen", "run", "options", "seconds", *PHASES, *OTHERS)
SPARSITY = {"rows-columns": 0.3, "unstructured": 0.5}


class Phases(Progress):
    """Prints when each phase begins: what is left of a run that was stopped."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()

    def phase(self, name: str) -> None:
        self._print(name)

    def step(self, done: int, total: int, what: str = "") -> None:
        if done > 0 and 8 * done // total > 8 * (done - 1) // total:
            self._print(f"{done} of {total}")

    def _print(self, what: str) -> None:
        print(f"{time.perf_counter() - self.begun:.1f} s: {what}", flush=True)


def build(layers: int, seqlen: int, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=seqlen)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def parse(run: str, options: argparse.Namespace) -> PruneConfig:
    match = re.fullmatch(r"(?P<structure>[^/+]+?)(?:x(?P<shots>\d+))?(?:\+(?P<update>\w+))?(?:/(?P<method>.+))?", run)
    if match is None:
        raise SystemExit(f"{run!r} is no run")
    structure = match["structure"]
    return PruneConfig(
        structure=structure,
        sparsity=SPARSITY.get(structure),
        shots=int(match["shots"] or 1),
        method=match["method"] or "surgeon",
        update=match["update"],
        samples=options.samples,
        seqlen=options.seqlen,
        **json.loads(options.options),
    )


def measure(run: str, layers: int, options: argparse.Namespace) -> dict[str, Any]:
    model = build(layers, options.seqlen, options.device)
    ids = torch.randint(model.config.vocab_size, (options.samples, options.seqlen))
    about = dict.fromkeys(COLUMNS, "") | {
        "model": "llama-2-7b shape",
        "layers": layers,
        "samples": options.samples,
        "seqlen": options.seqlen,
        "run": run,
        "options": options.options,
    }
    structure, _, method = run.partition("/")
    if method == "llm-compressor":
        return about | measure_peer(model, ids, structure)
    config = parse(run, options)
    if config.offload == "cpu":
        model.to("cpu")
        torch.cuda.empty_cache()
    plan = make_plan(model, find_decoder(model), config)
    with timed_stages() as passes, ExitStack() as stack:
        states = None
        if options.checkpoint is not None:
            states = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.checkpoint)), "states")
            about["run"] += ", kept"
        report = prune(model, ids, config=config, progress=Phases(), checkpoint=states)
    if passes:
        print(f"passes and moments of {len(passes)} stages: {sum(passes):.1f} s", flush=True)
    seconds = {phase: sum(shot.seconds.get(phase, 0.0) for shot in report.shots) for phase in PHASES}
    traces = [trace for shot in report.shots for trace in shot.solver]
    gaps = [trace.gap for trace in traces if trace.gap is not None]
    written = write(model) if options.write else None
    return about | {
        "seconds": f"{report.seconds:.1f}",
        **{phase: f"{value:.2f}" for phase, value in seconds.items()},
        "write": "" if written is None else f"{written:.1f}",
        "iterations": f"{sum(t.iterations for t in traces) / len(traces):.1f}" if traces else "",
        "worst_gap": f"{max(gaps):.4f}" if gaps else "",
        "sparsity": f"{report.sparsity:.4f}",
        "peak_gb": f"{report.peak_memory_bytes / 1e9:.1f}",
        "planned_gb": f"{plan.memory_bytes / 1e9:.1f}",
        "planned_seconds": f"{plan.seconds:.0f}",
    }


@contextmanager
def timed_stages() -> Iterator[list[float]]:
    """Context manager: seconds that the passes and moments of every stage of a sequential update take."""
    taken: list[float] = []
    stages = sequential.stages

    def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        found = iter(stages(*args, **kwargs))
        while True:
            torch.cuda.synchronize()
            begun = time.perf_counter()
            stage = next(found, None)
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - begun)
            if stage is None:
                return
            yield stage

    sequential.stages = timed
    try:
        yield taken
    finally:
        sequential.stages = stages


def measure_peer(model: PreTrainedModel, ids: Tensor, structure: str) -> dict[str, Any]:
    from bench.studies import peer_sparsegpt  # needs what need not be installed

    torch.cuda.reset_peak_memory_stats()
    seconds = peer_sparsegpt.prune(model, ids, structure)
    weights = [linear.weight for linear in find_decoder(model).linears]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return {
        "options": peer_sparsegpt.version(),
        "seconds": f"{seconds:.1f}",
        "sparsity": f"{zeros / sum(weight.numel() for weight in weights):.4f}",
        "peak_gb": f"{torch.cuda.max_memory_allocated() / 1e9:.1f}",
    }


def write(model: PreTrainedModel) -> float:
    """Seconds to write the model as a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        tokenizer: Any = SimpleNamespace(save_pretrained=lambda folder: None)
        save_checkpoint(model, tokenizer, Path(folder) / "model", dtype=torch.bfloat16, extra_files={})
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", nargs="+", default=["2:4", "2:4x5+joint", "unstructuredx5", "rows-columns"])
    parser.add_argument("--layers", type=int, nargs="+", default=[32], help="Decoder blocks: of all runs, or of each.")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--options", default="{}", help="More fields of PruneConfig, as JSON.")
    parser.add_argument("--write", action="store_true", help="Write the pruned model, too.")
    parser.add_argument("--checkpoint", type=Path, help="Keep the run's states in a folder in here while it goes on.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "end_to_end.csv")
    options = parser.parse_args()
    require_gpu(options.device)
    about = environment(options.device)
    layers = options.layers * len(options.runs) if len(options.layers) == 1 else options.layers
    for run, depth in zip(options.runs, layers, strict=True):
        row = {**measure(run, depth, options), **about}
        print(*row.values(), flush=True)
        append_row(options.out, row)


if __name__ == "__main__":
    main()
