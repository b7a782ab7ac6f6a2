"""``surgeon prune | recover | eval | pack | compact | bench | demo | info``.

Exit codes: 0 done, 1 failure, 2 bad usage or input; 130, 143, 129 stopped by SIGINT, SIGTERM, SIGHUP.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_surgeon.cli.bench import bench_app
from llm_surgeon.cli.compact import compact
from llm_surgeon.cli.config_file import read_options
from llm_surgeon.cli.options import (
    DATA_HELP,
    FIELD_HELP,
    Device,
    Dtype,
    Overwrite,
    Quiet,
    TextField,
    TrustRemoteCode,
    console,
    log_to_stderr,
    parse_dtype,
    progress_bars,
    quiet_libraries,
    show,
)
from llm_surgeon.cli.pack import pack
from llm_surgeon.cli.recover import recover
from llm_surgeon.config import methods
from llm_surgeon.config.prune import FISHERS, IMPORTANCES, OFFLOADS, PruneConfig
from llm_surgeon.errors import InputError, SurgeonError, first_line, printable

app = typer.Typer(
    name="surgeon",
    help="Prune large language models with Kronecker-factored curvature, and run what comes out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Options that prune() takes beside the fields of PruneConfig.
_JOB_OPTIONS = ("calibration", "lora_data", "text_field", "overwrite", "trust_remote_code", "device")

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(PruneConfig)}
_WANT_TEXT = {field.name for field in dataclasses.fields(PruneConfig) if "str" in str(field.type)}
_WANT_TEXT |= {"calibration", "lora_data", "text_field", "device"}


# The sections of `surgeon prune --help`; the rest stands first.
_PANELS = {
    "Compensation and curvature": (
        "update", "max_correlated", "tolerance", "max_iterations", "exchanges", "gradient_steps",
        "fisher", "kron_rank",
        "damp_g", "damp_a",
    ),
    "Shots": ("shots", "schedule", "min_kept", "lora_rank", "lora_steps", "lora_learning_rate", "lora_data"),
    "Smaller models (groups, width, layers)": (
        "importance", "allocation", "round_to", "uniform", "skip_layers", "reconstruct",
    ),
    "Calibration": ("calibration", "text_field", "samples", "seqlen", "seed"),
    "Memory": ("batch_size", "checkpoint_activations", "offload", "curvature_layers", "gpu_memory"),
}  # fmt: skip
_PANEL_OF = {name: panel for panel, names in _PANELS.items() for name in names}


def _option(name: str, text: str, *flags: str) -> Any:
    """The option ``name`` of :func:`prune`; left out, the YAML file's value or the default of that field."""
    default = _DEFAULTS.get(name)
    if not (default is None or default is False or default == ""):
        text = f"{text} (default: {default})"
    return typer.Option(*flags, help=text, rich_help_panel=_PANEL_OF.get(name))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and turn errors into one line on stderr and an exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # what others will rename is no concern of the user's
    log_to_stderr()
    try:
        words = sys.argv[1:] if arguments is None else list(arguments)
        _check_encoding(words)
        app(args=words, prog_name="surgeon", obj=words)
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


