"""Text, conversations and token ids, and the calibration windows made of them."""

import importlib
import warnings


def __getattr__(name: str) -> object:
    if name == "Calibration":
        warnings.warn("llm_surgeon.data.Calibration is llm_surgeon.Calibration now", DeprecationWarning, stacklevel=2)
        return importlib.import_module("llm_surgeon.data.calibration").Calibration
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
