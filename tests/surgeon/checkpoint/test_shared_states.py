"""States that several ranks share: what rank 0 keeps comes to the others, tensor by tensor, in main memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_surgeon.checkpoint.run_states import RunStates
from llm_surgeon.checkpoint.shared_states import SharedStates
from llm_surgeon.checkpoint.states import State
from llm_surgeon.distributed import Ranks


class _Rank(Ranks):
    """Rank 0, whose messages are noted, or rank 1, which gets those of ``wire``."""

    count = 2

    def __init__(self, index: int, wire: list[Any]) -> None:
        self.index, self._wire = index, wire

    def agreed(self, value: Any) -> Any:
        if self.first:
            self._wire.append(value)
        return self._wire.pop(0) if not self.first else value

    def broadcast_(self, tensor: Tensor, owner: int = 0) -> Tensor:
        if self.first:
            self._wire.append(tensor)
            return tensor
        return tensor.copy_(self._wire.pop(0))


class _Kept(RunStates):
    def __init__(self, state: State | None) -> None:
        super().__init__()
        self._state = state

    def last_shot(self) -> State | None:
        return self._state

    def block(self, depth: int) -> State | None:
        return self._state


def test_the_others_get_the_state_of_rank_0() -> None:
    tensors = {
        "weight": torch.randn(3, 5, dtype=torch.bfloat16),
        "scalar": torch.tensor(1 / 3, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
    }
    wire: list[Any] = []
    state = State(tensors, {"shot": 2})
    assert SharedStates(_Kept(state), _Rank(0, wire)).last_shot() is state
    assert sum(isinstance(message, Tensor) for message in wire) == len(tensors)
    found = SharedStates(RunStates(), _Rank(1, wire)).last_shot()
    assert found is not None and found.note == state.note and found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor)
    assert not wire


def test_where_rank_0_has_none_nobody_has() -> None:
    wire: list[Any] = []
    assert SharedStates(_Kept(None), _Rank(0, wire)).block(1) is None
    assert SharedStates(RunStates(), _Rank(1, wire)).block(1) is None
    assert not wire
