"""Backward passes that give the same bits every time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional

# Between what attention returns and its own node lie views at most, of padded heads.
_VIEWS = 4
_ON = (True, False, False)  # see `_switch`


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Context manager: backward passes through torch's attention, run forward in it, repeat to the bit.

    Its kernels for GPUs would otherwise add up in the order in which their blocks happen to end. Nothing else in a
    frozen decoder's backward pass does. The whole pass cannot be made deterministic by torch's switch: it refuses
    operations that know no other way, and in its milder form leaves attention as it is. So it is thrown for attention
    alone: forward, as some of its kernels have no other backward pass, and for its node. Everything is restored on
    exit.
    """
    attention, chosen = functional.scaled_dot_product_attention, _switch()

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        _throw(_ON)
        try:
            out = attention(*args, **kwargs)
        finally:
            _throw(chosen)
        node = _attention_node(out.grad_fn)
        if node is not None:
            node.register_prehook(lambda _: _throw(_ON))
            node.register_hook(lambda *_: _throw(chosen))
        return out

    functional.scaled_dot_product_attention = watched
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attention
        _throw(chosen)


def _attention_node(node: Node | None) -> Node | None:
    for _ in range(_VIEWS):
        if node is None or node.name().startswith("ScaledDotProduct"):
            return node
        node = node.next_functions[0][0] if node.next_functions else None
    return None


def _switch() -> tuple[bool, bool, bool]:
    """Whether torch is to be deterministic, only warns, and fills new memory."""
    deterministic: Any = torch.utils.deterministic
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )


def _throw(switch: tuple[bool, bool, bool]) -> None:
    deterministic: Any = torch.utils.deterministic
    torch.use_deterministic_algorithms(switch[0], warn_only=switch[1])
    deterministic.fill_uninitialized_memory = switch[2]
