"""Replayed modules."""

import pytest
import torch
from torch import nn

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


def test_the_second_run_of_a_batch_returns_what_the_first_one_did():
    block, replay = Twice(), Replay(2)
    replay.add(block.inner)
    x = torch.ones(3)
    results = []
    for batch in (0, 1, 0, 1):
        with replay.running(batch):
            results.append(block(x)[0].clone())
    assert block.inner.calls == 4
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])
    assert "forward" not in vars(block.inner)


def test_a_module_takes_the_place_of_what_is_inside():
    block, replay = Twice(), Replay(1)
    whole = nn.Sequential(block)
    replay.add(block.inner)
    with replay.running(0):
        whole(torch.ones(3))
    replay.add(block)
    for _ in range(3):
        with replay.running(0):
            whole(torch.ones(3))
    assert block.inner.calls == 4  # two of the first run, two of the second


def test_a_run_that_is_ended_early_notes_what_it_saw():
    block, replay = Twice(), Replay(1)
    replay.add(block.inner)
    with pytest.raises(KeyError), replay.running(0):
        block(torch.ones(3))
        raise KeyError
    assert "forward" not in vars(block.inner)
    with replay.running(0):
        block(torch.ones(3))
    assert block.inner.calls == 4  # an error's run is not noted
