"""Checks of a model that is to be pruned; whatever does not fit is refused by name, never skipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.errors import SurgeonError, UnsupportedModelError, first_line
from llm_surgeon.models.wrappers import check_bare

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Two sequences of three tokens: unequal sizes tell [batch, length, C] from any other layout.
PROBE_SHAPE = (2, 3)


def check_plain(model: Any) -> None:
    """Refuse what is no decoder-only transformers model whose own weights lie in memory.

    Raises:
        UnsupportedModelError: as :func:`check_bare`; it is an encoder-decoder or quantized, or a parameter is missing
            or cannot be differentiated.
    """
    check_bare(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder: only decoder-only models are supported"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{type(model).__name__} is quantized: prune the unquantized model")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(f"parameter {name} is on the meta device: load the whole model into memory")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_inference():
            raise UnsupportedModelError(
                f"{name} was made under torch.inference_mode and has no gradients: load the model outside of it"
            )


def check_shrinkable(model: PreTrainedModel) -> None:
    """Refuse a model whose sizes are those of a part: :class:`UnsupportedModelError`."""
    if model.config.get_text_config() is not model.config:
        raise UnsupportedModelError(
            f"{type(model).__name__} wraps a language model with others: groups, width and layers cannot leave it, nor "
            "can it be compacted; N:M, unstructured and rows-columns prune its decoder"
        )


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> int:
    """One forward pass over two short sequences: every token gets logits, and they depend on no later token.

    Returns:
        How many logits a token gets.

    Raises:
        UnsupportedModelError: otherwise: it is no causal language model, or does not run at all.
    """
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(PROBE_SHAPE[1], device=embedding.device).repeat(PROBE_SHAPE[0], 1)
    ids[1, -1] += 1  # the sequences differ in their last token alone
    try:
        output = model(input_ids=ids % embedding.shape[0], use_cache=False)
    except (SurgeonError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's own code says to its own sizes
        reason = _uneven_heads(model) or first_line(error)
        raise UnsupportedModelError(f"{type(model).__name__} does not run: {reason}") from error
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[:-1] != PROBE_SHAPE:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives no logits for every token: load a causal language model"
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no output head over the vocabulary: load a causal language model"
        )
    earlier = logits[:, :-1]
    if bool(((earlier[0] - earlier[1]).abs() > torch.finfo(logits.dtype).eps ** 0.5 * earlier.abs().max()).any()):
        raise UnsupportedModelError(
            f"{type(model).__name__} reads ahead: a later token changes the logits of those before it, so that they "
            "predict nothing; load a causal language model"
        )
    return logits.shape[-1]


def _uneven_heads(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    heads, groups = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    uneven = isinstance(heads, int) and isinstance(groups, int) and groups and heads % groups
    return f"its {heads} attention heads do not divide into {groups} key-value groups" if uneven else None


def is_linear(module: nn.Module) -> bool:
    """True for the two classes of linear layers that are pruned."""
    return isinstance(module, (nn.Linear, Conv1D))


def dotted(*parts: object) -> str:
    """A module's or parameter's name from its parts."""
    return ".".join(str(part) for part in parts if part != "")


def check_parameters(prefix: str, blocks: list[nn.Module], linears: dict[str, nn.Module]) -> None:
    """Refuse matrices that are in no linear layer, and linears of anything but plain floating point."""
    others = [
        (dotted(prefix, depth, kind, name), parameter, module)
        for depth, block in enumerate(blocks)
        for kind, module in block.named_modules()
        if not is_linear(module) and not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    ]
    for name, parameter, module in others:
        if parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.Conv1d):
            experts = any(word in f"{name} {type(module).__name__}".lower() for word in ("expert", "moe"))
            what = "fused mixture-of-experts" if experts else "block-diagonal or otherwise stacked"
            raise UnsupportedModelError(
                f"{name} is a stack of {parameter.shape[0]} matrices: {what} layers are not supported"
            )
    for name, parameter, module in others:
        raise UnsupportedModelError(
            f"{name} {list(parameter.shape)} belongs to a {type(module).__name__}, not to a linear layer: "
            "it cannot be pruned and would be skipped"
        )
    for name, linear in linears.items():
        for kind, parameter in linear.named_parameters(recurse=False):
            if kind not in ("weight", "bias"):
                raise UnsupportedModelError(f"{name} has a parameter {kind!r} that an ordinary linear layer has not")
            if type(parameter) is not nn.Parameter or parameter.dtype not in _DTYPES:
                raise UnsupportedModelError(
                    f"{name}.{kind} is a {type(parameter).__name__} of {parameter.dtype}: "
                    "only plain floating-point weights (not quantized or distributed) can be pruned"
                )


def check_sharing(model: nn.Module, linears: dict[str, nn.Module]) -> None:
    """Refuse linears that are one module under two names, or whose parameters are also another's."""
    seen_modules: dict[int, str] = {}
    inside = {id(linear) for linear in linears.values()}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in inside and seen_modules.setdefault(id(module), name) != name:
            raise UnsupportedModelError(
                f"{seen_modules[id(module)]} and {name} are the same module: shared layers are not supported"
            )
    owners: dict[tuple[torch.device, int], str] = {}
    tied: list[tuple[str, str]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if type(parameter) is nn.Parameter and parameter.numel() > 0:
            owner = owners.setdefault((parameter.device, parameter.data_ptr()), name)
            if owner != name:
                tied.append((owner, name))
    for names in tied:
        if any(name.rpartition(".")[0] in linears for name in names):
            raise UnsupportedModelError(f"{names[0]} and {names[1]} are tied: shared weights are not supported")
