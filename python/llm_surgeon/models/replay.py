"""Answers of a block's modules, noted in one run and given in later ones, so that these compute what is new alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from llm_surgeon.models.batch_tensors import BatchTensors

# How much larger than its largest input an answer may be: maps of attention are, which few blocks read.
_LARGEST = 4
_TOO_LARGE = object()


class Replay:
    """Outputs of modules that will not change any more, batch by batch.

    In the place of modules whose outputs are much larger than their inputs those inside them are replayed.

    A run inside :meth:`running` notes what they return, call by call; later runs of the same batch return that, and
    compute nothing. Both give the same result as long as the modules' inputs stay what they were.

    Attributes:
        modules: whose answers, lists by call, a run takes of ``answers``, where it has them.
    """

    def __init__(self, answers: BatchTensors) -> None:
        self.modules: list[nn.Module] = []
        self._answers = answers

    def add(self, module: nn.Module) -> None:
        """Replay ``module`` from now on; what is inside it need not be any more."""
        inside = set(module.modules())
        for known in [known for known in self.modules if known in inside]:
            self._forget(known)
        self.modules.append(module)

    def clear(self) -> None:
        """Replay nothing any more."""
        for module in list(self.modules):
            self._forget(module)

    @contextmanager
    def running(self, batch: int, known: Mapping[Any, Any], *, last: bool = False) -> Iterator[None]:
        """Context manager in which a run of the ``batch``-th batch notes or replays; restored on exit.

        Args:
            known: what ``answers`` has of the batch for :attr:`modules`.
            last: nothing is noted for later runs.
        """
        noted: dict[nn.Module, list[Any]] = {}
        own = {module: module.__dict__.get("forward") for module in self.modules}
        try:
            for module in self.modules:
                noted[module] = []
                module.forward = _replaying(module.forward, known.get(module, ()), None if last else noted[module])
            yield
        finally:
            for module, forward in own.items():
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.forward = forward
        for module, answers in noted.items():
            if any(answer is _TOO_LARGE for answer in answers):
                self._forget(module)
                self.modules += module.children()
            elif answers:
                self._answers.put(batch, module, [*known.get(module, ()), *answers])

    def _forget(self, module: nn.Module) -> None:
        self.modules.remove(module)
        self._answers.drop_all(module)


def _replaying(forward: Callable[..., Any], known: Iterable[Any], noted: list[Any] | None) -> Callable[..., Any]:
    """``forward`` with answers to its first calls ``known``, others being ``noted``: of a run that was ended between
    two calls the former is known."""
    left = iter(known)

    def run(*args: Any, **kwargs: Any) -> Any:
        for answer in left:
            return _copy(answer)
        output = forward(*args, **kwargs)
        if noted is not None:
            noted.append(_TOO_LARGE if _size(output) > _LARGEST * _size((args, kwargs)) else _copy(output))
        return output

    return run


def _size(value: Any) -> int:
    """Numbers in the largest tensor."""
    return max((leaf.numel() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), default=0)


def _copy(output: Any) -> Any:
    """Of its own: some models add to what a module returns in place."""
    return tree_map(_copy_leaf, output)


def _copy_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        copied = copy.copy(leaf)
        for field in dataclasses.fields(leaf):
            object.__setattr__(copied, field.name, _copy(getattr(leaf, field.name)))
        return copied
    return leaf
