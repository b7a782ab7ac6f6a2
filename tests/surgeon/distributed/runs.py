"""Runs that several processes share, and the same ones in a single process.

python -m tests.surgeon.distributed.runs FILE DEVICE    # under torchrun: rank 0 writes what became of every run
python -m tests.surgeon.distributed.runs FOLDER 2 3     # of so many ranks, forked with all imported: FOLDER/2.pt, 3.pt
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_surgeon import prune
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.distributed import ALONE, Ranks
from llm_surgeon.distributed.group import joined
from tests.surgeon.tiny_models import VOCABULARY, build

ROOT = Path(__file__).parents[3]
MODELS = ("llama", "opt", "gpt_neox")
# Options by the name of the run.
RUNS: dict[str, dict[str, Any]] = {
    "2:4": {"structure": "2:4"},
    "2:4 joint": {"structure": "2:4", "update": "joint", "shots": 2},
    # Where less of a layer is kept, its update's conjugate gradients make 1e-4 of a difference of 1e-16.
    "unstructured": {"structure": "unstructured", "shots": 2, "fisher": "empirical", "min_kept": 0.4},
    "rows-columns": {"structure": "rows-columns", "shots": 2},
    "groups": {"structure": "groups", "shots": 2},
}
# Of one model.
MORE_RUNS: dict[str, dict[str, Any]] = {
    "chunked": {"structure": "unstructured", "update": "chunked", "shots": 1},
    "curvature_layers": {"structure": "2:4", "update": "joint", "curvature_layers": 1},
    "offload": {"structure": "unstructured", "update": "joint", "shots": 2, "offload": "cpu", "min_kept": 0.4},
    "offload sequential": {"structure": "2:4", "offload": "cpu"},
    "gradient_steps": {"structure": "2:4", "gradient_steps": 1},
    "gradient_steps joint": {"structure": "2:4", "update": "joint", "gradient_steps": 1, "shots": 1},
    "lora_rank": {"structure": "2:4", "lora_rank": 2, "lora_steps": 2},
    "token_weights": {"structure": "2:4", "token_weights": True},
    "wanda": {"structure": "unstructured", "method": "wanda"},
    "sparsegpt": {"structure": "2:4", "method": "sparsegpt", "update": "sequential"},
    "sparsegpt none": {"structure": "2:4", "method": "sparsegpt", "update": "none"},
    "rows-columns reconstruct": {"structure": "rows-columns", "shots": 1, "reconstruct": True},
    "taylor": {"structure": "groups", "importance": "taylor2", "shots": 1},
    "random": {"structure": "groups", "importance": "random", "shots": 1},
    "width": {"structure": "width", "shots": 2},
    "layers": {"structure": "layers", "sparsity": 0.5},
}
NAMES = [(model, run) for model in MODELS for run in RUNS]
MORE_NAMES = [("llama", run) for run in MORE_RUNS]


def calibration(*, padded: bool) -> Calibration:
    """Seven windows, two of them padded."""
    ids = torch.randint(3, VOCABULARY, (7, 32), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 20:] = False
    mask[5, :4] = False
    return Calibration(ids, mask if padded else None)


def carry_out(model_name: str, run: str, ranks: Ranks = ALONE, device: torch.device | None = None) -> dict[str, Any]:
    """What a run in float64 leaves: weights by name, and the losses and threshold that it reports."""
    model = build(model_name, torch.float64).to(ranks.device or device)
    held_out = torch.randint(3, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1))
    options = {**RUNS, **MORE_RUNS}[run]
    # A batch's loss in training is the mean of its parts', however many tokens these have.
    data = calibration(padded="lora_rank" not in options)
    report = prune(model, data, held_out=held_out, batch_size=2, ranks=ranks, **options)
    numbers = [shot.loss_before for shot in report.shots] + [report.sparsity]
    numbers += [value for shot in report.shots for value in (shot.threshold, shot.predicted_increase) if value]
    assert report.held_out is not None
    numbers += [report.held_out.loss_before, report.held_out.loss_after]
    weights = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    return {"weights": weights, "numbers": numbers, "solver": [trace.layer for trace in report.shots[-1].solver]}


def require_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that a shared run left, on every rank, what the same run left in one process."""
    assert found["same"]
    assert found["solver"] == expected["solver"]
    assert found["numbers"] == pytest.approx(expected["numbers"], rel=1e-6)
    for name, weight in expected["weights"].items():
        assert found["weights"][name].shape == weight.shape, name
        assert torch.equal(found["weights"][name] == 0.0, weight == 0.0), name
        difference = (found["weights"][name] - weight).norm()
        assert difference <= 1e-5 * weight.norm(), (name, float(difference / weight.norm()))


def launch(count: int, module: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start ``python -m module`` as so many ranks."""
    return [start(module, *arguments, **own) for own in variables(count)]


def start(module: str, *arguments: str, **own: str) -> subprocess.Popen[str]:
    """Start ``python -m module`` with variables of its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=environment() | own,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def environment() -> dict[str, str]:
    """Variables of a process of these tests."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}


def variables(count: int) -> list[dict[str, str]]:
    """The environment of every one of so many ranks, as launchers set it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def share(file: Path, device: str) -> None:
    """Carry out all runs as a rank; the first one writes what became of them."""
    with joined(device) as ranks:
        results = {}
        for model, run in NAMES + MORE_NAMES * (ranks.count == 2):
            found = carry_out(model, run, ranks)
            total = float(sum(weight.double().abs().sum() for weight in found["weights"].values()))
            found["same"] = len(set(ranks.everyones((total, str(found["numbers"]))))) == 1
            results[f"{model} {run}"] = found
        if ranks.first:
            torch.save(results, file)


def fork(action: Callable[[], object]) -> int:
    """A child that does ``action`` and ends with 0, or tells of an error and ends with 1."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    folder, *counts = sys.argv[1:]
    if not counts[0].isdigit():
        share(Path(folder), *counts)
        return
    carry_out("llama", "lora_rank")  # what it imports is there for all
    for count in map(int, counts):
        children = []
        for own in variables(count):
            os.environ |= own
            children.append(fork(partial(share, Path(folder) / f"{count}.pt", "cpu")))
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
