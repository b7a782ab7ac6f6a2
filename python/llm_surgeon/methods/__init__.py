"""Methods to prune with: costs, selection and update of weights; :func:`register` adds one."""

from llm_surgeon.config.methods import Method, register

__all__ = ["Method", "register"]
