"""Perplexity of every method after pruning small trained models.

    python -m bench.end_to_end.quality --models MODEL [MODEL ...] --data wikitext-2.zip

Calibration: 128 windows of 1024 tokens drawn from the text's train part with a seed. Perplexity: the test part's
non-overlapping windows of 1024, tail dropped, the model in float32 throughout.

A method may be followed by options that differ from the defaults: ``"surgeon joint, swaps 2, schedule 1.5"``.

Every trial is appended to ``quality_trials.csv`` as it ends; trials found there are not run again. ``quality.csv`` is
made anew from it: one row per model, structure and method, the mean over the calibration seeds.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.environment import append_row, environment
from llm_surgeon import InputError, PruneConfig, perplexity, prune
from llm_surgeon.checkpoint import load_model
from llm_surgeon.config.methods import method as record
from llm_surgeon.config.prune import GRADIENT_IMPORTANCES
from llm_surgeon.data.calibration import calibration_windows, evaluation_windows
from llm_surgeon.data.documents import read_text
from llm_surgeon.data.tokens import tokenize

SAMPLES, SEQLEN = 128, 1024
STRUCTURES: dict[str, dict[str, Any]] = {
    "2:4": {"structure": "2:4"},
    "unstructured 50%": {"structure": "unstructured", "sparsity": 0.5},
    "rows-columns 20%": {"structure": "rows-columns", "sparsity": 0.2},
    "rows-columns 30%": {"structure": "rows-columns", "sparsity": 0.3},
    "groups 20%": {"structure": "groups", "sparsity": 0.2},
    "groups 30%": {"structure": "groups", "sparsity": 0.3},
    "width 20%": {"structure": "width", "sparsity": 0.2},
    "layers 25%": {"structure": "layers", "sparsity": 0.25},
}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "l-obd": {"method": "l-obd"},
    "k-obd": {"method": "k-obd"},
    "sparsegpt": {"method": "sparsegpt"},
    "surgeon none": {"method": "surgeon", "update": "none"},
    "surgeon independent": {"method": "surgeon", "update": "independent"},
    "surgeon chunked": {"method": "surgeon", "update": "chunked"},
    "surgeon joint": {"method": "surgeon", "update": "joint"},
    "surgeon sequential": {"method": "surgeon", "update": "sequential"},
    # Of coupled groups, by LLM-Pruner's importances: alike in every layer, as its default is, or over the whole model.
    **{
        f"{importance}{suffix}": {"importance": importance, "allocation": allocation}
        for importance in (*GRADIENT_IMPORTANCES, "magnitude", "random")
        for suffix, allocation in ((" local", "local"), (" global", "global"))
    },
}
_TOKENS: dict[tuple[str, str, str], torch.Tensor] = {}
TRIAL_FIELDS = ("model", "structure", "method", "seed")


def options_of(method: str) -> dict[str, Any]:
    """Options of the configuration, of ``"method, option value, option value"``."""
    name, *changes = method.split(", ")
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(METHODS)}")
    try:
        return METHODS[name] | {option: yaml.safe_load(value) for option, value in map(str.split, changes)}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{method!r}: after a comma and a space comes 'option value'") from error


def known_method(text: str) -> str:
    """``text``, if it names a method."""
    options_of(text)
    return text


def run(trial: dict[str, Any], model_path: str, data: str, device: str) -> dict[str, Any]:
    """Prune once and evaluate: the trial with its figures, as strings."""
    torch.set_num_threads(1)
    model, tokenizer, _ = load_model(model_path, device=torch.device(device))
    windows = evaluation_windows(_tokens(model_path, data, "evaluation", tokenizer), SEQLEN)
    begun, shots, sparsity, iterations = time.perf_counter(), 0, 0.0, [0]
    if trial["method"] != "dense":
        tokens = _tokens(model_path, data, "calibration", tokenizer)
        config = PruneConfig(**options_of(trial["method"]), **STRUCTURES[trial["structure"]], seed=trial["seed"])
        report = prune(model, calibration_windows(tokens, SAMPLES, SEQLEN, trial["seed"]), config=config)
        shots, sparsity = len(report.shots), report.sparsity
        iterations = [trace.iterations for shot in report.shots for trace in shot.solver] or [0]
    seconds = time.perf_counter() - begun
    return {
        **trial,
        "perplexity": f"{perplexity(model, windows):.4f}",
        "shots": shots,
        "sparsity": f"{sparsity:.5f}",
        "solver_iterations": f"{sum(iterations) / len(iterations):.1f}",
        "seconds": f"{seconds:.1f}",
        **environment(device),
    }


def _tokens(model_path: str, data: str, part: Any, tokenizer: Any) -> torch.Tensor:
    """The text's ids; a process tokenizes each text once."""
    key = (model_path, data, part)
    if key not in _TOKENS:
        _TOKENS[key] = tokenize(read_text(data, part), tokenizer)
    return _TOKENS[key]


