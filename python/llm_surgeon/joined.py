"""The former name of :func:`llm_surgeon.inference.merge_linears`."""

import warnings

from llm_surgeon.inference import merge_linears as joined

__all__ = ["joined"]

warnings.warn("llm_surgeon.joined is llm_surgeon.inference.merge_linears now", DeprecationWarning, stacklevel=2)
