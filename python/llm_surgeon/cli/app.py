"""The ``surgeon`` command: its parts put together, and errors turned into exit codes.

Exit codes: 0 done, 1 failure, 2 bad usage or input; 130, 143, 129 stopped by SIGINT, SIGTERM, SIGHUP.
"""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from llm_surgeon.cli import bench, compact, demo, eval, info, pack, prune, recover, sensitivity
from llm_surgeon.cli.options import console, log_to_stderr
from llm_surgeon.errors import InputError, SurgeonError, first_line, printable

app = typer.Typer(
    name="surgeon",
    help="Prune large language models with Kronecker-factored curvature, and run what comes out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _part in (prune, sensitivity, eval, recover, pack, compact, demo, info):
    app.add_typer(_part.app)
app.add_typer(bench.app, name="bench")
_UsageError: Any = typer.BadParameter.__base__  # of click, or of typer where that has its own


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and turn errors into one line on stderr and an exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # what others will rename is no concern of the user's
    log_to_stderr()
    try:
        words = sys.argv[1:] if arguments is None else list(arguments)
        _check_encoding(words)
        sys.exit(app(args=words, prog_name="surgeon", obj=words, standalone_mode=False) or 0)
    except _UsageError as error:
        _fail(_usage(error), 2)
    except InputError as error:
        _fail(error, 2)
    except SurgeonError as error:
        _fail(error, 1)
    except PermissionError as error:
        _fail(f"{error.filename!r} cannot be read or written: {error.strerror}", 2)
    except OSError as error:  # of standard output or a temporary file, say: those of what was asked for are InputErrors
        place = "a file or standard output" if error.filename is None else repr(error.filename)
        _fail(f"{place} cannot be read or written: {error.strerror or error}", 1)
    except Exception as error:
        torch = sys.modules.get("torch")  # not imported here, see options.py
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        _fail(f"out of GPU memory: {first_line(error)} A smaller --batch-size takes less, and prune --offload cpu", 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            version = importlib.metadata.version("surgeon-kernels")
        except importlib.metadata.PackageNotFoundError:
            version = "from a folder that is not installed"
        console.print(f"surgeon-kernels {version}")
        raise typer.Exit


@app.callback()
def surgeon(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of the command itself."""


def _check_encoding(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not UTF-8: names of files go into reports and model cards, which are."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the argument {argument!r} is not UTF-8: rename the file") from error


def _usage(error: Any) -> str:
    """Fault of a command line, in a sentence; nothing where help was shown for want of any argument."""
    message = error.format_message().rstrip(".")
    near = getattr(error, "possibilities", None)  # of an option that is not there
    if near:
        message = f"unknown option {error.option_name!r} (do you mean {near[0]!r}?)"
    return f"{message}: see {error.ctx.command_path} --help" if message and error.ctx else message


def _fail(error: SurgeonError | str, code: int) -> None:
    if (text := " ".join(str(error).split())) and not getattr(error, "told", False):  # by another rank of a run
        print(f"surgeon: {printable(text)}", file=sys.stderr)
    sys.exit(code)
