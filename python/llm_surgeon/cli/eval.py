"""``surgeon eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from llm_surgeon.cli.options import (
    DATA_HELP,
    Device,
    Dtype,
    Model,
    Quiet,
    TextField,
    TrustRemoteCode,
    console,
    parse_dtype,
    progress_bars,
    quiet_libraries,
)
from llm_surgeon.cli.parameters import examples
from llm_surgeon.errors import InputError

app = typer.Typer()


@app.command("eval", epilog=examples("surgeon eval pruned --data text.zip", "surgeon eval pruned --tasks llm-pruner"))
def evaluate(
    model: Model,
    data: Annotated[str | None, typer.Option(help=f"{DATA_HELP}; its test part is used (default: wikitext2).")] = None,
    text_field: TextField = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window.", min=2)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows per pass.", min=1)] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead: zero-shot accuracy on these of lm-eval's tasks (a,b,c); llm-pruner: its seven."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many windows, or examples of each task.", min=1)] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity of MODEL (exp of the mean token loss over non-overlapping windows of the test text), or accuracies."""
    for name, given in {"data": data, "text-field": text_field, "seqlen": seqlen}.items() if tasks is not None else ():
        if given is not None:
            raise InputError(f"--{name} means nothing with --tasks, which bring their own examples")
    with progress_bars(quiet) as progress:
        progress.phase("loading")
        quiet_libraries()
        from llm_surgeon.checkpoint import load_model
        from llm_surgeon.cli.views import print_scores
        from llm_surgeon.evaluation.perplexity import load_for_evaluation, perplexity
        from llm_surgeon.evaluation.zero_shot import parse_tasks, zero_shot
        from llm_surgeon.report.format import plural
        from llm_surgeon.resources import choose_device

        number = parse_dtype(dtype)
        if tasks is None:
            causal_lm, windows = load_for_evaluation(
                model,
                "wikitext2" if data is None else data,
                seqlen,
                device,
                trust_remote_code,
                number,
                limit=limit,
                text_field=text_field,
            )
            progress.phase("perplexity")
            value = perplexity(causal_lm, windows, batch_size, progress.step)
        else:
            names = parse_tasks(tasks)
            causal_lm, tokenizer, _ = load_model(
                model, number, choose_device(device), trust_remote_code=trust_remote_code, packed=True
            )
    if tasks is not None:
        print_scores(console, zero_shot(causal_lm, tokenizer, names, limit=limit, batch_size=batch_size or 8))
    else:
        over = f" over {plural(len(windows), 'window')}"
        console.print(f"{value:.4f}" if quiet else f"perplexity {value:.4f}{over}")
