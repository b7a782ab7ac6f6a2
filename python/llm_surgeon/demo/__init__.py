"""The main job on a small model that ships with the package: no network, no GPU, under two minutes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch

from llm_surgeon.checkpoint import Output, checkpoint_bytes, claimed_output, load_model
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.data.calibration import calibration_windows, evaluation_windows
from llm_surgeon.data.documents import read_text
from llm_surgeon.data.tokens import tokenize
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.jobs.prune import write_pruned
from llm_surgeon.progress import Progress
from llm_surgeon.pruning import prune
from llm_surgeon.report.schema import HeldOutLoss
from llm_surgeon.resources import require_disk

_NAME = "the demo model of surgeon-kernels"
_METHODS = {"magnitude": "Magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "surgeon": "Surgeon"}
_SEQLEN, _CALIBRATION_WINDOWS, _TEST_WINDOWS = 256, 32, 64


@dataclass(frozen=True)
class DemoResult:
    """One row of the demo's table; ``seconds`` is the time to prune."""

    name: str
    perplexity: float
    seconds: float


def run_demo(out: str | Path, progress: Progress | None = None, *, overwrite: bool = False) -> list[DemoResult]:
    """Prune the shipped model to 2:4 with four methods; write the Surgeon one and its report to ``out``.

    Returns:
        Dense first, then the methods; the same figures on each run of one machine.
    """
    progress = progress or Progress()
    with as_file(files("llm_surgeon.demo") / "assets") as assets:
        source = assets / "model"
        with claimed_output(out, overwrite, model=source) as output:
            return _prune_and_compare(source, assets, output, progress)


def _prune_and_compare(source: Path, assets: Path, output: Output, progress: Progress) -> list[DemoResult]:
    train = read_text(str(assets / "wikitext2-train-slice.txt"), "calibration")
    test = read_text(str(assets / "wikitext2-test-slice.txt"), "evaluation")
    model, tokenizer, form = load_model(str(source), device=torch.device("cpu"))
    require_disk(output.path, checkpoint_bytes(model, tokenizer, form))
    calibration = calibration_windows(tokenize(train, tokenizer), _CALIBRATION_WINDOWS, _SEQLEN, seed=0)
    windows = evaluation_windows(tokenize(test, tokenizer), _SEQLEN)[:_TEST_WINDOWS]
    dense = perplexity(model, windows)
    results = [DemoResult("Dense", dense, 0.0)]
    for method, name in _METHODS.items():
        progress.phase(name)
        model, tokenizer, form = load_model(str(source), device=torch.device("cpu"))
        begun = time.perf_counter()
        report = prune(model, calibration, config=PruneConfig(method=method), progress=progress)
        seconds = time.perf_counter() - begun
        results.append(DemoResult(name, perplexity(model, windows), seconds))
    report.model = _NAME
    losses = math.log(dense), math.log(results[-1].perplexity)
    report.evaluation = HeldOutLoss(len(windows), windows.numel(), *losses)
    write_pruned(model, tokenizer, output, form, report, _NAME)
    return results
