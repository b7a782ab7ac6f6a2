"""Inputs drawn at random, which must be read or refused, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

from tests.surgeon import fuzz_options, fuzz_reports, fuzz_text
from tests.surgeon.fuzz_checkpoints import Folder

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
