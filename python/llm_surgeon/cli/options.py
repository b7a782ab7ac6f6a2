"""Options that several commands have, and where they print."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import torch
import typer
from rich.console import Console

from llm_surgeon.errors import InputError
from llm_surgeon.progress import Progress, TerminalProgress

console = Console()

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no summary.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 … (default: a GPU if there is one).")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16: what to compute in.")]
DATA_HELP = "wikitext2, c4, or a .txt, .jsonl, .parquet or .zip file"


def progress_bars(quiet: bool) -> AbstractContextManager[Progress]:
    return nullcontext(Progress()) if quiet else TerminalProgress()


def parse_dtype(name: str) -> torch.dtype:
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"unknown dtype {name!r}: float32, bfloat16 or float16")
    return getattr(torch, name)
