"""Modes in which decoding runs and is measured, see :mod:`llm_surgeon.inference.decoding`."""

from __future__ import annotations

import enum


class Decoding(str, enum.Enum):
    """Ways in which the steps of a decoding run, all of them with a static cache.

    ``eager``: the forward pass as it is. ``graph``: the same, captured in one CUDA graph and replayed. ``fused``: steps
    of few kernels (:mod:`llm_surgeon.inference.fused_step`), where the model is built so, else its own; on a GPU in one
    CUDA graph. ``compiled``: through torch.compile, on a GPU captured in one CUDA graph as well. ``generate``: by
    transformers' ``generate`` with ``cache_implementation="static"``, which on a GPU compiles the step and captures
    CUDA graphs by itself.
    """

    EAGER = "eager"
    GRAPH = "graph"
    FUSED = "fused"
    COMPILED = "compiled"
    GENERATE = "generate"
