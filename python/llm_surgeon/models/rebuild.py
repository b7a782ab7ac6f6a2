"""Models and blocks of other sizes, built by their own classes: what a smaller one must look like, and loads as."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from llm_surgeon.errors import UnsupportedModelError, first_line
from llm_surgeon.formats import modeling_pruned
from llm_surgeon.models.decoder import Decoder


def layer_config(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of ``config`` for one block."""
    out = copy.copy(config)
    for name, value in changes.items():
        setattr(out, name, value)
    return out


def build_block(like: nn.Module, config: PreTrainedConfig, depth: int) -> nn.Module | None:
    """A block with the modules of ``like`` on the meta device, or None where its class does not build one."""
    parameters = list(inspect.signature(type(like).__init__).parameters)[1:]
    if parameters[:1] != ["config"] or len(parameters) > 2:
        return None
    try:
        with torch.device("meta"):
            built = type(like)(config, *([depth] if len(parameters) == 2 else []))
    except (ValueError, RuntimeError, ZeroDivisionError, TypeError):  # what classes say to sizes that do not fit
        return None
    return built if dict(built.named_modules()).keys() == dict(like.named_modules()).keys() else None


def accepts(config: PreTrainedConfig, changes: Mapping[str, Any]) -> bool:
    """True where the class of ``config`` takes it with ``changes`` for all blocks."""
    try:
        type(config).from_dict(json.loads(config.to_json_string()) | dict(changes))
    except Exception:  # whatever a class says to a configuration that does not fit
        return False
    return True


def reloaded(model: PreTrainedModel) -> PreTrainedModel:
    """The model that a saved copy of ``model`` loads as: built from the stored configuration, on the same parameters.

    Raises:
        UnsupportedModelError: its class does not build parameters of these sizes.
    """
    name, shown, level = type(model).__name__, logging.is_progress_bar_enabled(), logging.get_verbosity()
    device = next(model.parameters()).device
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what does not load is reported below
    try:
        config = type(model.config).from_dict(json.loads(model.config.to_json_string()))
        built, info = type(model).from_pretrained(
            None,
            config=config,
            state_dict=model.state_dict(),
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # whatever a class says to a configuration that does not fit
        raise UnsupportedModelError(f"{name} of these sizes cannot be loaded again: {first_line(error)}") from error
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
    wrong = sorted({key for key, *_ in info["mismatched_keys"]} | set(info["missing_keys"]))
    if wrong or info["unexpected_keys"]:
        key = (wrong or sorted(info["unexpected_keys"]))[0]
        raise UnsupportedModelError(
            f"{name} of these sizes cannot be loaded again: its class builds {key} otherwise than as "
            f"{list(model.state_dict()[key].shape) if key in model.state_dict() else 'it is'}"
        )
    return built


def adopt(block: nn.Module, like: nn.Module) -> None:
    """Give the modules of ``block``, linears excepted, the plain attributes (sizes, configuration) of ``like``'s."""
    for name, module in like.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            continue
        own = vars(block.get_submodule(name))
        for key, value in vars(module).items():
            if key != "training" and isinstance(value, (int, float, str, PreTrainedConfig)) and key in own:
                own[key] = value


def weight_shape(linear: nn.Module) -> tuple[int, ...]:
    """``(R, C)``."""
    shape = tuple(linear.get_parameter("weight").shape)
    return shape[::-1] if isinstance(linear, Conv1D) else shape


def become_pruned(model: PreTrainedModel, decoder: Decoder) -> None:
    """Change the model's class to the one that rebuilds its blocks, and its saved form accordingly."""
    cls, first = type(model), decoder.linears[0]
    model.config.pruned_blocks = first.name.removesuffix(f".{first.depth}.{first.kind}")
    if not hasattr(model.config, "pruned_modules"):
        model.config.pruned_modules = {}
    if hasattr(cls, "is_pruned"):
        return
    try:
        model.__class__ = getattr(modeling_pruned, f"Pruned{cls.__name__}")
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{cls.__name__} is no class of transformers: keep one width for all blocks with uniform"
        ) from error
    type(model).register_for_auto_class("AutoModelForCausalLM")
    # Tensors that transformers renamed as it loaded them would be saved under their old names, and only its own classes
    # are loaded from these.
    model._weight_conversions = None
