"""Fused forms of what a decoder computes between its linears."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from llm_surgeon.formats.packed_linear import PackedLinear
from llm_surgeon.models.trial import numbers, shallow_copy, small_linear
from surgeon_kernels import rms_norm, rotary, swiglu

_ROTARY = "apply_rotary_pos_emb"
_LINEARS = ("gate_proj", "up_proj", "down_proj")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Classes and functions that have been tried, and whether they compute what they look like.
_verdicts: dict[Any, bool] = {}


@contextlib.contextmanager
def fused_pointwise(model: nn.Module) -> Iterator[None]:
    """Context manager: RMS norms, SwiGLU layers and rotary embeddings run as one kernel each, forward and backward.

    A part is replaced where it is built like one of these three and computes the same, which is tried on a few
    numbers. Every other part, and any module whose ``forward`` somebody has replaced already, runs as it is. Linear
    layers are called as before: hooks on them see what they saw. A rotary embedding is a function of the module that
    defines the model's class, and so replaced for all models of that class. Under autocast norms return its dtype, and
    rotations that of what is rotated. Everything is restored on exit.
    """
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if "forward" in vars(module):
                continue
            if is_rms_norm(module):
                forward = functools.partial(_rms_norm, module)
            elif is_swiglu(module):
                forward = functools.partial(_swiglu, module)
            else:
                continue
            stack.callback(vars(module).pop, "forward", None)  # before the change: interrupts come at any time
            module.forward = forward
        for source in {sys.modules.get(type(module).__module__) for module in model.modules()}:
            if is_rotary(getattr(source, _ROTARY, None)):
                _replace_rotary(source, stack)
        yield


def is_rms_norm(module: nn.Module) -> bool:
    """True where ``module`` computes :func:`surgeon_kernels.rms_norm` with its weight and epsilon."""
    weight = module._parameters.get("weight")
    if list(module._parameters) != ["weight"] or weight is None or weight.ndim != 1 or module._modules:
        return False
    if not isinstance(epsilon(module), float) or not _takes_one_tensor(module):
        return False
    if type(module) not in _verdicts:
        probe = shallow_copy(module, _parameters={"weight": nn.Parameter(numbers(len(weight)))})
        _verdicts[type(module)] = _agree(type(module).forward, _rms_norm, probe, 3.0 * numbers(2, len(weight)))
    return _verdicts[type(module)]


def is_swiglu(module: nn.Module) -> bool:
    """True where ``module`` computes ``down_proj(silu(gate_proj(x)) ∘ up_proj(x))``."""
    if module._parameters or set(module._modules) != {*_LINEARS, "act_fn"} or not _takes_one_tensor(module):
        return False
    if not all(isinstance(module._modules[name], (nn.Linear, PackedLinear)) for name in _LINEARS):
        return False
    activation = module._modules["act_fn"]
    if activation is None or activation._parameters or any(getattr(activation, hooks) for hooks in _HOOKS):
        return False  # the activation is not called on its own any more: a hook would miss it
    key = type(module), type(activation)
    if key not in _verdicts:
        small = dict(
            zip(_LINEARS, (small_linear(4, 6, 0.5), small_linear(4, 6, 0.9), small_linear(6, 4, 0.7)), strict=True)
        )
        probe = shallow_copy(module, _modules={**module._modules, **small})
        _verdicts[key] = _agree(type(module).forward, _swiglu, probe, 3.0 * numbers(5, 4))
    return _verdicts[key]


def is_rotary(function: Any) -> bool:
    """True where ``function(q, k, cos, sin)`` computes :func:`surgeon_kernels.rotary` of ``q`` and ``k``."""
    if not callable(function):
        return False
    if function not in _verdicts:
        _verdicts[function] = _rotates(function)
    return _verdicts[function]


def _rotates(function: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    names = list(inspect.signature(function).parameters.values())
    if [p.name for p in names[:4]] != ["q", "k", "cos", "sin"] or any(p.default is p.empty for p in names[4:]):
        return False
    q, k = numbers(1, 2, 3, 4), 2.0 * numbers(1, 1, 3, 4)
    cos, sin = 1.5 * numbers(1, 3, 4), 0.3 - numbers(1, 3, 4)
    theirs = function(q, k, cos, sin)
    return all(torch.allclose(theirs[i], rotary(x, cos, sin), rtol=1e-5, atol=1e-6) for i, x in enumerate((q, k)))


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    dtype = _autocast_dtype(x)
    if dtype is None:
        return rms_norm(x, module.weight, epsilon(module))
    # Linears that follow would round the result, each for itself.
    return rms_norm(x, module.weight.to(x.dtype), epsilon(module), dtype)


def _swiglu(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))


def _replace_rotary(source: ModuleType | None, stack: contextlib.ExitStack) -> None:
    original: Callable[..., tuple[Tensor, Tensor]] = getattr(source, _ROTARY)

    @functools.wraps(original)
    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        # Some functions also rotate a part of each head only, or take other layouts: those calls are theirs.
        if args or options or q.dim() != 4 or cos.dim() != 3 or not q.shape[-1] == k.shape[-1] == cos.shape[-1]:
            return original(q, k, cos, sin, *args, **options)
        if _autocast_dtype(q) is not None:
            cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        return rotary(q, cos, sin), rotary(k, cos, sin)

    stack.callback(setattr, source, _ROTARY, original)
    setattr(source, _ROTARY, both)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Dtype that products of ``x`` are computed in under autocast; None without it."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None


def has_own_forward(module: nn.Module) -> bool:
    """True where somebody has replaced ``module``'s ``forward``, other than :func:`fused_pointwise`."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "func", None) not in (_rms_norm, _swiglu)


def epsilon(module: Any) -> Any:
    """What an RMS norm adds to the mean square; None where it has no such number."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _takes_one_tensor(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2  # itself and x


def _agree(theirs: Callable[..., Tensor], ours: Callable[..., Tensor], module: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(theirs(module, x), ours(module, x), rtol=1e-5, atol=1e-6)
