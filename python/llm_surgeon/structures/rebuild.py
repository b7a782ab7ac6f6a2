"""Blocks of other sizes, built by their own class on the meta device: what a smaller block must look like."""

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

from llm_surgeon.errors import UnsupportedModelError


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
    """Whether the class of ``config`` takes it with ``changes`` for all blocks."""
    try:
        type(config).from_dict(json.loads(config.to_json_string()) | dict(changes))
    except Exception:  # whatever a class says to a configuration that does not fit
        return False
    return True


def check_rebuilds(model: PreTrainedModel) -> None:
    """Raise :class:`UnsupportedModelError` unless the model's class builds it from the configuration that is stored."""
    name = type(model).__name__
    try:
        config = type(model.config).from_dict(json.loads(model.config.to_json_string()))
        with torch.device("meta"):
            shapes = {key: parameter.shape for key, parameter in type(model)(config).named_parameters()}
    except Exception as error:  # whatever a class says to a configuration that does not fit
        raise UnsupportedModelError(f"{name} of these sizes cannot be loaded again: {error}".splitlines()[0]) from error
    for key, parameter in model.named_parameters():
        if shapes.get(key) != parameter.shape:
            raise UnsupportedModelError(
                f"{name} of these sizes cannot be loaded again: its class builds {key} otherwise than as "
                f"{list(parameter.shape)}"
            )


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
