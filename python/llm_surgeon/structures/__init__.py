"""Coupled structures: neurons, heads, the residual width and whole blocks, found by probing and removed for good.

:func:`register` adds a structure.
"""

from llm_surgeon.config.structure import Structure, register

__all__ = ["Structure", "register"]
