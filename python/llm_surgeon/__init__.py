"""Prune Hugging Face causal language models with Kronecker-factored curvature.

    from llm_surgeon import prune
    report = prune(model, calibration, structure="2:4")

The data's way through the package: model (:mod:`models`) -> factors (:mod:`capture`, :mod:`factors`) -> costs
(:mod:`costs`) -> selection (:mod:`select`) -> update (:mod:`update`) -> model, once per shot (:mod:`shots`).
"""

from llm_surgeon.checkpoint_job import prune_checkpoint
from llm_surgeon.config import PruneConfig
from llm_surgeon.data import Calibration
from llm_surgeon.errors import InputError, NumericalError, SurgeonError, UnsupportedModelError
from llm_surgeon.evaluate import perplexity
from llm_surgeon.packed import pack_model, to_torch_sparse, unpack_model
from llm_surgeon.packed.checkpoint import pack_checkpoint
from llm_surgeon.pruning import prune
from llm_surgeon.report.schema import PruneReport

__all__ = [
    "Calibration",
    "InputError",
    "NumericalError",
    "PruneConfig",
    "PruneReport",
    "SurgeonError",
    "UnsupportedModelError",
    "pack_checkpoint",
    "pack_model",
    "perplexity",
    "prune",
    "prune_checkpoint",
    "to_torch_sparse",
    "unpack_model",
]
