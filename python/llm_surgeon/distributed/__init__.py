"""Several processes that share one run: what each of them does, and what they tell each other."""

from llm_surgeon.distributed.ranks import ALONE, PlannedRanks, Ranks, launched

__all__ = ["ALONE", "PlannedRanks", "Ranks", "launched"]
