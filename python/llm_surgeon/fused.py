"""The former name of :mod:`llm_surgeon.models.fused_pointwise`."""

import warnings

from llm_surgeon.models.fused_pointwise import fused_pointwise as fused

__all__ = ["fused"]

warnings.warn("llm_surgeon.fused is llm_surgeon.models.fused_pointwise now", DeprecationWarning, stacklevel=2)
