"""Replayed modules."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from transformers.modeling_outputs import BaseModelOutput

from llm_surgeon.models.batch_tensors import BatchTensors
from llm_surgeon.models.offload import PinnedMemory
from llm_surgeon.models.replay import Replay


class Counting(nn.Module):
    """Returns what its input times its calls is, and the calls besides."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.calls * x, self.calls


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Counting()

    def forward(self, x):
        y, _ = self.inner(x)
        y += 1.0  # in place
        return self.inner(y)


class Runs:
    """Runs of a block, batch by batch, with what was noted of the batches before."""

    def __init__(self, batches=1, memory=None):
        self.answers = BatchTensors(torch.device("cpu"), memory)
        for batch in range(batches):
            self.answers.put(batch, "input", torch.ones(3))
        self.replay = Replay(self.answers)

    def __call__(self, block, **options):
        """Results of all batches."""
        results = []
        for batch, held in enumerate(self.answers.turns("input", *self.replay.modules)):
            with self.replay.running(batch, held, **options):
                results.append(block(held["input"]))
        return results


@dataclasses.dataclass(frozen=True)
class Plain:
    """A dataclass that PyTorch knows nothing of."""

    x: torch.Tensor
    name: str


KINDS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, None, 2 * x),
    "dictionary": lambda x: {"x": x, "more": [x + 1.0, "text"]},
    "dataclass": lambda x: Plain(x, "text"),
    "output": lambda x: BaseModelOutput(last_hidden_state=x),
}


def tensors(value):
    if isinstance(value, Plain):
        return [value.x]
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


class Returning(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls = kind, 0

    def forward(self, x):
        self.calls += 1
        return KINDS[self.kind](self.calls * x)


class Around(nn.Module):
    """Writes to what its module returns, which runs twice."""

    def __init__(self, kind):
        super().__init__()
        self.inner = Returning(kind)

    def forward(self, x):
        found = [self.inner(x), self.inner(x)]
        before = [tensor.clone() for value in found for tensor in tensors(value)]
        for value in found:
            for tensor in tensors(value):
                tensor.add_(1.0)
        return before, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [PinnedMemory, lambda: None])
def test_the_second_run_of_a_batch_returns_what_the_first_one_did(kind, memory):
    block, runs = Around(kind), Runs(2, memory())
    runs.replay.add(block.inner)
    results = [runs(block) for _ in range(3)]
    assert block.inner.calls == 4
    for batch in (0, 1):
        first, *later = [results[run][batch] for run in range(3)]
        for again in later:
            assert all(torch.equal(x, y) for x, y in zip(first[0], again[0], strict=True))
            assert [type(value) for value in first[1]] == [type(value) for value in again[1]]
    assert not torch.equal(results[0][0][0][0], results[0][1][0][0])
    assert "forward" not in vars(block.inner)


def test_a_module_takes_the_place_of_what_is_inside():
    block, runs = Twice(), Runs()
    whole = nn.Sequential(block)
    runs.replay.add(block.inner)
    runs(whole)
    runs.replay.add(block)
    for _ in range(3):
        runs(whole)
    assert block.inner.calls == 4  # two of the first run, two of the second
    runs.replay.clear()
    runs(whole)
    assert block.inner.calls == 6 and not runs.replay.modules


def test_a_last_run_is_not_noted():
    block, runs = Twice(), Runs()
    runs.replay.add(block.inner)
    (first,), (second,) = runs(block, last=True), runs(block)
    assert block.inner.calls == 4 and not torch.equal(first[0], second[0])


class WithMap(nn.Module):
    """Returns what a module inside it does, and something far larger."""

    def __init__(self):
        super().__init__()
        self.inner = Returning("tensor")
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x), x.repeat(5)


def test_the_parts_of_a_module_are_replayed_where_its_answers_are_large():
    block, runs = WithMap(), Runs(2)
    whole = nn.Sequential(block)
    runs.replay.add(block)
    results = [runs(whole) for _ in range(4)]
    assert runs.replay.modules == [block.inner]
    # The first batch's run tells; the second batch's notes, and the first batch's in the next round.
    assert block.calls == 8 and block.inner.calls == 3
    for result in results[2:]:
        assert all(torch.equal(x, y) for x, y in zip(result[0], results[1][0], strict=True))
        assert all(torch.equal(x, y) for x, y in zip(result[1], results[0][1], strict=True))
    runs.replay.add(whole)
    runs(whole)
    assert runs.replay.modules == [block.inner]  # found by one batch after the other


@pytest.mark.parametrize("memory", [PinnedMemory, lambda: None])
def test_calls_after_the_end_of_an_earlier_run_are_noted_later(memory):
    block, runs = Twice(), Runs(2, memory())
    runs.replay.add(block.inner)
    once = runs(block.inner)
    assert block.inner.calls == 2
    results = [runs(block) for _ in range(2)]
    assert block.inner.calls == 4
    for batch in (0, 1):
        assert torch.equal(results[0][batch][0], results[1][batch][0]) and results[0][batch][1] == 3 + batch
        assert torch.equal(results[0][batch][0], (3 + batch) * (once[batch][0] + 1.0))


def test_a_run_that_is_ended_early_notes_what_it_saw():
    block, runs = Twice(), Runs()
    runs.replay.add(block.inner)

    def fails(x):
        block(x)
        raise KeyError

    with pytest.raises(KeyError):
        runs(fails)
    assert "forward" not in vars(block.inner)
    runs(block)
    assert block.inner.calls == 4  # an error's run is not noted
