"""Golden hashes: what a run of every method and structure leaves, bit for bit.

    python -m tests.surgeon.golden                       # tiny random models against the rows on record
    python -m tests.surgeon.golden --model MODEL...      # checkpoints against theirs
    python -m tests.surgeon.golden --record              # append rows where a case has none

A refactoring must not change them. Each case prunes on a CPU with one thread and a fixed seed; its row in
``bench/results/golden.csv`` has the SHA-256 of the zeros of the linear weights (masks) and that of all parameters
(weights). Other versions of PyTorch and other instruction sets round sums in another order, so a row holds for the ones
that it names alone. A changed algorithm records rows anew, and says so in its commit.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.environment import append_row, environment
from llm_surgeon import prune
from llm_surgeon.checkpoint import load_model
from llm_surgeon.errors import InputError
from tests.surgeon.tiny_models import NAMES, build

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "golden.csv"
_SAMPLES, _SEQLEN = 4, 64
_OPTIONS = ("structure", "method", "update", "importance", "more")


def cases() -> list[dict[str, Any]]:
    """Options of :func:`llm_surgeon.prune`, one mapping a run."""
    single: list[dict[str, Any]] = [{"update": update} for update in ("joint", "chunked", "independent", "none")]
    single += [{"method": method} for method in ("sparsegpt", "wanda", "magnitude", "l-obd", "k-obd")]
    found = [{"structure": structure, **case} for structure in ("2:4", "unstructured") for case in single]
    found += [
        {"structure": "1:4"},
        {"structure": "2:4", "shots": 1},
        {"structure": "2:4", "update": "sequential", "shots": 1},
        {"structure": "unstructured", "update": "sequential", "shots": 1, "token_weights": False},
        {"structure": "2:4", "update": "sequential", "fisher": "sampled", "shots": 1},
        {"structure": "1:4", "update": "sequential", "fisher": "sampled", "shots": 1},
        {"structure": "unstructured", "update": "sequential", "fisher": "sampled"},
        {"structure": "2:4", "kron_rank": 2},
        {"structure": "2:4", "fisher": "sampled"},
        {"structure": "2:4", "checkpoint_activations": True},
        {"structure": "2:4", "curvature_layers": 2},
        {"structure": "2:4", "lora_rank": 2, "lora_steps": 2},
        {"structure": "unstructured", "gradient_steps": 1},
        {"structure": "unstructured", "schedule": 2.0},
    ]
    found += [{"structure": "rows-columns", "update": update} for update in ("joint", "independent", "none")]
    found += [{"structure": "rows-columns", "method": method} for method in ("k-obd", "l-obd", "magnitude")]
    kinds = ("kronecker", "taylor1", "taylor2", "taylor-mix", "vector", "magnitude", "random")
    found += [{"structure": "groups", "importance": importance} for importance in kinds]
    found += [
        {"structure": "groups", "update": "none"},
        {"structure": "groups", "allocation": "local"},
        {"structure": "groups", "uniform": True},
        {"structure": "groups", "skip_layers": "0"},
    ]
    for structure in ("width", "layers"):
        found += [{"structure": structure, "importance": importance} for importance in ("kronecker", "taylor1")]
        found += [{"structure": structure, "update": "none"}]
    # One shot where a method re-estimates nothing, two elsewhere: what a second shot starts from is part of the result.
    once = [case.get("method") == "sparsegpt" or case["structure"] == "layers" for case in found]
    short = [case["structure"] in ("2:4", "1:4", "unstructured") and case.get("update", "joint") == "joint"
             and case.get("method", "surgeon") == "surgeon" for case in found]  # fmt: skip
    return [
        ({} if few else {"shots": 2}) | ({"max_iterations": 8} if cut else {}) | case
        for case, few, cut in zip(found, once, short, strict=True)
    ]


def first_defaults(case: dict[str, Any]) -> dict[str, Any]:
    """Defaults of when the first rows were made, where they were others."""
    method = case.get("method", "surgeon")
    labels = {"fisher": "empirical"} if method in ("surgeon", "k-obd") else {}
    single = method == "surgeon" and case["structure"] in ("2:4", "1:4", "unstructured")
    return labels | ({"update": "joint"} if single else {})


def label(case: dict[str, Any]) -> dict[str, str]:
    """The columns of the results that name a case."""
    more = " ".join(f"{name}={value}" for name, value in case.items() if name not in _OPTIONS)
    return {name: str(case.get(name, "")) for name in _OPTIONS[:-1]} | {"more": more}


def hashes(name: str, case: dict[str, Any]) -> dict[str, str]:
    """Prune a checkpoint, or the tiny model of that name, in memory; the hashes of its masks and its weights."""
    at = torch.device("cpu")
    model = build(name) if name in NAMES else load_model(name, dtype=torch.float32, device=at)[0]
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (_SAMPLES, _SEQLEN), generator=generator)
    try:
        prune(model, ids, **first_defaults(case) | case)
    except InputError:
        return {"masks": "refused", "weights": "refused"}
    masks, weights = hashlib.sha256(), hashlib.sha256()
    for key, parameter in sorted(model.named_parameters()):
        value = parameter.detach().float().contiguous()
        weights.update(f"{key} {tuple(value.shape)}".encode())
        weights.update(value.numpy().tobytes())
        if value.dim() == 2:
            masks.update((value == 0).numpy().tobytes())
    return {"masks": masks.hexdigest()[:16], "weights": weights.hexdigest()[:16]}


def machine() -> dict[str, str]:
    """Everything that the order of sums depends on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def recorded(model: str, case: dict[str, Any]) -> dict[str, str] | None:
    """The row on record for a case on a machine like this."""
    wanted = {"model": model, **label(case), **machine()}
    if not RESULTS.exists():
        return None
    with RESULTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if wanted.items() <= row.items()]
    return rows[-1] if rows else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["llama", "opt"], help="checkpoints or names of tiny models")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    commit = environment("cpu")["commit"]  # before the first row makes the checkout another
    differing = 0
    for path, case in itertools.product(options.model, cases()):
        name, words = Path(path).name, [*label(case).values()]
        before = recorded(name, case)
        if before is None and not options.record:
            print(name, *words, "no row", sep=" | ", flush=True)
            continue
        found = hashes(path, case)
        if before is None:
            append_row(RESULTS, {"model": name, **label(case), **found, **machine(), "commit": commit})
        same = before is None or found.items() <= before.items()
        differing += not same
        print(name, *words, *found.values(), "same" if same else "DIFFERS", sep=" | ", flush=True)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
