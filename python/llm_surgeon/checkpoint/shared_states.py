"""States of a run that several ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llm_surgeon.checkpoint.run_states import RunStates
from llm_surgeon.checkpoint.states import State
from llm_surgeon.distributed import Ranks


class SharedStates(RunStates):
    """States that rank 0 keeps, and tells the others of where the run goes on from them."""

    def __init__(self, own: RunStates, ranks: Ranks) -> None:
        """``own`` are the states of rank 0; those of others keep nothing."""
        self._own, self._ranks, self.keeps = own, ranks, own.keeps

    def claim(
        self, run: dict[str, Any], content: Callable[[], dict[str, str | None]], layout: dict[str, Any]
    ) -> dict[str, Any]:
        return self._ranks.agreed(self._own.claim(run, content, layout))

    def note_layout(self, layout: dict[str, Any]) -> None:
        self._own.note_layout(layout)

    def last_shot(self) -> State | None:
        return self._told(self._own.last_shot())

    def block(self, depth: int) -> State | None:
        return self._told(self._own.block(depth))

    def put_shot(self, index: int, state: State) -> None:
        self._own.put_shot(index, state)

    def put_block(self, depth: int, state: State) -> None:
        self._own.put_block(depth, state)

    def settle(self) -> None:
        self._own.settle()

    def _told(self, state: State | None) -> State | None:
        """The state that rank 0 has, if any; in main memory, where a whole one has room."""
        told = None
        if state is not None:
            forms = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.tensors.items()}
            told = forms, dict(state.note)
        told = self._ranks.agreed(told)
        if told is None:
            return None
        forms, note = told
        if state is None:
            tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in forms.items()}
            state = State(tensors, note)
        for tensor in state.tensors.values():
            self._ranks.broadcast_(tensor)
        return state