@app.command()
def prune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must be new or empty.")],
    structure: Annotated[
        str | None, _option("structure", "2:4, any N:M, unstructured, rows-columns, groups, width, layers.")
    ] = None,
    method: Annotated[str | None, _option("method", " | ".join(methods.names()))] = None,
    sparsity: Annotated[
        float | None, _option("sparsity", "Fraction to remove: implied by N:M, 0.5 unstructured, else 0.3.")
    ] = None,
    update: Annotated[
        str | None,
        _option(
            "update",
            " | ".join(methods.UPDATES) + ": how the others compensate; joint by default where the method has updates.",
        ),
    ] = None,
    max_correlated: Annotated[int | None, _option("max_correlated", "m of the chunked update.")] = None,
    shots: Annotated[
        int | None,
        _option(
            "shots",
            "Rounds of estimate, select, update: 5, for rows-columns 8 per 10 % removed, 1 without curvature.",
        ),
    ] = None,
    schedule: Annotated[
        float | None, _option("schedule", "1: every shot removes as much; more: the early ones more.")
    ] = None,
    kron_rank: Annotated[
        int | None, _option("kron_rank", "Kronecker products whose sum the curvature is, 1 or 2.")
    ] = None,
    exchanges: Annotated[
        int | None,
        _option("exchanges", "Rounds of exchanging kept and pruned weights within a joint update; 4 by default."),
    ] = None,
    gradient_steps: Annotated[
        int | None,
        _option("gradient_steps", "Natural-gradient steps of the kept weights after each shot; they train them, too."),
    ] = None,
    damp_g: Annotated[
        float | None, _option("damp_g", "Damping of G, relative to its mean diagonal: 0.1, structured 0.01.")
    ] = None,
    damp_a: Annotated[float | None, _option("damp_a", "Damping of A, relative to its mean diagonal.")] = None,
    fisher: Annotated[str | None, _option("fisher", " | ".join(FISHERS))] = None,
    tolerance: Annotated[float | None, _option("tolerance", "Joint solver: gap to the optimum to stop at.")] = None,
    max_iterations: Annotated[int | None, _option("max_iterations", "Joint solver: cap on iterations.")] = None,
    min_kept: Annotated[float | None, _option("min_kept", "Fraction of every layer never removed.")] = None,
    importance: Annotated[str | None, _option("importance", "Groups: " + " | ".join(IMPORTANCES))] = None,
    allocation: Annotated[
        str | None, _option("allocation", "Groups: global by Kronecker cost, local (each layer alike) otherwise.")
    ] = None,
    round_to: Annotated[
        int | None, _option("round_to", "Groups: widths are multiples of this; 8 to 128 for speed on GPUs.")
    ] = None,
    uniform: Annotated[
        bool | None, _option("uniform", "Groups: the same widths in every block, for stock classes.", "--uniform")
    ] = None,
    skip_layers: Annotated[str | None, _option("skip_layers", "Groups: blocks left alone, 0-3,30,31.")] = None,
    reconstruct: Annotated[
        bool | None,
        _option("reconstruct", "Groups, layers: fit linears to the dense model's activations at last (default: yes)."),
    ] = None,
    calibration: Annotated[str | None, _option("calibration", f"{DATA_HELP} (default: wikitext2).")] = None,
    text_field: Annotated[str | None, _option("text_field", FIELD_HELP)] = None,
    samples: Annotated[int | None, _option("samples", "Calibration windows.")] = None,
    seqlen: Annotated[int | None, _option("seqlen", "Tokens per window: 2048 or the model's limit.")] = None,
    batch_size: Annotated[
        int | None, _option("batch_size", "Windows per pass: about 4096 tokens, on a GPU by its free memory.")
    ] = None,
    checkpoint_activations: Annotated[
        bool | None, _option("checkpoint_activations", "Less memory, a third more work.", "--checkpoint-activations")
    ] = None,
    lora_rank: Annotated[
        int | None, _option("lora_rank", "Rank of the corrections trained after each shot and absorbed; 0: none.")
    ] = None,
    lora_steps: Annotated[int | None, _option("lora_steps", "Training steps of each correction.")] = None,
    lora_learning_rate: Annotated[float | None, _option("lora_learning_rate", "Their peak learning rate.")] = None,
    lora_data: Annotated[str | None, _option("lora_data", "Text they learn from (default: the windows).")] = None,
    offload: Annotated[
        str | None, _option("offload", " | ".join(OFFLOADS) + ": stream weights and factors through main memory.")
    ] = None,
    curvature_layers: Annotated[
        int | None, _option("curvature_layers", "Decoder blocks per curvature pass: all, or what fits when offloaded.")
    ] = None,
    gpu_memory: Annotated[str | None, _option("gpu_memory", "Cap on GPU memory, 24GB say.")] = None,
    seed: Annotated[int | None, _option("seed", "Seed of windows and sampled labels.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of options; flags given here win.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace OUT.")] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = None,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done and what it takes.")] = False,
    quiet: Quiet = False,
) -> None:
    """Prune MODEL into OUT, a checkpoint that loads in plain transformers."""
    flags = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("context", "model", "out", "config", "dry_run", "quiet")
    }
    options = {**({} if config is None else read_options(config, {*_DEFAULTS, *_JOB_OPTIONS}, _WANT_TEXT)), **flags}
    job_options = {name: options.pop(name) for name in _JOB_OPTIONS if name in options}
    if job_options.setdefault("calibration", "wikitext2") is None:
        raise InputError(f"calibration must be text, not nothing, in config file {str(config)!r}")
    settings = PruneConfig.from_mapping(options)
    with progress_bars(quiet) as progress:
        progress.phase("loading")
        quiet_libraries()
        from llm_surgeon.checkpoint import check_output
        from llm_surgeon.cli.views import print_plan
        from llm_surgeon.jobs.prune import PruneJob, prune_checkpoint

        if dry_run:
            inputs = {name: job_options.get(name) for name in ("calibration", "lora_data")} | {"config_file": config}
            check_output(out, job_options.pop("overwrite", False), model=model, **inputs)
            job = PruneJob(model, settings, **job_options)
        else:
            command = ["surgeon", *context.obj]
            report = prune_checkpoint(
                model, out, settings, config_file=config, command=command, progress=progress, **job_options
            )
    if dry_run:
        print_plan(console, job, out)
        return
    if not quiet:
        show(report.summary())
        shown = printable(str(out))
        console.print(f"\nwritten to {shown}: the model, surgeon_report.json, report.html", soft_wrap=True)
        if settings.structure == "2:4":
            advice = f"to make it smaller, and faster on NVIDIA GPUs: surgeon pack {shown} {shown}-packed"
            console.print(advice, soft_wrap=True)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")],
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


app.command()(recover)
app.command()(pack)
app.command()(compact)
app.add_typer(bench_app, name="bench")


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="[OUT]", help="Folder to write.")] = Path("demo-output"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Prune the small model that ships with the package to 2:4 with four methods and compare them."""
    with progress_bars(quiet) as progress:
        progress.phase("loading")
        quiet_libraries()
        from llm_surgeon.cli.views import print_demo
        from llm_surgeon.demo import run_demo

        results = run_demo(out, progress, overwrite=overwrite)
    print_demo(console, results, out)


@app.command()
def info() -> None:
    """Which accelerators, compiled parts and versions were found, and why something is missing."""
    from llm_surgeon.cli.views import print_info

    print_info(console)


def _check_encoding(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not UTF-8: names of files go into reports and model cards, which are."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the argument {argument!r} is not UTF-8: rename the file") from error


def _fail(error: SurgeonError | str, code: int) -> None:
    print(f"surgeon: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    sys.exit(code)
