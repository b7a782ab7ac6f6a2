"""Perplexity of a pretrained model after pruning, calibrated on one text and evaluated on others, too.

    python -m bench.end_to_end.real_model --model FOLDER --tokens FILE.npz --structures 2:4 'unstructured 70%' \
        --methods sparsegpt 'surgeon sequential, target_damping 0.03' --devices cuda:0 cuda:1

``--tokens`` holds token ids of texts, an array each. Calibration: 128 windows of 2048 tokens of one, whose starts
``numpy.random.default_rng(seed)`` draws. Perplexity: non-overlapping windows of 2048 of each of the others, tail
dropped, the model in float32 throughout. Structures and methods are those of bench/end_to_end/trials.py.

Every trial loads the model from its folder, and is appended to ``real_model_trials.csv`` as it ends, with what went
wrong if it failed; trials that did not fail are not run again without ``--again``. ``real_model.csv`` is made anew from
it: the means over the seeds. A model that ``--save`` keeps is in the dtype of its folder.
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.end_to_end.trials import (
    METHODS,
    TRIAL_FIELDS,
    Row,
    by_seed,
    first,
    known_method,
    known_structure,
    mean,
    plan,
    read,
    results,
    run_trial,
    summarise,
    undone,
)
from bench.environment import append_row, environment
from llm_surgeon import InputError, PruneReport, perplexity
from llm_surgeon.checkpoint import claimed_output, load_model
from llm_surgeon.data.calibration import Calibration, evaluation_windows
from llm_surgeon.jobs.prune import write_pruned

STRUCTURES = ("2:4", "unstructured 50%", "unstructured 70%", "groups 20%")
COMPARED = (
    "magnitude",
    "wanda",
    "sparsegpt",
    "sparsegpt sequential",
    "admm",
    "surgeon joint",
    "surgeon sequential",
    "surgeon",
    "taylor1 local",
)
FIGURES = ("shots", "sparsity", "solver_iterations", "seconds")
OF_REPORT = ("loss_before", "loss_after", "predicted_increase", "peak_gb")


@dataclass(frozen=True)
class Protocol:
    """Texts and windows: ``calibration`` and ``evaluation`` name arrays of the file ``tokens``."""

    tokens: Path
    calibration: str
    evaluation: tuple[str, ...]
    samples: int
    seqlen: int

    def calibration_windows(self, seed: int) -> Calibration:
        ids = _ids(self.tokens, self.calibration)
        starts = np.random.default_rng(seed).integers(0, len(ids) - self.seqlen, self.samples)
        return Calibration(ids.unfold(0, self.seqlen, 1)[torch.from_numpy(starts)])

    def perplexities(self, model: torch.nn.Module) -> Row:
        """Columns of a row, one of each evaluation text."""
        texts = {name: evaluation_windows(_ids(self.tokens, name), self.seqlen) for name in self.evaluation}
        return {name: f"{perplexity(model, windows):.4f}" for name, windows in texts.items()}

    def described(self) -> Row:
        """Columns of a trial that tell it from those of other protocols."""
        return {"calibration": self.calibration, "windows": f"{self.samples}x{self.seqlen}"}

    def check(self) -> None:
        """Raise :class:`InputError` where the file lacks an array, or tokens for a window."""
        if not self.tokens.is_file():
            raise InputError(f"there is no file {str(self.tokens)!r}")
        with np.load(self.tokens) as arrays:
            lengths = {name: len(arrays[name]) for name in arrays}
        for name in (self.calibration, *self.evaluation):
            if name not in lengths:
                raise InputError(f"{str(self.tokens)!r} holds {', '.join(lengths)}, and no {name!r}")
            if lengths[name] <= self.seqlen:
                raise InputError(f"{name!r} has {lengths[name]} tokens: a window of {self.seqlen} needs more")


@cache
def _ids(tokens: Path, name: str) -> Tensor:
    with np.load(tokens) as arrays:
        return torch.from_numpy(arrays[name].astype(np.int64))


def run(folder: Path, protocol: Protocol, save: Path | None, trial: Row, device: str) -> Row:
    """Load, prune, evaluate and maybe save once: the trial with its figures, as strings, or with what went wrong."""
    columns = dict.fromkeys((*protocol.evaluation, *FIGURES, *OF_REPORT, "error"), "")
    try:
        columns |= _figures(folder, protocol, save, trial, device)
    except Exception as error:  # a failure is a finding, and other trials follow
        traceback.print_exc()
        columns["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return {**trial, **columns, **environment(device)}


def _figures(folder: Path, protocol: Protocol, save: Path | None, trial: Row, device: str) -> Row:
    model, tokenizer, form = load_model(folder, device=torch.device(device))
    report, figures = run_trial(model, trial, lambda: protocol.calibration_windows(trial["seed"]))
    if save is not None and report is not None:
        name = re.sub(r"[^\w.]+", "-", " ".join(str(trial[field]) for field in TRIAL_FIELDS))
        with claimed_output(save / name, overwrite=True) as output:
            write_pruned(model, tokenizer, output, form, report, str(folder))
    return {**protocol.perplexities(model), **figures, **({} if report is None else of_report(report))}


def of_report(report: PruneReport) -> Row:
    """Losses of the calibration windows before and after, what was predicted (nats per token) and the peak memory."""
    before, increases = report.shots[0].loss_before, [shot.measured_increase for shot in report.shots]
    predicted = [shot.predicted_increase for shot in report.shots]
    known = before is not None and None not in increases
    return {
        "loss_before": "" if before is None else f"{before:.4f}",
        "loss_after": f"{before + sum(increases):.4f}" if known else "",
        "predicted_increase": "" if None in predicted else f"{sum(predicted):.4f}",
        "peak_gb": f"{report.peak_memory_bytes / 1e9:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--tokens", type=Path, required=True, help="its token ids of texts (.npz)")
    parser.add_argument("--calibration", default="c4_train", help="array that is calibrated on")
    parser.add_argument("--evaluation", nargs="+", default=["wt_test", "c4_test"], help="arrays that are evaluated on")
    parser.add_argument("--structures", nargs="+", type=known_structure, default=STRUCTURES)
    parser.add_argument("--methods", nargs="+", type=known_method, default=COMPARED, help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--devices", nargs="+", default=["cuda" if torch.cuda.is_available() else "cpu"])
    parser.add_argument("--again", action="store_true", help="also trials that have rows, which count no more")
    parser.add_argument("--save", type=Path, help="folder for the pruned models, each in one of its own")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder of the tables")
    options = parser.parse_args()
    folder = options.model.resolve()
    texts = options.calibration, tuple(options.evaluation)
    protocol = Protocol(options.tokens.resolve(), *texts, options.samples, options.seqlen)
    trials_file = options.out / "real_model_trials.csv"
    try:
        protocol.check()
        trials = planned(folder.name, protocol, options, succeeded(trials_file, protocol))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    for row in results(partial(run, folder, protocol, options.save), trials, options.devices):
        append_row(trials_file, row)
        print(*(row[key] for key in (*TRIAL_FIELDS, *protocol.evaluation, *OF_REPORT, "seconds", "error")), flush=True)
    fields = ("model", *protocol.described(), "structure", "method")
    columns = {
        **{name: mean(name, 3) for name in protocol.evaluation},
        **{name: mean(name, 4) for name in ("loss_before", "loss_after", "predicted_increase")},
        "shots": first("shots"),
        "sparsity": mean("sparsity", 5),
        "seconds": mean("seconds", 1),
        "peak_gb": mean("peak_gb", 2),
        "seeds": by_seed("seed"),
        **{f"{name}_by_seed": by_seed(name) for name in protocol.evaluation},
    }
    summarise(succeeded(trials_file, protocol), options.out / "real_model.csv", fields, columns)


def planned(model: str, protocol: Protocol, options: argparse.Namespace, rows: list[Row]) -> list[Row]:
    """Trials that are asked for and not among ``rows``, the dense model first."""
    trials = plan([model], options.structures, options.methods, options.seeds)
    return undone([{**trial, **protocol.described()} for trial in trials], [] if options.again else rows)


def succeeded(path: Path, protocol: Protocol) -> list[Row]:
    """Last rows of trials that did not fail; :class:`InputError` where they are of other evaluation texts."""
    rows = read(path)
    if rows and not set(protocol.evaluation) <= set(rows[0]):
        raise InputError(f"{str(path)!r} is of other evaluation texts: choose another --out")
    fields = (*TRIAL_FIELDS, *protocol.described())
    return list({tuple(row[field] for field in fields): row for row in rows if not row["error"]}.values())


if __name__ == "__main__":
    main()
