"""Prune Hugging Face causal language models with Kronecker-factored curvature.

    from llm_surgeon import prune
    report = prune(model, calibration, structure="2:4")

The data's way through the package: model (:mod:`models`) -> curvature (:mod:`curvature`) -> costs, selection and update
(:mod:`methods`, :mod:`structures`) -> model, once per shot (:mod:`shots`); see docs/architecture.md.

Importing the package is quick: what is named here brings torch and transformers when it is first used. Transformers,
imported before or after, learns to load packed models (:mod:`inference`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from llm_surgeon import _registration

if TYPE_CHECKING:
    from llm_surgeon.config.prune import PruneConfig
    from llm_surgeon.config.recover import RecoverConfig
    from llm_surgeon.data.calibration import Calibration
    from llm_surgeon.errors import InputError, NumericalError, SurgeonError, UnsupportedModelError
    from llm_surgeon.evaluation.perplexity import perplexity
    from llm_surgeon.inference import pack_model, to_torch_sparse, unpack_model
    from llm_surgeon.jobs.compact import compact_checkpoint
    from llm_surgeon.jobs.pack import pack_checkpoint
    from llm_surgeon.jobs.prune import prune_checkpoint
    from llm_surgeon.jobs.recover import recover_checkpoint
    from llm_surgeon.pruning import prune
    from llm_surgeon.recovery.recover import recover
    from llm_surgeon.report.schema import PruneReport

__all__ = [
    "Calibration",
    "InputError",
    "NumericalError",
    "PruneConfig",
    "PruneReport",
    "RecoverConfig",
    "SurgeonError",
    "UnsupportedModelError",
    "compact_checkpoint",
    "pack_checkpoint",
    "pack_model",
    "perplexity",
    "prune",
    "prune_checkpoint",
    "recover",
    "recover_checkpoint",
    "to_torch_sparse",
    "unpack_model",
]

_PLACES = {
    "Calibration": "data.calibration",
    "InputError": "errors",
    "NumericalError": "errors",
    "PruneConfig": "config.prune",
    "PruneReport": "report.schema",
    "RecoverConfig": "config.recover",
    "SurgeonError": "errors",
    "UnsupportedModelError": "errors",
    "compact_checkpoint": "jobs.compact",
    "pack_checkpoint": "jobs.pack",
    "pack_model": "inference",
    "perplexity": "evaluation.perplexity",
    "prune": "pruning",
    "prune_checkpoint": "jobs.prune",
    "recover": "recovery.recover",
    "recover_checkpoint": "jobs.recover",
    "to_torch_sparse": "inference",
    "unpack_model": "inference",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_registration.register()
