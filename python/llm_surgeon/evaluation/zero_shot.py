"""Zero-shot accuracy on multiple-choice tasks, by EleutherAI's evaluation harness (the extra ``eval``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from llm_surgeon.errors import InputError, first_line
from llm_surgeon.models.passes import evaluation_mode

# LLM-Pruner (Ma et al., NeurIPS 2023) and many after it report these seven.
TASK_PRESETS = {
    "llm-pruner": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
}
_METRICS = ("acc_norm", "acc")


@dataclass(frozen=True)
class TaskScore:
    """A task's ``value`` of ``metric`` with its standard error, in 0..1."""

    task: str
    metric: str
    value: float
    stderr: float | None


def parse_tasks(text: str) -> list[str]:
    """Names separated by commas; a preset's name stands for its tasks."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("no tasks given: pass lm-eval's names separated by commas, or llm-pruner")
    return [task for name in names for task in TASK_PRESETS.get(name, (name,))]


def zero_shot(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    task_folder: str | Path | None = None,
) -> list[TaskScore]:
    """Scores of ``tasks`` without examples in the prompt, in the given order.

    The harness compares the model's log-likelihood of every answer; ``acc_norm`` (answers normalised by their length)
    is reported where a task defines it, ``acc`` otherwise, or else the task's first metric.

    Args:
        limit: examples of each task (left out: all).
        task_folder: tasks of one's own, in lm-eval's YAML, in place of those that come with it.

    Raises:
        InputError: lm-eval is not installed, a task is unknown, or its data cannot be fetched.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("tasks need lm-eval: pip install 'surgeon-kernels[eval]'") from error
    manager = TaskManager(include_path=task_folder and str(task_folder), include_defaults=task_folder is None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise InputError(f"lm-eval has no task {unknown[0]!r}")
    device = str(next(model.parameters()).device)
    with evaluation_mode(model):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=device)
        try:
            found = simple_evaluate(
                model=harness, tasks=list(tasks), num_fewshot=0, limit=limit, task_manager=manager, bootstrap_iters=100
            )
        # Data sets come from the hub: ConnectionError and FileNotFoundError of datasets are both OSErrors.
        except OSError as error:
            raise InputError(f"the data of tasks {', '.join(tasks)} cannot be read: {first_line(error)}") from error
    assert found is not None
    return [_score(task, found["results"][task]) for task in tasks]


def _score(task: str, results: dict[str, Any]) -> TaskScore:
    """lm-eval names a value ``metric,filter`` and its standard error ``metric_stderr,filter``."""
    values = {key: value for key, value in results.items() if "," in key and "_stderr," not in key}
    key = next((key for metric in _METRICS for key in values if key.split(",")[0] == metric), next(iter(values)))
    metric, filtered = key.split(",", 1)
    stderr = results.get(f"{metric}_stderr,{filtered}")
    return TaskScore(task, metric, float(values[key]), float(stderr) if isinstance(stderr, (int, float)) else None)
