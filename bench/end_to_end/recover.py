"""Perplexity of a small trained model after pruning and after each of several recoveries of it.

    python -m bench.end_to_end.recover --model MODEL --data wikitext-2.zip --other c4-sample.zip --structure 2:4
    python -m bench.end_to_end.recover ... --options '{"gradient_steps": 1}' --trials

The model is pruned once with 128 windows of 1024 tokens; every trial recovers a copy of it. A trial reads
``method:objective:learning rate:steps``, objective ``plain`` or ``distill`` (from the dense model), 32 sequences of 512
tokens a step. Perplexity: non-overlapping windows of 1024 of the test part of ``--data`` and of all of ``--other``, the
model in float32. Rows are appended to results/recover.csv.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch

from bench.environment import append_row, environment
from llm_surgeon import PruneConfig, perplexity, prune
from llm_surgeon.checkpoint import load_model
from llm_surgeon.data.calibration import calibration_windows, evaluation_windows
from llm_surgeon.data.documents import read_text
from llm_surgeon.data.tokens import tokenize
from llm_surgeon.recovery.recover import recover

SAMPLES, SEQLEN = 128, 1024
BATCH, TRAIN_SEQLEN, HELD_OUT = 32, 512, 64
TRIALS = ["full:distill:5e-4:200", "full:distill:1e-3:200", "full:plain:5e-4:200", "lora:distill:2e-3:200"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True, help="text with train and test parts (.zip)")
    parser.add_argument("--other", required=True, help="text of another kind, evaluated only")
    parser.add_argument("--structure", default="2:4")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--options", default="{}", help="further options of the pruning, as JSON")
    parser.add_argument("--trials", nargs="*", default=TRIALS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    options = parser.parse_args()
    dense, tokenizer, _ = load_model(options.model, device=torch.device(options.device))
    tests = [
        evaluation_windows(tokenize(read_text(t, "evaluation"), tokenizer), SEQLEN)
        for t in (options.data, options.other)
    ]
    train = tokenize(read_text(options.data, "calibration"), tokenizer)
    cut = len(train) - HELD_OUT * TRAIN_SEQLEN
    held_out = evaluation_windows(train[cut:], TRAIN_SEQLEN)

    def record(name: str, model: torch.nn.Module, tokens: int, seconds: float) -> None:
        first, second = (perplexity(model, windows) for windows in tests)
        row = {
            "model": options.model.name,
            "structure": f"{options.structure} {options.sparsity or ''}".strip(),
            "trial": name,
            "seed": options.seed,
            "tokens": tokens,
            "perplexity": f"{first:.3f}",
            "other_perplexity": f"{second:.3f}",
            "seconds": f"{seconds:.1f}",
            **environment(options.device),
        }
        append_row(options.out / "recover.csv", row)
        print(*list(row.values())[:8], flush=True)

    record("dense", dense, 0, 0.0)
    pruned, further = copy.deepcopy(dense), json.loads(options.options)
    config = PruneConfig(structure=options.structure, sparsity=options.sparsity, seed=options.seed, **further)
    begun = time.perf_counter()
    prune(pruned, calibration_windows(train, SAMPLES, SEQLEN, options.seed), config=config)
    name = ", ".join(["pruned", *(f"{option} {value}" for option, value in further.items())])
    record(name, pruned, 0, time.perf_counter() - begun)
    for trial in options.trials:
        method, objective, rate, steps = trial.split(":")
        model = copy.deepcopy(pruned)
        windows = calibration_windows(train[:cut], int(steps) * BATCH, TRAIN_SEQLEN, options.seed).input_ids
        report = recover(
            model,
            windows,
            held_out,
            teacher=dense if objective == "distill" else None,
            method=method,
            learning_rate=float(rate),
            steps=int(steps),
            batch_size=BATCH,
            rank=options.rank,
            alpha=2.0 * options.rank,
            seed=options.seed,
        )
        record(trial, model, report.tokens, report.seconds)


if __name__ == "__main__":
    main()
