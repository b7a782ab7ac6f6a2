"""The ``surgeon`` command."""

from llm_surgeon.cli.app import main

__all__ = ["main"]
