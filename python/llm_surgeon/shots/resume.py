"""What a run is begun with, so that another one that is the same goes on from its states."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_surgeon.checkpoint.begun import fingerprint, read_note, require_same, tensors_of
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import InputError
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.planning.plan import Plan, make_plan
from llm_surgeon.report.schema import collect_versions
from llm_surgeon.shots.run import Run

_logger = logging.getLogger(__name__)

# Options that defaults of others follow from: where both differ, these are what was given.
_DECISIVE = ("structure", "method", "importance", "sparsity", "lora_rank", "kron_rank", "offload", "samples", "seqlen")


def claim_states(run: Run) -> None:
    """Claim the states of ``run``, before anything is changed, and take over the layout of an interrupted one.

    Raises:
        InputError: that was begun with other options, data or weights, of which the first that differ are named, or by
            another version that plans otherwise.
    """
    layout = run.states.claim(*_begun_with(run), _layout(run))
    _require_version(layout)
    for name, value in _machine().items():
        if layout["machine"].get(name) != value:
            before = layout["machine"].get(name)
            _logger.warning("the interrupted run had %s %s, not %s: bits may differ", name, before, value)
    if layout["offload"] != run.config.offload:
        run.config = run.config.offloaded()
    if layout["plan"] is None:  # it began to offload
        kept = dataclasses.replace(run.config, batch_size=run.plan.batch_size)
        run.plan = make_plan(run.model, run.decoder, kept)
    else:
        run.plan = Plan(**{**layout["plan"], "device": run.plan.device})
    run.said = list(layout["said"])
    for name, numbers in layout["left_out"].items():
        run.leave_out(name, numbers)
    if run.config.offloads and any(weight.is_cuda for weight in tensors_of(run.model).values()):
        run.states.settle()  # else what is to be freed on the GPU would be held


def require_same_run(run: Run, folder: Path) -> None:
    """Raise what :func:`claim_states` would where ``folder`` has the states, of which nothing is changed."""
    begun = read_note(folder)
    if begun is not None:
        options, content = _begun_with(run)
        require_same(folder, begun, options, content(), "run")
        _require_version(begun["layout"])


def note_layout(run: Run, **changes: Any) -> None:
    """Note in the states that the layout became another one, for whoever goes on."""
    run.states.note_layout({**_layout(run), **changes})


def states_bytes(model: nn.Module, decoder: Decoder, config: PruneConfig) -> tuple[int, int]:
    """Bytes of disk and of main memory that the states of a run take while it goes on, at most.

    On disk are two states of shots, that of the next one or its blocks', and a third that is being written; and
    blocks that a last fit has gone through, beside what the update made of them. In memory is the copy of one.
    """
    whole = config.structure_record.whole_model
    linears = [p for linear in decoder.linears for p in linear.module.parameters(recurse=False)]
    weights = sum(p.nbytes for p in (model.parameters() if whole else linears))
    masks = decoder.weights // 8 if config.structure_record.single_weights else 0
    anchors = weights if config.gradient_steps and config.around_dense_weights else 0
    fitted = weights if config.reconstruct and not config.structure_record.coupled else 0
    state = weights + masks + anchors
    return state * (min(config.shots, 3) + 1) + fitted, state


def _begun_with(run: Run) -> tuple[dict[str, Any], Callable[[], dict[str, str | None]]]:
    """Options of ``run`` by name, and fingerprints of what it reads, to be computed."""
    windows = {
        "calibration windows": run.calibration,
        "held-out windows": run.held_out,
        "data of low-rank corrections": run.correction_data,
        "windows of gradient steps": run.step_windows,
        "evaluation windows": run.evaluation,
    }
    weights = tensors_of(run.model)

    def content() -> dict[str, str | None]:
        return {"model's weights": fingerprint(weights), **{name: _windows(each) for name, each in windows.items()}}

    config = dataclasses.asdict(run.config)
    first = {"device": run.plan.device.type, "processes": run.ranks.count, **{name: config[name] for name in _DECISIVE}}
    return first | config, content


def _require_version(layout: Mapping[str, Any]) -> None:
    if layout["plan"] is not None and layout["plan"].keys() != {field.name for field in dataclasses.fields(Plan)}:
        raise InputError("the interrupted run was begun by another version of surgeon-kernels: go on with that")


def _layout(run: Run) -> dict[str, Any]:
    """What the bits of the result depend on besides options, data and weights, and what is said of it."""
    return {
        "plan": {**dataclasses.asdict(run.plan), "device": str(run.plan.device)},
        "offload": run.config.offload,
        "left_out": run.left_out,
        "said": run.said,
        "machine": _machine(),
    }


def _machine() -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), **collect_versions()}


def _windows(windows: Calibration | None) -> str | None:
    if windows is None:
        return None
    mask = windows.attention_mask
    return fingerprint({"ids": windows.input_ids} | ({} if mask is None else {"mask": mask}))
