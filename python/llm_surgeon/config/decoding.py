"""Modes in which decoding runs and is measured, see :mod:`llm_surgeon.inference.decoding`."""

from __future__ import annotations

import enum


class Decoding(str, enum.Enum):
    """Ways in which the steps of a decoding run, all of them with a static cache.

    ``eager``: the forward pass as it is. ``graph``: the same, captured in one CUDA graph and replayed. ``compiled``:
    through torch.compile, on a GPU captured in one CUDA graph as well. ``generate``: by transformers' ``generate``
    with ``cache_implementation="static"``, which on a GPU compiles the step and captures CUDA graphs by itself.
    """

    EAGER = "eager"
    GRAPH = "graph"
    COMPILED = "compiled"
    GENERATE = "generate"
