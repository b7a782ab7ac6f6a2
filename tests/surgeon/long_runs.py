"""Long runs of what is drawn at random; their totals are added to ``fuzz.csv`` or ``interrupts.csv`` of the results.

``python -m tests.surgeon.long_runs fuzz CASES [TARGET ...]`` or ``… interrupts POINTS [SEED] [--kill | --ranks]``.
"""

from __future__ import annotations

import argparse
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

from tests.surgeon import interrupted_ranks, interrupted_runs
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


def interrupts(points: int, seed: str, kill: bool, ranks: bool) -> int:
    """So many signals to each command, or kills of each kind of pruning; how many of them left something wrong."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        if ranks:
            found = interrupted_ranks.run(Path(folder), points, seed)
        else:
            found = interrupted_runs.run(Path(folder), points, seed, kill)
        seconds = time.perf_counter() - begun
    for kind, runs in found.items():
        print("\n".join(runs["wrong"]))
        name = f"prune on two ranks, {kind}" if ranks else f"prune, {kind}" if kill else kind
        tried = sum(number for what, number in runs["tried"].items() if what.startswith("SIG"))
        row = {"command": name, "seed": seed, "runs": tried, "outcomes": _counts(runs["tried"])}
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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.surgeon.long_runs", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    drawn = commands.add_parser("fuzz", help="cases of damaged or odd input; SIGINT ends a target before that")
    drawn.add_argument("cases", type=int)
    drawn.add_argument("targets", nargs="*", metavar="target", help=f"{', '.join(TARGETS)}; all by default")
    stopped = commands.add_parser("interrupts", help="kills and signals of each command at random points")
    stopped.add_argument("points", type=int)
    stopped.add_argument("seed", nargs="?", default="0")
    stopped.add_argument("--kill", action="store_true", help="kills of prunings of all kinds, each gone on with")
    stopped.add_argument("--ranks", action="store_true", help="the same of prunings that two processes share")
    options = parser.parse_args()
    if options.command == "interrupts":
        return interrupts(options.points, options.seed, options.kill, options.ranks)
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"no target {sorted(unknown)[0]!r}: choose among {', '.join(TARGETS)}")
    return fuzz(options.cases, options.targets or list(TARGETS))


if __name__ == "__main__":
    sys.exit(main())
