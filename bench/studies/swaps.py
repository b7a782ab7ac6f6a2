"""Perplexity with and without swaps of kept and pruned weights in the joint update, small enough for a CPU.

    python -m bench.studies.swaps --model MODEL --data wikitext-2.zip --rounds 0 2
    python -m bench.studies.swaps --model MODEL --data wikitext-2.zip --rounds 0 --kron-rank 2

Two decoder blocks are pruned in one shot with curvature of 48 x 512 tokens of the train part; perplexity is that of the
first 40 windows of 512 of the test part, held out. Rows are appended to ``results/exchange_trials.csv``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.environment import append_row, environment
from llm_surgeon import PruneConfig, perplexity
from llm_surgeon.checkpoint import load_model
from llm_surgeon.data.calibration import calibration_windows, evaluation_windows
from llm_surgeon.data.documents import read_text
from llm_surgeon.data.tokens import tokenize
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.planning.plan import make_plan
from llm_surgeon.shots.run import Run
from llm_surgeon.shots.runner import run_shots
from llm_surgeon.shots.weights import WeightShots

_BLOCKS = (1, 4)
_SEQLEN = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True, help="text with train and test parts (.zip)")
    parser.add_argument("--structure", default="2:4")
    parser.add_argument("--rounds", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--kron-rank", type=int, default=1, help="2: a sum of two Kronecker products; no rounds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "exchange_trials.csv")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for rounds in options.rounds:
        model, tokenizer, _ = load_model(str(options.model), device=torch.device(device))
        tokens = tokenize(read_text(options.data, "calibration"), tokenizer)
        windows = evaluation_windows(tokenize(read_text(options.data, "evaluation"), tokenizer), _SEQLEN)[:40]
        decoder = find_decoder(model)
        decoder.linears[:] = [linear for linear in decoder.linears if linear.depth in _BLOCKS]
        chosen = {"structure": options.structure, "update": "joint", "swaps": rounds, "kron_rank": options.kron_rank}
        config = PruneConfig(**chosen, shots=1, samples=48, seqlen=_SEQLEN)
        dense = perplexity(model, windows)
        data = calibration_windows(tokens, 48, _SEQLEN, 0)
        run = Run(model, decoder, data, config, make_plan(model, decoder, config))
        shot = run_shots(WeightShots(run), run).shots[0]
        row = {
            "model": options.model.name,
            "structure": options.structure,
            "rounds": rounds,
            "kron_rank": options.kron_rank,
            "dense": f"{dense:.4f}",
            "perplexity": f"{perplexity(model, windows):.4f}",
            "predicted_increase": f"{shot.predicted_increase:.5f}",
            "measured_increase": f"{shot.measured_increase:.5f}",
            "update_seconds": f"{shot.seconds['update']:.1f}",
            **environment(device),
        }
        append_row(options.out, row)
        print(*list(row.values())[:9], sep=" | ", flush=True)


if __name__ == "__main__":
    main()
