"""Tables and sentences that the commands print."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llm_surgeon.demo import DemoResult
from llm_surgeon.errors import printable
from llm_surgeon.evaluation.zero_shot import TaskScore
from llm_surgeon.jobs.prune import PruneJob
from llm_surgeon.report.format import duration, plural
from llm_surgeon.resources import human_bytes
from llm_surgeon.shots.sensitivity import Sensitivity
from surgeon_kernels import build_info


def print_plan(console: Console, job: PruneJob, out: Path, *, keeps: bool, resumes: bool) -> None:
    """Print what a run would prune, the memory, disk and time it would take, and whether it goes on with another."""
    removal, config, linears, plan = job.removal(), job.config, job.decoder.linears, job.plan
    shots = plural(config.shots, "shot")
    table = Table("layers", "kind", "rows × columns", title=f"{printable(job.source)}: {len(linears)} linear layers")
    shapes = Counter((linear.kind, linear.rows, linear.columns) for linear in linears)
    for (kind, rows, columns), count in shapes.items():
        table.add_row(str(count), kind, f"{rows} × {columns}")
    console.print(table)
    passes = "one pass over them" if plan.passes == 1 else f"{plan.passes} passes over them"
    host = f" and {human_bytes(plan.host_bytes)} of main memory" if plan.host_bytes else ""
    minutes = None if job.recovery is None else job.recovery.config.minutes
    training = f" ({minutes:g} min of it recovery)" if minutes else ""
    of_each = "" if job.ranks.count == 1 else f", each of {job.ranks.count} processes"
    disk, memory = map(human_bytes, job.states_bytes)
    kept = f"what is done is kept until all is: {disk} of disk and {memory} of main memory more\n" if keeps else ""
    goes_on = "it would go on with the interrupted run, of which some is done\n" if resumes else ""
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in plan.by_kind().items() if size)
    console.print(
        f"method {config.method}, structure {config.structure}, update {config.update}, {shots}: "
        f"would remove {removal}\n"
        f"{plan.batch_size} windows of {config.seqlen} tokens at a time, {config.samples} in all, "
        f"{passes} for the curvature of a shot\n"
        f"memory {human_bytes(plan.memory_bytes)}{host}, disk {human_bytes(plan.disk_bytes)}, "
        f"about {duration(plan.seconds)} on {plan.device}{training}{of_each}\n"
        f"  {parts}\n"
        f"{kept}{goes_on}"
        f"nothing was written to {printable(str(out))}",
        soft_wrap=True,
    )


def print_demo(console: Console, results: list[DemoResult], out: Path) -> None:
    """The demo's table of perplexities."""
    table = Table("method", "perplexity", "above dense", "seconds", title="2:4 pruning of the demo model, WikiText-2")
    dense = results[0].perplexity
    for result in results:
        above = "" if result is results[0] else f"+{100 * (result.perplexity / dense - 1):.1f} %"
        table.add_row(result.name, f"{result.perplexity:.2f}", above, f"{result.seconds:.1f}")
    console.print(table)
    console.print(f"the Surgeon model and its report.html are in {printable(str(out))}", soft_wrap=True)


def print_sensitivity(console: Console, found: Sensitivity) -> None:
    """Predicted increases of the loss by kind of layer and by decoder block."""
    title = "predicted increase of the loss, nats per token, by pruning these layers alone"
    table = Table("layers", *(f"{100 * sparsity:g} %" for sparsity in found.sparsities), title=title)
    for sums in (found.by("kind"), found.by("depth")):
        for name, increases in sums.items():
            shown = f"block {name}" if isinstance(name, int) else name
            table.add_row(shown, *(f"{increase:.5f}" for increase in increases))
        table.add_section()
    console.print(table)


def print_scores(console: Console, scores: list[TaskScore]) -> None:
    """Zero-shot scores and their mean, in percent."""
    table = Table("task", "metric", "score", "±", title="zero-shot")
    for score in scores:
        error = "" if score.stderr is None else f"{100 * score.stderr:.2f}"
        table.add_row(score.task, score.metric, f"{100 * score.value:.2f}", error)
    table.add_row("mean", "", f"{100 * sum(score.value for score in scores) / len(scores):.2f}", "", style="bold")
    console.print(table)


_PARTS = {"cuda": "GPU", "triton": "Triton kernels", "extension": "CUDA kernels", "nvcc": "CUDA compiler"}


def print_info(console: Console) -> None:
    """Accelerators, parts and versions, and in a sentence what they come to."""
    found = build_info()
    table = Table("what", "found", "", title="surgeon-kernels", title_justify="left")
    for name, version in found["versions"].items():
        table.add_row("CUDA of torch" if name == "cuda" else name, version or "none", "")
    for index, device in enumerate(found["accelerators"]):
        about = f"sm_{device['capability']}, {human_bytes(device['memory'])}"
        table.add_row(f"accelerator {index}", device["name"], about)
    for name, part in found["parts"].items():
        table.add_row(_PARTS.get(name, name), "yes" if part["available"] else "no", part["reason"])
    console.print(table)
    console.print(_verdict(found), soft_wrap=True)


def _verdict(found: dict[str, Any]) -> str:
    if not found["accelerators"]:
        return "everything works here, on the CPU: for models of billions of weights take a machine with an NVIDIA GPU"
    missing = [_PARTS[name] for name in ("triton", "extension") if not found["parts"][name]["available"]]
    if missing:
        return f"everything works here, slower than it could: without {' and '.join(missing)} PyTorch's operations run"
    return "everything works here, with all kernels"
