"""Train a pruned model in memory."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.data.record import DataRecord
from llm_surgeon.errors import InputError
from llm_surgeon.isolation import isolated
from llm_surgeon.models.decoder import Decoder, check_finite, check_rank, find_decoder
from llm_surgeon.models.footprint import is_compact
from llm_surgeon.models.limits import require_fit
from llm_surgeon.models.passes import evaluation_mode, mean_loss
from llm_surgeon.models.state import ModelState
from llm_surgeon.models.wrappers import unwrapped
from llm_surgeon.progress import Progress
from llm_surgeon.recovery.objective import Distillation
from llm_surgeon.recovery.training import train
from llm_surgeon.recovery.zeros import check_zeros, count_zeros, zero_masks, zeros_kept
from llm_surgeon.report.format import perplexity_of
from llm_surgeon.report.schema import collect_versions


@dataclass(frozen=True)
class RecoveryReport:
    """Record of a recovery.

    Attributes:
        config: the resolved options.
        versions: see :func:`llm_surgeon.report.schema.collect_versions`.
        zeros: weights of the linear layers that were and still are zero.
        steps, tokens: of the training that was done.
        loss_before, loss_after: held-out token cross-entropy, nats.
        log: losses and learning rates by step, see :func:`llm_surgeon.recovery.training.train`.
        seconds: of training.
        data: what it was trained on, the entry "training"; none where token ids were given.
    """

    config: dict[str, Any]
    versions: dict[str, str]
    zeros: int
    steps: int
    tokens: int
    loss_before: float
    loss_after: float
    log: list[dict[str, float]]
    seconds: float
    data: dict[str, DataRecord] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RecoveryReport:
        """The report that :meth:`to_json` wrote."""
        content = json.loads(text)
        return cls(**content | {"data": {name: DataRecord(**record) for name, record in content["data"].items()}})

    def summary(self) -> str:
        before, after = perplexity_of(self.loss_before), perplexity_of(self.loss_after)
        kept = f"{self.zeros:,} pruned weights are still zero" if self.zeros else "no weight was or is zero"
        work = f"{self.tokens:,} tokens in {self.seconds:.0f} s"
        return f"held-out perplexity {before:.2f} -> {after:.2f} after {work}; {kept}"


@isolated()
def recover(
    model: nn.Module,
    windows: Any,
    held_out: Any,
    *,
    teacher: nn.Module | None = None,
    config: RecoverConfig | None = None,
    state_folder: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> RecoveryReport:
    """Train a pruned causal LM in place; every zero of its decoder's linear layers stays a zero.

    Args:
        windows: training sequences, token ids ``[n, seqlen]`` or what else :meth:`Calibration.of` takes, drawn from at
            random.
        held_out: sequences whose loss picks the best state and stops the training early.
        teacher: the dense model: distil from its logits instead of learning from the tokens alone.
        config: every option at once, in place of ``options``.
        state_folder: where training keeps its state so that ``resume=True`` can go on (left out: nowhere).
        **options: fields of :class:`RecoverConfig`.

    Failed or interrupted (:class:`KeyboardInterrupt`) it leaves the model's modules, flags, hooks and configuration as
    they were. Weights are then those of the last step (``full``), or without corrections (``lora``; while these are
    being absorbed, some layers have theirs already); every zero is a zero.

    Raises:
        InputError: the model is quantized or frozen; the rank is larger than every layer; the teacher has another
            vocabulary, or other blocks where these are compared; data or an option is at fault.
        NumericalError: a loss that is not a number; weights are then those of the last step.
    """
    if config is not None and options:
        raise InputError("give either config or single options, not both")
    config = config or RecoverConfig.from_mapping(options)
    state, device = ModelState(model), next(model.parameters()).device
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return _recover(model, windows, held_out, teacher, config, state_folder, resume, progress)
    except BaseException:
        state.restore()
        raise


def _recover(
    model: nn.Module,
    windows: Any,
    held_out: Any,
    teacher: nn.Module | None,
    config: RecoverConfig,
    state_folder: str | Path | None,
    resume: bool,
    progress: Progress | None,
) -> RecoveryReport:
    """:func:`recover`, whose caller puts everything but the weights' values back if anything is raised."""
    windows, held_out = Calibration.of(windows), Calibration.of(held_out)
    model = unwrapped(model)
    teacher = None if teacher is None else unwrapped(teacher)
    decoder = check_recoverable(model, teacher, config)
    check_finite(model)
    for name, each in {"training sequences": windows, "held-out sequences": held_out}.items():
        require_fit(each.input_ids, model, name)
    masks = zero_masks(decoder)
    begun, progress = time.perf_counter(), progress or Progress()
    progress.phase("held-out loss before the training")
    before = _loss(model, held_out, config)
    measured = time.perf_counter()
    progress.phase("training")
    distilled = None if teacher is None else Distillation(model, teacher, config)
    kept = _corrected(model, decoder, config) if config.lora else zeros_kept(masks, model)
    with evaluation_mode(teacher or nn.Identity()), kept as trained:
        log = train(
            trained,
            windows,
            held_out,
            config,
            None if state_folder is None else Path(state_folder),
            objective=distilled,
            seconds=_seconds(config, begun, measured),
            resume=resume,
            progress=progress,
        )
    check_zeros(masks)
    steps = int(max((entry["step"] for entry in log), default=0))
    if not steps:  # trials of learning rates at most
        raise InputError(f"minutes {config.minutes} are over before the first step of the training: give more")
    progress.phase("held-out loss after the training")
    return RecoveryReport(
        config=asdict(config),
        versions=collect_versions(),
        zeros=count_zeros(masks),
        steps=steps,
        tokens=steps * config.batch_size * windows.input_ids.shape[1],
        loss_before=before,
        loss_after=_loss(model, held_out, config),
        log=log,
        seconds=time.perf_counter() - begun,
    )


