"""What a run will need of memory, disk and time, and whether it is there: asked before work starts."""

from __future__ import annotations

import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants
import psutil
import torch
from transformers import PreTrainedModel

from llm_surgeon.config import GLOBAL_METHODS, PruneConfig
from llm_surgeon.errors import InputError
from llm_surgeon.models import PrunableLinear
from surgeon_kernels import SymmetricAccumulator

_FLOAT = 4  # bytes of the float32 that everything but the model itself is computed in
# Tokens per pass: enough to feed the matrix units, few enough to leave memory to other things.
_CPU_TOKENS, _GPU_TOKENS = 4096, 8192
_OTHER_FILES = 32 * 2**20  # tokenizer, configuration, reports


@dataclass(frozen=True)
class Estimate:
    """What pruning a loaded model needs, roughly and rather too much than too little (bytes, seconds).

    Attributes:
        weights_bytes: the model as it is loaded.
        snapshot_bytes: a copy of the decoder's linears in main memory, to restore on failure (0 unless the model is
            in main memory too).
        factors_bytes: the Kronecker factors, A ``[C', C']`` once per input and G ``[R, R]`` per layer, float32.
        costs_bytes: every weight's cost (float32, also as one sorted list) and its mask.
        workspace_bytes: damped factors, their inverses and the solver's matrices of the largest layer:
            ``2 C'^2 + 2 R^2 + 8 R C'`` float32.
        activations_bytes: one pass's: three copies of the logits, and the inputs and outputs of every linear with a
            quarter on top for what lies between them; where no gradients are needed, of the largest linear alone;
            where activations are computed again, of the largest block, and every block's input.
        disk_bytes: the checkpoint that is written.
        seconds: floating point operations (see :func:`estimate`) over the measured rate of a matrix product.
    """

    weights_bytes: int
    snapshot_bytes: int
    factors_bytes: int
    costs_bytes: int
    workspace_bytes: int
    activations_bytes: int
    disk_bytes: int
    seconds: float

    @property
    def memory_bytes(self) -> int:
        """Peak memory on the model's device, the model included."""
        return self.weights_bytes + self.additional_bytes

    @property
    def additional_bytes(self) -> int:
        """Peak memory beyond the model, which is loaded already: what :func:`require_memory` should ask for."""
        return (
            self.snapshot_bytes + self.factors_bytes + self.costs_bytes + self.workspace_bytes + self.activations_bytes
        )


def estimate(
    model: PreTrainedModel,
    linears: Sequence[PrunableLinear],
    config: PruneConfig,
    *,
    saved_dtype: torch.dtype | None = None,
) -> Estimate:
    """Estimate a run of ``config`` on a loaded model; takes under 0.3 s, most of it to time a matrix product.

    Operations, with P the weights of the linears and the output embedding, N the calibration tokens::

        shots * (6 P N with gradients, 2 P N without  +  2 N sum(C'^2 + R^2) for the factors
                 +  sum(C'^3 + R^3) for their inverses  +  4 max_iterations sum(R C' (R + C')) for the joint solver)
        + 2 P N for the final loss

    Attention's own products are left out, and the solver may stop earlier. Without gradients there is no G.

    Args:
        linears: the decoder's linears that will be pruned.
        config: ``seqlen`` must be filled in.
        saved_dtype: of the written checkpoint; the model's own where left out.
    """
    assert config.seqlen is not None and config.shots is not None
    parameters = list(model.parameters())
    device = parameters[0].device
    gradients, factored = config.method in GLOBAL_METHODS, config.method != "magnitude"
    windows = windows_per_pass(model, linears, config, config.samples, config.seqlen)
    tokens = config.samples * config.seqlen

    sizes = [(linear.rows, linear.columns + linear.has_bias) for linear in linears]
    weights = sum(R * C for R, C in sizes)
    gram = sum(n**2 for n in _factor_sizes(linears, config))
    inverses = sum(n**3 for n in _factor_sizes(linears, config))
    joint = config.update == "joint" and config.pattern.single_weights
    solver = 4 * config.max_iterations * sum(R * C * (R + C) for R, C in sizes) * joint
    vocabulary, hidden = _output_embedding_shape(model)

    passes = 2 * (weights + vocabulary * hidden) * tokens
    operations = config.shots * (factored * passes * (3 if gradients else 1) + 2 * tokens * gram + inverses + solver)
    return Estimate(
        weights_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        snapshot_bytes=_FLOAT * weights * (device.type == "cpu"),
        factors_bytes=_factor_bytes(linears, config),
        costs_bytes=(2 * _FLOAT + 1) * weights,
        workspace_bytes=_FLOAT * max(2 * C**2 * factored + 2 * R**2 * gradients + 8 * R * C for R, C in sizes),
        activations_bytes=windows * config.seqlen * _activation_bytes(model, linears, config),
        disk_bytes=sum(p.numel() * (saved_dtype or p.dtype).itemsize for p in parameters) + _OTHER_FILES,
        seconds=(operations + passes) / matmul_rate(device),
    )


