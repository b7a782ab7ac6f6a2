"""``surgeon recover``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llm_surgeon.cli.options import (
    DATA_HELP,
    Device,
    Out,
    Overwrite,
    Quiet,
    TextField,
    TrustRemoteCode,
    joined_ranks,
    progress_bars,
    quiet_libraries,
    show,
)
from llm_surgeon.cli.parameters import completion, examples, with_options
from llm_surgeon.config.recover import PRESETS, RecoverConfig
from llm_surgeon.errors import InputError, printable

app = typer.Typer()
_DISTILLATION = {"temperature", "block_weight", "label_weight"}


@app.command(
    epilog=examples(
        "surgeon recover pruned recovered --teacher model",
        "surgeon recover smaller recovered --method full --data text.jsonl --steps 1000",
    )
)
@with_options(RecoverConfig)
def recover(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A pruned checkpoint folder.")],
    out: Out,
    teacher: Annotated[str | None, typer.Option(help="The dense checkpoint: distil from it.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help=f"Settings of a paper: {' | '.join(PRESETS)}", autocompletion=completion(lambda: PRESETS)),
    ] = None,
    data: Annotated[str, typer.Option(help=f"{DATA_HELP}; its training part is used.")] = "wikitext2",
    text_field: TextField = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted recovery into OUT.")] = False,
    overwrite: Overwrite = False,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Train what pruning left of MODEL into OUT: low-rank or full, plain or distilled; every zero stays a zero."""
    given = {name: value for name, value in options.items() if value is not None}
    config = RecoverConfig.from_mapping({"preset": preset, **given})
    unused = set() if config.lora else {"rank", "alpha", "dropout"}
    unused |= _DISTILLATION if teacher is None else set()
    for name in sorted(unused & given.keys()):
        needs = "a --teacher" if name in _DISTILLATION else "--method lora"
        raise InputError(f"--{name.replace('_', '-')} means nothing without {needs}")
    with joined_ranks(device) as ranks, progress_bars(quiet := quiet or not ranks.first) as progress:
        progress.phase("loading")
        quiet_libraries()
        from llm_surgeon.jobs.recover import recover_checkpoint

        report = recover_checkpoint(
            model,
            out,
            config,
            teacher=teacher,
            data=data,
            text_field=text_field,
            resume=resume,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            device=device,
            progress=progress,
            ranks=ranks,
        )
    if not quiet:
        show(f"{report.summary()}\nwritten to {printable(str(out))}")