def _corrected(model: nn.Module, decoder: Decoder, config: RecoverConfig) -> AbstractContextManager[nn.Module]:
    from llm_surgeon.recovery.lora import low_rank_corrections  # brings peft: only where it is needed

    return low_rank_corrections(model, decoder, config.rank, config.alpha, config.dropout, config.seed)


def _seconds(config: RecoverConfig, begun: float, measured: float) -> float | None:
    """Seconds of the minutes that the training may take: the held-out loss, ``measured`` once, is taken twice more, and
    with a mean of the weights for that, too.
    """
    return None if config.minutes is None else 60 * config.minutes - (3 + bool(config.ema)) * (measured - begun)


def _loss(model: nn.Module, data: Calibration, config: RecoverConfig) -> float:
    return mean_loss(model, data, config.micro_batch_size or max(1, 8192 // data.input_ids.shape[1]))


def check_recoverable(model: nn.Module, teacher: nn.Module | None, config: RecoverConfig) -> Decoder:
    """Raise :class:`InputError` where :func:`recover` would for what ``model`` and ``teacher`` are; the decoder."""
    if any(map(is_compact, model.modules())):
        raise InputError("the model is compact: recover the checkpoint it was made from, then compact that")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise InputError("the model is quantized or packed: recover the checkpoint it was made from")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("the model is frozen: none of its parameters requires gradients")
    for name in ("block_weight", "label_weight") if teacher is None else ():
        if getattr(config, name):
            raise InputError(f"{name} means nothing without a teacher")
    if teacher is not None:
        ours, theirs = (m.get_input_embeddings().num_embeddings for m in (model, teacher))  # type: ignore[operator]
        if ours != theirs:
            raise InputError(f"the teacher has a vocabulary of {theirs}, the model of {ours}")
    decoder = find_decoder(model)
    if config.lora:
        check_rank(decoder, config.rank, "rank")
    return decoder
