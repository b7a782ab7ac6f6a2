"""Long runs of what is drawn at random, and their totals, which they add to a file in ``bench/results``.

``python -m tests.surgeon.long_runs fuzz CASES [TARGET ...]`` writes ``fuzz.csv``; SIGINT ends a target before that,
with what there is. ``python -m tests.surgeon.long_runs interrupts POINTS [SEED]`` writes ``interrupts.csv``.
"""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import torch
import transformers

from tests.surgeon import interrupted_runs
from tests.surgeon.fuzz_targets import TARGETS, run

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def fuzz(cases: int, targets: list[str]) -> int:
    """So many cases of each target; how many targets had faults."""
    failed = 0
    for target in targets:
        outcomes, found, begun = Counter[str](), [], time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                run(target, Path(folder), cases, outcomes, derandomize=False)
            except KeyboardInterrupt:
                pass
            except Exception as error:
                traceback.print_exc()
                found = getattr(error, "exceptions", [error])  # a group of them
        seconds = time.perf_counter() - begun
        row = {"target": target, "cases": outcomes.total() + len(found), "outcomes": _counts(outcomes)}
        _record("fuzz.csv", row | {"faults": len(found), "seconds": round(seconds)})
        failed += bool(found)
    return failed


def interrupts(points: int, seed: str) -> int:
    """So many signals to each command; how many of them left something wrong."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        found = interrupted_runs.run(Path(folder), points, seed)
        seconds = time.perf_counter() - begun
    for verb, runs in found.items():
        print("\n".join(runs["wrong"]))
        row = {"command": verb, "seed": seed, "runs": runs["tried"].total(), "outcomes": _counts(runs["tried"])}
        _record("interrupts.csv", row | {"faults": len(runs["wrong"]), "seconds_of_all": round(seconds)})
    return sum(bool(runs["wrong"]) for runs in found.values())


def _counts(outcomes: Counter[str]) -> str:
    return "; ".join(f"{name}: {number}" for name, number in sorted(outcomes.items()))


def _record(name: str, row: dict[str, Any]) -> None:
    """Add ``row`` to a file of results, with the versions, the commit and the day."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS, capture_output=True, text=True)
    row |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hypothesis": hypothesis.__version__,
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
    print(row, flush=True)
    file = RESULTS / name
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    what, number, *others = sys.argv[1:]
    if what == "fuzz":
        sys.exit(fuzz(int(number), others or list(TARGETS)))
    sys.exit(interrupts(int(number), *(others or ["0"])))
