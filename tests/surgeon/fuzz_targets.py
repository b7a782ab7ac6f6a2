"""What is drawn at random and must be read or refused, by name; ``python -m tests.surgeon.fuzz_targets`` is a long run.

``python -m tests.surgeon.fuzz_targets CASES [TARGET ...]`` adds what it finds to ``bench/results/fuzz.csv``; SIGINT
ends a target before that, with what there is.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import torch
import transformers
from hypothesis import strategies as st

from tests.surgeon import fuzz_options, fuzz_reports, fuzz_text
from tests.surgeon.fuzz_checkpoints import Folder

RESULTS = Path(__file__).parents[2] / "bench" / "results"
_FIELDS = st.sampled_from([None, None, "text", "messages"])

Drawn = tuple[st.SearchStrategy[Any], Callable[[Any], str]]


def _folder(folder: Path, *, packed: bool) -> Drawn:
    model = Folder(folder, packed=packed)
    return model.damaged(), model.check


# Each draws cases, and tells what became of one; what a check raises is a fault.
TARGETS: dict[str, Callable[[Path], Drawn]] = {
    "options": lambda folder: (fuzz_options.documents, partial(fuzz_options.check, folder)),
    "reports": lambda folder: (fuzz_reports.reports, partial(fuzz_reports.check_report, folder)),
    "cards": lambda folder: (fuzz_reports.cards, fuzz_reports.check_card),
    "texts": lambda folder: (
        st.tuples(fuzz_text.documents, _FIELDS),
        lambda drawn: fuzz_text.check(folder, *drawn[0], drawn[1]),
    ),
    "checkpoints": partial(_folder, packed=False),
    "packed checkpoints": partial(_folder, packed=True),
}


def run(target: str, folder: Path, cases: int, outcomes: Counter[str], *, derandomize: bool) -> None:
    """Check so many cases, and count into ``outcomes`` what became of them; the first fault raises, made small."""
    drawn, check = TARGETS[target](folder)

    @hypothesis.settings(
        max_examples=cases,
        derandomize=derandomize,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(drawn)
    def case(value: Any) -> None:
        outcomes[check(value)] += 1

    case()


def record(file: Path, row: dict[str, Any]) -> None:
    """Add ``row`` to ``file``, with the versions, the commit and the day."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS, capture_output=True, text=True)
    row |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hypothesis": hypothesis.__version__,
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> int:
    cases, targets, failed = int(sys.argv[1]), sys.argv[2:] or list(TARGETS), 0
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
        row = {
            "target": target,
            "cases": outcomes.total() + len(found),
            "outcomes": " ".join(f"{name}={number}" for name, number in sorted(outcomes.items())),
            "faults": len(found),
            "seconds": round(time.perf_counter() - begun),
        }
        print(row, flush=True)
        record(RESULTS / "fuzz.csv", row)
        failed += bool(found)
    return failed


if __name__ == "__main__":
    sys.exit(main())
