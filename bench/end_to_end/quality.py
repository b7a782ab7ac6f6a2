"""Perplexity of every method after pruning small trained models.

    python -m bench.end_to_end.quality --models MODEL [MODEL ...] --data wikitext-2.zip

Calibration: 128 windows of 1024 tokens drawn from the text's train part with a seed. Perplexity: the test part's
non-overlapping windows of 1024, tail dropped, the model in float32 throughout. Structures and methods are those of
bench/end_to_end/trials.py.

Every trial is appended to ``quality_trials.csv`` as it ends; trials found there are not run again. ``quality.csv`` is
made anew from it: one row per model, structure and method, the mean over the calibration seeds.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.end_to_end.trials import (
    METHODS,
    TRIAL_FIELDS,
    Row,
    by_seed,
    first,
    known_method,
    known_structure,
    mean,
    method_options,
    plan,
    read,
    results,
    run_trial,
    structure_options,
    summarise,
    undone,
)
from bench.environment import append_row, environment
from llm_surgeon import PruneConfig, perplexity
from llm_surgeon.checkpoint import load_model
from llm_surgeon.data.calibration import Calibration, calibration_windows, evaluation_windows
from llm_surgeon.data.documents import read_text
from llm_surgeon.data.tokens import tokenize

SAMPLES, SEQLEN = 128, 1024
STRUCTURES = (
    "2:4",
    "unstructured 50%",
    "rows-columns 20%",
    "rows-columns 30%",
    "groups 20%",
    "groups 30%",
    "width 20%",
    "layers 25%",
)
_TOKENS: dict[tuple[str, str, str], torch.Tensor] = {}


def run(paths: dict[str, str], data: str, trial: Row, device: str) -> Row:
    """Prune once and evaluate: the trial with its figures, as strings."""
    torch.set_num_threads(1)
    path = paths[trial["model"]]
    model, tokenizer, _ = load_model(path, device=torch.device(device))

    def calibration() -> Calibration:
        return calibration_windows(_tokens(path, data, "calibration", tokenizer), SAMPLES, SEQLEN, trial["seed"])

    windows = evaluation_windows(_tokens(path, data, "evaluation", tokenizer), SEQLEN)
    _, figures = run_trial(model, trial, calibration)
    return {**trial, "perplexity": f"{perplexity(model, windows):.4f}", **figures, **environment(device)}


def _tokens(model_path: str, data: str, part: Any, tokenizer: Any) -> torch.Tensor:
    """The text's ids; a process tokenizes each text once."""
    key = (model_path, data, part)
    if key not in _TOKENS:
        _TOKENS[key] = tokenize(read_text(data, part), tokenizer)
    return _TOKENS[key]


def weight(trial: Row) -> float:
    """Relative time that a trial takes, for the longest to begin first: its shots, and what solves for weights."""
    if trial["method"] == "dense":
        return 0.0
    config = PruneConfig(**{**method_options(trial["method"]), **structure_options(trial["structure"])})
    singly = config.structure_record.single_weights
    solving = {"joint": 1.0, "chunked": 3.0}.get(config.update, 0.0) if singly else 0.0
    return (
        config.shots * (1.0 + solving) + 2.0 * (config.sequential or config.reconstruct) + (config.gradient_steps or 0)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True)
    parser.add_argument("--data", required=True, help="text with train and test parts (.zip)")
    parser.add_argument("--structures", nargs="+", type=known_structure, default=STRUCTURES)
    parser.add_argument("--methods", nargs="+", type=known_method, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--devices", nargs="+", default=["cuda" if torch.cuda.is_available() else "cpu"])
    parser.add_argument("--jobs", type=int, default=1, help="prunings at once on each device")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder of the tables")
    options = parser.parse_args()
    paths = {path.name: str(path) for path in options.models}
    planned = sorted(plan(paths, options.structures, options.methods, options.seeds), key=lambda trial: -weight(trial))
    file = options.out / "quality_trials.csv"
    for row in results(partial(run, paths, options.data), undone(planned, read(file)), options.devices * options.jobs):
        append_row(file, row)
        print(*(row[key] for key in (*TRIAL_FIELDS, "perplexity", "solver_iterations", "seconds")), flush=True)
    columns = {
        "shots": first("shots"),
        "sparsity": mean("sparsity", 5),
        "perplexity": mean("perplexity", 3),
        "seeds": by_seed("seed"),
        "perplexity_by_seed": by_seed("perplexity"),
        "solver_iterations": mean("solver_iterations", 1),
        "seconds": mean("seconds", 1),
    }
    summarise(read(file), options.out / "quality.csv", TRIAL_FIELDS[:-1], columns)


if __name__ == "__main__":
    main()
