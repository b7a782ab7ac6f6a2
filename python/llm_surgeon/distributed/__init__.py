"""Several processes that share one run: what each of them does, and what they tell each other."""

from llm_surgeon.distributed.ranks import ALONE, Ranks, launched

__all__ = ["ALONE", "Ranks", "launched"]
