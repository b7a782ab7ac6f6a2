"""Options that several commands have, and where they print.

What brings torch or transformers is imported inside the commands: help and completion must be quick.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from llm_surgeon.checks import require_choice
from llm_surgeon.cli.parameters import completion
from llm_surgeon.data.rows import TEXT_KINDS
from llm_surgeon.distributed import ALONE, Ranks, launched
from llm_surgeon.errors import InputError, printable
from llm_surgeon.progress import LineProgress, Progress, TerminalProgress

if TYPE_CHECKING:
    import torch

# Names of files and models hold brackets, colons and numbers that mean nothing to rich.
console = Console(markup=False, emoji=False, highlight=False)

DTYPES = ("float32", "bfloat16", "float16")
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must be new or empty.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no summary.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 … (default: a GPU if there is one).")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")]
Dtype = Annotated[
    str, typer.Option(help=f"What to compute in: {' | '.join(DTYPES)}", autocompletion=completion(lambda: DTYPES))
]
DATA_HELP = f"wikitext2, c4, any data set of the hub (owner/name[:configuration[:split]]), or {TEXT_KINDS}"
FIELD_HELP = "Field of the text's rows to read: text, else messages or conversations, else the only one with text."
TextField = Annotated[str | None, typer.Option(help=FIELD_HELP)]


class _Messages(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(f"surgeon: {printable(record.getMessage())}", file=sys.stderr)


def log_to_stderr() -> None:
    """Send what the package has to say to stderr, a line each."""
    logger = logging.getLogger("llm_surgeon")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Messages) for handler in logger.handlers):
        logger.addHandler(_Messages())


def progress_bars(quiet: bool) -> AbstractContextManager[Progress]:
    """Progress on stderr: bars on a terminal, lines elsewhere, nothing where ``quiet``."""
    if quiet:
        return nullcontext(Progress())
    return TerminalProgress() if sys.stderr.isatty() else nullcontext(LineProgress())


@contextmanager
def joined_ranks(device: str | None) -> Iterator[Ranks]:
    """Context manager of the ranks that a launcher started, or the only one; all but the first are silent."""
    if not launched():
        yield ALONE
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch comes: it traces how a rank was lost
    from llm_surgeon.distributed.group import joined

    with joined(device) as ranks:
        if not ranks.first:
            logging.getLogger("llm_surgeon").setLevel(logging.ERROR)
        yield ranks


def quiet_libraries() -> None:
    """Keep what transformers says and shows to itself: what is wrong with a model is said here, in one sentence."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # its bars would run through ours
    transformers.utils.logging.set_verbosity_error()


def require_writable(path: Path) -> None:
    """Raise :class:`InputError` where the file ``path`` cannot be written: before work that takes minutes."""
    if not path.absolute().parent.is_dir():
        raise InputError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}")
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InputError(f"{str(path)!r} cannot be written: it is a folder, or permission is denied")


def show(text: str) -> None:
    """Print ``text`` line by line as it is, control characters as their escapes."""
    console.print("\n".join(map(printable, text.split("\n"))), soft_wrap=True)


def parse_dtype(name: str) -> torch.dtype:
    require_choice("dtype", name, DTYPES)
    import torch

    return getattr(torch, name)