def plan(models: list[str], structures: list[str], methods: list[str], seeds: list[int]) -> list[dict[str, Any]]:
    """Every combination that is defined, the longest first; what needs no data does not depend on the seed."""
    trials: list[tuple[str, str, str, int]] = [(model, "none", "dense", 0) for model in models]
    for model in models:
        for structure in structures:
            for method in methods:
                try:
                    config = PruneConfig(**STRUCTURES[structure], **METHODS[method.split(", ")[0]])
                except InputError:
                    continue
                chosen = seeds if record(config.method).needs != "nothing" else seeds[:1]
                trials += [(model, structure, method, seed) for seed in chosen]
    weight = {"surgeon chunked": 4, "surgeon joint": 2, "k-obd": 2}
    trials.sort(key=lambda t: -weight.get(t[2], 1) - 3 * (t[1].startswith("rows") and t[2] in weight))
    return [dict(zip(TRIAL_FIELDS, trial, strict=True)) for trial in trials]


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def summarise(trials: list[dict[str, Any]], path: Path) -> None:
    """The means over seeds, as a table on the screen and a file."""
    order = ["dense", *METHODS]

    def place(model: str, structure: str, method: str) -> tuple[Any, ...]:
        return model, structure, order.index(method.split(", ")[0]), method

    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for trial in sorted(trials, key=lambda t: int(t["seed"])):
        groups.setdefault((trial["model"], trial["structure"], trial["method"]), []).append(trial)
    rows = []
    for (model, structure, method), group in sorted(groups.items(), key=lambda g: place(*g[0])):
        rows.append(
            {
                "model": model,
                "structure": structure,
                "method": method,
                "shots": group[0]["shots"],
                "sparsity": f"{_mean(group, 'sparsity'):.5f}",
                "perplexity": f"{_mean(group, 'perplexity'):.3f}",
                "seeds": " ".join(str(trial["seed"]) for trial in group),
                "perplexity_by_seed": " ".join(str(trial["perplexity"]) for trial in group),
                "solver_iterations": f"{_mean(group, 'solver_iterations'):.1f}",
                "seconds": f"{_mean(group, 'seconds'):.1f}",
                **{key: group[0][key] for key in ("device", "torch", "transformers", "commit")},
            }
        )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*(row[key] for key in list(row)[:-4]), sep=" | ")


def _mean(group: list[dict[str, Any]], key: str) -> float:
    return sum(float(trial[key]) for trial in group) / len(group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True)
    parser.add_argument("--data", required=True, help="text with train and test parts (.zip)")
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument("--methods", nargs="+", type=known_method, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--devices", nargs="+", default=["cuda" if torch.cuda.is_available() else "cpu"])
    parser.add_argument("--jobs", type=int, default=1, help="prunings at once on each device")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder of the tables")
    options = parser.parse_args()
    paths = {path.name: str(path) for path in options.models}
    trials_file = options.out / "quality_trials.csv"
    done = {tuple(str(trial[key]) for key in TRIAL_FIELDS) for trial in read(trials_file)}
    trials = plan(list(paths), options.structures, options.methods, options.seeds)
    trials = [trial for trial in trials if tuple(str(trial[key]) for key in TRIAL_FIELDS) not in done]
    with multiprocessing.get_context("spawn").Pool(options.jobs * len(options.devices), maxtasksperchild=8) as pool:
        results = pool.imap_unordered(
            _run_unpacked,
            [
                (t, paths[t["model"]], options.data, options.devices[i % len(options.devices)])
                for i, t in enumerate(trials)
            ],
        )
        for row in results:
            append_row(trials_file, row)
            print(*(row[key] for key in (*TRIAL_FIELDS, "perplexity", "solver_iterations", "seconds")), flush=True)
    summarise(read(trials_file), options.out / "quality.csv")


def _run_unpacked(arguments: tuple[dict[str, Any], str, str, str]) -> dict[str, Any]:
    return run(*arguments)


if __name__ == "__main__":
    main()
