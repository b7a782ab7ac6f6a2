"""``surgeon prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llm_surgeon.cli.config_file import read_options
from llm_surgeon.cli.options import (
    DATA_HELP,
    FIELD_HELP,
    Device,
    Model,
    Out,
    Overwrite,
    Quiet,
    TrustRemoteCode,
    console,
    joined_ranks,
    progress_bars,
    quiet_libraries,
    show,
)
from llm_surgeon.cli.parameters import examples, file_options, with_options
from llm_surgeon.config.fields import present_names
from llm_surgeon.config.prune import CALIBRATION, SHOTS, PruneConfig
from llm_surgeon.distributed import PlannedRanks
from llm_surgeon.errors import InputError, printable

app = typer.Typer()
_NOT_IN_FILE = ("context", "model", "out", "config", "resume", "no_checkpoint", "dry_run", "gpus", "quiet")


@app.command(
    epilog=examples(
        "surgeon prune meta-llama/Llama-2-7b-hf pruned",
        "surgeon prune model smaller --structure groups --sparsity 0.3 --calibration text.jsonl",
    )
)
@with_options(PruneConfig)
def prune(
    context: typer.Context,
    model: Model,
    out: Out,
    calibration: Annotated[
        str | None, typer.Option(help=f"{DATA_HELP} (default: wikitext2).", rich_help_panel=CALIBRATION)
    ] = None,
    text_field: Annotated[str | None, typer.Option(help=FIELD_HELP, rich_help_panel=CALIBRATION)] = None,
    lora_data: Annotated[
        str | None,
        typer.Option(help="Text that low-rank corrections learn from (default: the windows).", rich_help_panel=SHOTS),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            "--eval-data",
            "--eval",
            help="Text whose test part perplexity is also measured on, before and after.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    samples_shown: Annotated[
        int | None,
        typer.Option(
            help="Texts whose continuations before and after are shown (default: 3, offloaded 0).",
            min=0,
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    recover_minutes: Annotated[
        float | None,
        typer.Option(help="Then train what is left for so long, by distillation from MODEL on the calibration text."),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(help="In place of --sparsity: bytes on disk of a smaller model (groups, width, layers), 5GB say."),
    ] = None,
    target_loss: Annotated[
        float | None,
        typer.Option(help="In place of --sparsity: predicted rise of the loss (unstructured), nats per token."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of options; flags given here win.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted pruning into OUT.")] = False,
    no_checkpoint: Annotated[
        bool, typer.Option("--no-checkpoint", help="Do not keep what is done beside OUT: less disk, no --resume.")
    ] = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done and what it takes.")] = False,
    gpus: Annotated[
        int | None, typer.Option(help="With --dry-run: on so many, memory and time of each.", min=1)
    ] = None,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Prune MODEL into OUT, a checkpoint that loads in plain transformers."""
    own = dict(locals())
    in_file = file_options(prune, besides=_NOT_IN_FILE)
    read = {} if config is None else read_options(config, in_file, {name for name, text in in_file.items() if text})
    job_options = {name: read.pop(name) for name in own if name in read}
    given = {name: value for name, value in own.items() if value is not None and value is not False}
    job_options |= {name: value for name, value in given.items() if name in in_file}
    if job_options.setdefault("calibration", "wikitext2") is None:
        raise InputError(f"calibration must be text, not nothing, in config file {str(config)!r}")
    if gpus is not None and not dry_run:
        raise InputError("gpus is only planned for: give --dry-run, and run with torchrun --nproc-per-node")
    flags = {name: value for name, value in options.items() if value is not None}
    settings = PruneConfig(**present_names(PruneConfig, read) | present_names(PruneConfig, flags))
    with joined_ranks(device) as ranks, progress_bars(quiet := quiet or not ranks.first) as progress:
        progress.phase("loading")
        quiet_libraries()
        from llm_surgeon.cli.views import print_plan
        from llm_surgeon.jobs.prune import planned_job, prune_checkpoint

        job_options |= {"config_file": config, "checkpoint": not no_checkpoint, "resume": resume}
        if dry_run:
            planned = ranks if gpus is None else PlannedRanks(gpus)
            job, resumes = planned_job(model, out, settings, ranks=planned, **job_options)
        else:
            command = ["surgeon", *context.obj]
            report = prune_checkpoint(
                model, out, settings, command=command, progress=progress, ranks=ranks, **job_options
            )
    if dry_run:
        if ranks.first:
            print_plan(console, job, out, keeps=not no_checkpoint, resumes=resumes)
        return
    if not quiet:
        shown = printable(str(out))
        show(report.summary())
        console.print(f"\nwritten to {shown}: the model, surgeon_report.json, report.html", soft_wrap=True)
        if settings.structure_record.packs:
            advice = f"to make it smaller, and faster on NVIDIA GPUs: surgeon pack {shown} {shown}-packed"
            console.print(advice, soft_wrap=True)
        show("\n".join([*report.quality(), *report.history]))
