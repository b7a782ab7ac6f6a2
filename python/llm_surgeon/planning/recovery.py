"""Memory of a recovery that follows a pruning in the same process: training of all weights, by distillation."""

from __future__ import annotations

import torch
from torch import nn

from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.models.loss import CHUNK
from llm_surgeon.models.passes import dtype_of_products
from llm_surgeon.planning.activations import measure_training
from llm_surgeon.planning.memory import BACKWARD_COPIES

_FLOAT = 4
# Of every trained number two moments and the best state; and its gradient, or once that is gone a new best state.
_HELD, _PASSING = 3, 1
# Logits of a batch that are alive at once: of both models, and their gradient; chunks of them in float32 meanwhile.
_LOGITS, _CHUNKS = 3, 5
# Of the largest parameter, where AdamW goes through them one by one.
_ADAMW_COPIES = 2


class RecoveryMemory:
    """Bytes that a recovery takes beyond the model as it is stored, which at most has the dense one's size.

    Attributes:
        held: float32 weights where they are stored in 16 bits, AdamW's moments, best states, and the dense model.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, config: RecoverConfig, device: torch.device) -> None:
        self._config, on_gpu, dtype = config, device.type == "cuda", dtype_of_products(device)
        parameters = list(model.parameters())
        numbers = sum(p.numel() for p in parameters)
        masters = sum(_FLOAT * p.numel() for p in parameters if p.element_size() < _FLOAT)
        self.held = masters + _FLOAT * (_HELD + bool(config.ema)) * numbers + (2 if on_gpu else _FLOAT) * numbers
        self._gradients = _FLOAT * _PASSING * numbers
        self._step = 0 if on_gpu else _FLOAT * _ADAMW_COPIES * max(p.numel() for p in parameters)
        itemsize = _FLOAT if dtype is None else dtype.itemsize
        self._vocabulary, width = model.get_output_embeddings().weight.shape  # type: ignore[operator]
        self._rounded_weights = 0 if dtype is None else itemsize * (decoder.weights + self._vocabulary * width)
        widest = max(max(linear.rows, linear.columns) for linear in decoder.linears)
        self._of_token = measure_training(model, decoder, config.seqlen, dtype)
        self._of_token += itemsize * (_LOGITS * self._vocabulary + BACKWARD_COPIES * widest)

    def bytes(self, windows: int) -> int:
        """All of them, with ``windows`` at a time."""
        tokens = windows * self._config.seqlen
        chunks = _FLOAT * _CHUNKS * min(CHUNK, tokens * self._vocabulary)
        batch = self._rounded_weights + int(tokens * self._of_token) + chunks
        # Gradients are there before a batch where they are summed over several.
        batch += self._gradients if windows < self._config.batch_size else 0
        return self.held + max(batch, self._gradients + self._step)

    def windows(self, room: float) -> int:
        """The most windows at a time, a divisor of a step's, that fit ``room`` bytes; one where none do."""
        most, size = self._config.windows_at_once(self._config.seqlen), self._config.batch_size
        fitting = (n for n in range(most, 0, -1) if size % n == 0 and self.bytes(n) <= room)
        return most if self._config.micro_batch_size else next(fitting, 1)
