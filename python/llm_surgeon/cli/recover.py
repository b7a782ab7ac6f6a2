"""``surgeon recover``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_surgeon.cli.options import (
    DATA_HELP,
    Overwrite,
    Quiet,
    TextField,
    TrustRemoteCode,
    progress_bars,
    quiet_libraries,
    show,
)
from llm_surgeon.errors import InputError, printable
from llm_surgeon.config.recover import METHODS, PRESETS, RecoverConfig

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(RecoverConfig)}


def _option(name: str, text: str) -> Any:
    default = _DEFAULTS[name]
    return typer.Option(help=text if default is None else f"{text} (default: {default})")


def recover(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A pruned checkpoint folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must be new or empty.")],
    teacher: Annotated[str | None, typer.Option(help="The dense checkpoint: distil from it.")] = None,
    method: Annotated[str | None, _option("method", " | ".join(METHODS))] = None,
    preset: Annotated[str | None, typer.Option(help="Settings of a paper: " + " | ".join(PRESETS))] = None,
    data: Annotated[str, typer.Option(help=f"{DATA_HELP}; its training part is used.")] = "wikitext2",
    text_field: TextField = None,
    steps: Annotated[int | None, _option("steps", "Optimizer steps.")] = None,
    batch_size: Annotated[int | None, _option("batch_size", "Sequences a step.")] = None,
    micro_batch_size: Annotated[
        int | None, _option("micro_batch_size", "Sequences at once: about 16384 tokens; gradients are accumulated.")
    ] = None,
    seqlen: Annotated[int | None, _option("seqlen", "Tokens a sequence: 512 or the model's limit.")] = None,
    learning_rate: Annotated[
        float | None, _option("learning_rate", "Peak learning rate: 2e-3 for lora, 5e-4 for full.")
    ] = None,
    warmup_steps: Annotated[int | None, _option("warmup_steps", "Steps it takes to rise: steps / 20.")] = None,
    weight_decay: Annotated[float | None, _option("weight_decay", "AdamW's.")] = None,
    rank: Annotated[int | None, _option("rank", "LoRA: rank of a correction.")] = None,
    alpha: Annotated[float | None, _option("alpha", "LoRA: a correction is alpha / rank · B A.")] = None,
    dropout: Annotated[float | None, _option("dropout", "LoRA: dropout before A.")] = None,
    temperature: Annotated[float | None, _option("temperature", "Distillation: T of T² KL.")] = None,
    eval_every: Annotated[int | None, _option("eval_every", "Steps between held-out losses: steps / 10.")] = None,
    eval_windows: Annotated[
        int | None, _option("eval_windows", "Held-out sequences of each: 64, fewer in short trainings.")
    ] = None,
    patience: Annotated[int | None, _option("patience", "Evaluations without improvement before stopping.")] = None,
    seed: Annotated[int | None, _option("seed", "Seed of batches and initial values.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted recovery into OUT.")] = False,
    overwrite: Overwrite = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: a GPU if there is one).")] = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Train what pruning left of MODEL into OUT: low-rank or full, plain or distilled; every zero stays a zero."""
    options = {name: value for name, value in locals().items() if name in {*_DEFAULTS, "preset"} and value is not None}
    config = RecoverConfig.from_mapping(options)
    unused = {"rank", "alpha", "dropout"} if config.method == "full" else set()
    unused |= {"temperature"} if teacher is None else set()
    for name in sorted(unused & options.keys()):
        needs = "a --teacher" if name == "temperature" else "--method lora"
        raise InputError(f"--{name} means nothing without {needs}")
    with progress_bars(quiet) as progress:
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
        )
    if not quiet:
        show(f"{report.summary()}\nwritten to {printable(str(out))}")
