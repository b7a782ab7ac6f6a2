"""What is kept of a pruning beside its output until that is complete, and what an interrupted one left there."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llm_surgeon.checkpoint import Output, claimed_output
from llm_surgeon.checkpoint.begun import require_same
from llm_surgeon.checkpoint.output_checks import output_path
from llm_surgeon.checkpoint.run_states import REPORT, FolderStates, RunStates, clear_states
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.errors import InputError
from llm_surgeon.report.schema import PruneReport

_logger = logging.getLogger(__name__)


def states_folder(target: Path) -> Path:
    """Folder beside the output ``target`` for the states of the run that writes it."""
    return target.with_name(f".{target.name}.pruning")


def own_report(out: str | Path) -> PruneReport | None:
    """The report of the model in ``out``, where an interrupted run wrote it, recovered since or not."""
    target = output_path(out)
    try:
        kept = PruneReport.read(states_folder(target) / REPORT)
        found = PruneReport.read(target / "surgeon_report.json")
    except InputError:  # not there, or damaged
        return None
    return found if dataclasses.replace(found, history=kept.history) == kept else None


def require_own(
    out: str | Path,
    source: str | Path,
    config: PruneConfig,
    data: Mapping[str, str | Path | None],
    chosen: Set[str] = frozenset(),
) -> bool:
    """True where the model in ``out`` is that of an interrupted run, which must have been this one.

    Args:
        source: what is pruned, with what ``config`` says; ``data``: what is read for it, by its use.
        chosen: options that the run itself chose.

    Raises:
        InputError: that run was begun with something else; the first that differs is named.
    """
    report = own_report(out)
    if report is None:
        return False
    given: dict[str, Any] = {"model": str(source)}
    given |= {use: None if name is None else str(name) for use, name in data.items()}
    left_open = {"offload", "gpu_memory", *chosen}  # which a run may change, or let go, as its machine wants it
    if config.structure_record.shots_in is not None:
        left_open |= {"shots"}
    if report.config.get("offload") != config.offload:
        left_open |= {"gradient_steps", "gradient_samples"}  # that do not go with main memory
    options = dataclasses.asdict(config).items()
    given |= {name: value for name, value in options if value is not None and name not in left_open}
    texts = {use: record.source for use, record in report.data.items()}
    require_same(
        states_folder(output_path(out)), {"run": {**report.config, **texts, "model": report.model}}, given, {}, "run"
    )
    return True


def finished(out: str | Path, *, recovers: bool) -> PruneReport | None:
    """The report of an interrupted run that was done but for clearing up, which is done here; ``None`` of others.

    Args:
        recovers: a recovery follows the pruning.
    """
    report, target = own_report(out), output_path(out)
    if report is None or (recovers and not (target / "surgeon_recovery.json").exists()):
        return None
    _logger.warning("the pruning into %r was complete already: what was kept of it is removed", str(out))
    with suppress(InputError), claimed_output(out, True):  # or the process that is about to end removes it
        clear_states(states_folder(target))
    return report


@contextmanager
def kept_run(output: Output, resume: bool, checkpoint: bool) -> Iterator[RunStates]:
    """Context manager of the states of the run that writes the claimed ``output``; where it fails they stay.

    Raises:
        InputError: there are some, and no wish to ``resume``.
    """
    if not checkpoint:
        yield RunStates()
        return
    states = FolderStates(states_folder(output.path), resume)
    try:
        yield states
        states.remove()
    except BaseException as error:
        states.close()
        if states.kept and not isinstance(error, InputError):
            _logger.warning("what is done is kept in %r: the same command with --resume goes on", str(states.folder))
        raise
    finally:
        states.close()
