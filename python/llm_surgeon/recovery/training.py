"""Training through transformers' Trainer: language-modelling loss, or distillation from the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import InputError, NumericalError, first_line
from llm_surgeon.models.passes import run_model
from llm_surgeon.progress import Progress
from llm_surgeon.recovery.state import latest_checkpoint, seal

_MICRO_TOKENS = 16384


class Windows(Dataset[dict[str, Tensor]]):
    """Token sequences as a dataset of labelled examples.

    Labelled -100, which no loss counts, is padding, and so is the token after it: a padded position does not predict.
    """

    def __init__(self, data: Calibration) -> None:
        ids, mask = data.input_ids, data.attention_mask
        self._columns = {"input_ids": ids, "labels": ids}
        if mask is not None:
            predicted = mask & F.pad(mask[:, :-1], (1, 0))
            self._columns |= {"labels": ids.masked_fill(~predicted, -100), "attention_mask": mask}

    def __len__(self) -> int:
        return len(self._columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self._columns.items()}


class RecoveryTrainer(Trainer):
    """Trainer whose training loss is ``T² KL(teacher ‖ student)`` per token where there is a teacher.

    Held-out loss is the token cross-entropy in any case, so that runs compare.
    """

    def __init__(self, *arguments: Any, teacher: nn.Module | None, temperature: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.model_accepts_loss_kwargs = False  # compute_loss gives the mean of its own micro-batch
        self._teacher, self._temperature = teacher, temperature

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, mask, targets = inputs["input_ids"], inputs.get("attention_mask"), inputs["labels"][:, 1:].flatten()
        logits = run_model(model, ids, mask).logits[:, :-1].flatten(0, 1)
        if self._teacher is None or not model.training:
            loss = F.cross_entropy(logits.float(), targets)
        else:
            with torch.no_grad():
                wanted = run_model(self._teacher, ids, mask).logits[:, :-1].flatten(0, 1)
            counted = targets != -100
            loss = distillation_loss(logits[counted], wanted[counted], self._temperature)
        # Trainer's evaluation wants outputs beside the loss; it drops them where only the loss is asked for.
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        try:
            super()._save_checkpoint(*arguments, **options)
            seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is a RuntimeError of torch's writer
            place = repr(self.args.output_dir)
            raise InputError(f"the training state cannot be written to {place}: {first_line(error)}") from error


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T² Σ_v p_v (log p_v − log q_v)``, p and q the softmax of ``teacher / T`` and ``student / T``; mean over tokens.

    Args:
        student, teacher: logits ``[tokens, vocabulary]``, computed in float32.

    The factor T² keeps gradients of the same size at every temperature (Hinton, Vinyals, Dean 2015).
    """
    q = F.log_softmax(student.float() / temperature, dim=-1)
    p = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")


class _Report(TrainerCallback):
    """Tells progress, and stops on a loss that is not a number."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        self._progress.step(state.global_step, state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any) -> None:
        for name in ("loss", "eval_loss"):
            value = state.log_history[-1].get(name, 0.0) if state.log_history else 0.0
            if value != value:
                raise NumericalError(f"the {name} is not a number after {state.global_step} steps: lower learning_rate")


def train(
    model: nn.Module,
    windows: Calibration,
    held_out: Calibration | None,
    config: RecoverConfig,
    folder: Path,
    *,
    teacher: nn.Module | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place on ``windows`` and leave it in its best state on ``held_out``.

    Args:
        held_out: sequences whose loss decides which state is best and when to stop; ``None``: train to the end.
        folder: where Trainer keeps its state, one checkpoint an evaluation, so that ``resume`` can go on.
        teacher: the dense model to distil from.

    Returns:
        Trainer's log: losses, learning rates and held-out losses by step.

    Raises:
        NumericalError: a loss that is not a number; InputError: ``folder`` cannot be written.
    """
    device = next(model.parameters()).device
    micro = config.micro_batch_size or _micro_batch(config.batch_size, windows.input_ids.shape[1])
    evaluated = held_out is not None
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // micro,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        eval_strategy="steps" if evaluated else "no",
        eval_steps=config.eval_every,
        save_strategy="steps" if evaluated else "no",
        save_steps=config.eval_every,
        save_total_limit=2,
        load_best_model_at_end=evaluated,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        logging_steps=config.eval_every,
        disable_tqdm=True,
        report_to=[],
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
        seed=config.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # Trainer would spread a step over all visible GPUs by DataParallel
    callbacks: list[TrainerCallback] = [_Report(progress or Progress())]
    if evaluated:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=config.patience))
    trainer = RecoveryTrainer(
        model=model,
        args=arguments,
        train_dataset=Windows(windows),
        eval_dataset=Windows(held_out) if held_out is not None else None,
        callbacks=callbacks,
        teacher=teacher,
        temperature=config.temperature,
    )
    trainer.remove_callback(PrinterCallback)  # progress is ours to show
    trainer.train(resume_from_checkpoint=latest_checkpoint(folder) if resume else None)
    return trainer.state.log_history


def _micro_batch(batch_size: int, seqlen: int) -> int:
    """The largest divisor of ``batch_size`` that holds at most about 16384 tokens."""
    fitting = [size for size in range(1, batch_size + 1) if batch_size % size == 0 and size * seqlen <= _MICRO_TOKENS]
    return max(fitting, default=1)
