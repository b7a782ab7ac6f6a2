"""The ``structure`` option: which pattern of weights goes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llm_surgeon.checks import meant, shown
from llm_surgeon.errors import InputError

# Structures that are removed from the model for good.
COUPLED_STRUCTURES = ("groups", "width", "layers")


@dataclass(frozen=True)
class Structure:
    """A parsed ``structure``: ``unstructured``, ``rows-columns``, ``groups``, or N:M (keep ``n`` of every ``m``)."""

    kind: str  # "unstructured" | "n:m" | "rows-columns" | one of COUPLED_STRUCTURES
    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, text: str) -> Structure:
        named = ("unstructured", "rows-columns", *COUPLED_STRUCTURES)
        if text in named:
            return cls(text)
        match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text) if isinstance(text, str) else None
        if match is None:
            raise InputError(
                f"unknown structure {shown(text)}{meant(text, named)}: "
                f"choose {', '.join(map(repr, named))} or N:M, such as '2:4'"
            )
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m:
            raise InputError(f"structure {text!r} keeps {n} of every {m} weights: N:M needs 0 < N < M")
        return cls("n:m", n, m)

    @property
    def sparsity(self) -> float | None:
        """The fraction of weights an N:M pattern removes; ``None`` where the user chooses it."""
        return (self.m - self.n) / self.m if self.kind == "n:m" else None

    @property
    def coupled(self) -> bool:
        """Whether coupled groups go that make the model smaller."""
        return self.kind in COUPLED_STRUCTURES

    @property
    def single_weights(self) -> bool:
        """Whether weights are chosen one by one, rather than in whole rows and columns."""
        return self.kind in ("unstructured", "n:m")
