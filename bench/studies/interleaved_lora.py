"""Perplexity of structured pruning with and without low-rank corrections between shots, at equal shots.

    python -m bench.studies.interleaved_lora --model MODEL --data wikitext-2.zip --sparsities 0.1 0.2 0.3 0.4

The question of Table 2 of The LLM Surgeon. Calibration and corrections: the same 128 windows of 1024 tokens of the
text's train part; perplexity: its test part's non-overlapping windows of 1024, the model in float32. A correction reads
``rank:steps:learning rate``, ``0:0:0`` is none. Rows are appended to results/interleaved_lora.csv.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch

from bench.environment import append_row, environment
from llm_surgeon import perplexity, prune
from llm_surgeon.checkpoint import load_model
from llm_surgeon.data.calibration import calibration_windows, evaluation_windows
from llm_surgeon.data.documents import read_text
from llm_surgeon.data.tokens import tokenize

SAMPLES, SEQLEN = 128, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True, help="text with train and test parts (.zip)")
    parser.add_argument("--structure", default="rows-columns")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--corrections", nargs="+", default=["0:0:0", "8:32:1e-3"])
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    options = parser.parse_args()
    dense, tokenizer, _ = load_model(options.model, device=torch.device(options.device))
    train, test = (tokenize(read_text(options.data, part), tokenizer) for part in ("calibration", "evaluation"))
    windows = calibration_windows(train, SAMPLES, SEQLEN, options.seed)
    for sparsity in options.sparsities:
        for correction in options.corrections:
            rank, steps, rate = correction.split(":")
            lora: dict[str, Any] = {}
            if int(rank):
                lora = {"lora_rank": int(rank), "lora_steps": int(steps), "lora_learning_rate": float(rate)}
            model = copy.deepcopy(dense)
            what = {"structure": options.structure, "sparsity": sparsity, "shots": options.shots, "seed": options.seed}
            report = prune(model, windows, update="joint", **what, **lora)
            row = {
                "model": options.model.name,
                **what,
                "correction": correction,
                "perplexity": f"{perplexity(model, evaluation_windows(test, SEQLEN)):.3f}",
                "seconds": f"{report.seconds:.1f}",
                "correction_seconds": f"{sum(shot.seconds.get('correction', 0.0) for shot in report.shots):.1f}",
                **environment(options.device),
            }
            append_row(options.out / "interleaved_lora.csv", row)
            print(*list(row.values())[:9], flush=True)


if __name__ == "__main__":
    main()