def windows_per_pass(
    model: PreTrainedModel, linears: Sequence[PrunableLinear], config: PruneConfig, samples: int, seqlen: int
) -> int:
    """Calibration windows of ``seqlen`` tokens that go through the model together.

    As configured; else about 4096 tokens, and on a GPU up to 8192 as far as their activations fit two fifths of
    the memory that is free beside the factors. Never more than ``samples``, never less than one.
    """
    if config.batch_size is not None:
        return min(samples, config.batch_size)
    tokens, device = _CPU_TOKENS, next(model.parameters()).device
    if device.type == "cuda":
        free = max(0, available_memory(device) - _factor_bytes(linears, config))
        tokens = min(_GPU_TOKENS, 2 * free // 5 // _activation_bytes(model, linears, config))
    return max(1, min(samples, tokens // seqlen))


def _activation_bytes(model: PreTrainedModel, linears: Sequence[PrunableLinear], config: PruneConfig) -> int:
    """Bytes per token of the activations alive at once, see :class:`Estimate`."""
    vocabulary, hidden = _output_embedding_shape(model)
    if config.method in GLOBAL_METHODS:
        blocks: Counter[int] = Counter()  # per block: every output, and every input once
        for linear in linears:
            blocks[linear.depth] += linear.rows + (linear.columns if linear.input_group == linear.name else 0)
        kept = hidden * len(blocks) + max(blocks.values())
        width = kept if config.checkpoint_activations else blocks.total()
    else:
        width = max(linear.rows + linear.columns for linear in linears)
    itemsize = next(model.parameters()).element_size()
    return itemsize * (3 * vocabulary + width + width // 4)


def _factor_bytes(linears: Sequence[PrunableLinear], config: PruneConfig) -> int:
    return _FLOAT * sum(map(SymmetricAccumulator.elements, _factor_sizes(linears, config)))


def _factor_sizes(linears: Sequence[PrunableLinear], config: PruneConfig) -> list[int]:
    """Sizes of the factors: an A per shared input, as wide as its widest user, bias included, and a G per linear."""
    if config.method == "magnitude":
        return []
    widths: dict[str, int] = {}
    for linear in linears:
        widths[linear.input_group] = max(linear.columns + linear.has_bias, widths.get(linear.input_group, 0))
    return [*widths.values(), *(linear.rows for linear in linears if config.method in GLOBAL_METHODS)]


def matmul_rate(device: torch.device, seconds: float = 0.1) -> float:
    """Measured floating point operations per second of a float32 matrix product."""
    size = 4096 if device.type == "cuda" else 512
    x = torch.ones(size, size, device=device)
    products = 0
    x @ x  # the first one also starts libraries up
    _synchronize(device)
    begun = time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < seconds:
        x @ x
        _synchronize(device)
        products += 1
    return max(products, 1) * 2 * size**3 / elapsed


def available_memory(device: torch.device | str) -> int:
    """Bytes free on a GPU (those cached by PyTorch included), or in main memory for any other device."""
    device = torch.device(device)
    if device.type != "cuda":
        return psutil.virtual_memory().available
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def peak_memory(device: torch.device) -> int:
    """Most bytes ever in use: allocated on a GPU since its statistics were reset, or by the process in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def require_memory(needed: int, device: torch.device | str) -> None:
    """Raise :class:`InputError` where fewer than ``needed`` bytes are available on ``device``."""
    available = available_memory(device)
    if needed > available:
        raise InputError(
            f"about {human_bytes(needed)} of memory are needed on {device} and {human_bytes(available)} are available"
        )


def require_disk(out: str | Path, needed: int) -> None:
    """Raise :class:`InputError` where the disk that ``out`` will be on has fewer than ``needed`` bytes left."""
    folder = nearest_existing(Path(out).expanduser().resolve())
    available = shutil.disk_usage(folder).free
    if needed > available:
        raise InputError(
            f"about {human_bytes(needed)} of disk are needed for {str(out)!r} and "
            f"{human_bytes(available)} are available in {str(folder)!r}"
        )


def nearest_existing(path: Path) -> Path:
    """``path`` or the nearest of its parents that exists."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def human_bytes(count: int) -> str:
    """``count`` bytes for people, in powers of 1000: ``"13.5 GB"``."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value * 1000:.0f} TB"


def hub_reachable(timeout: float = 5.0) -> bool:
    """Whether the Hugging Face hub answers; asked once, for the hub's own retries take half a minute to give up."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # someone answers; certificates are the real client's affair
    except OSError:
        return False


def _output_embedding_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Vocabulary and width of the layer that makes the logits."""
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    return vocabulary, hidden


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
