"""Windows to train on."""

import pytest
import torch

from llm_surgeon.data.training import training_windows
from llm_surgeon.errors import InputError


def test_a_round_covers_the_text_once_and_the_next_is_cut_elsewhere():
    ids = torch.arange(1000)
    windows = training_windows(ids, 99 * 3, 10, seed=0).input_ids
    assert windows.shape == (297, 10) and torch.equal(windows, windows[:, :1] + torch.arange(10))
    first = windows[:99, 0].sort().values
    assert torch.equal(first.diff(), torch.full((98,), 10)) and not torch.equal(first, windows[:99, 0])
    counts = torch.bincount(windows.flatten(), minlength=1000)
    assert counts[20:-20].min() >= 2 and counts.max() <= 4
    assert len({int(start) % 10 for start in windows[:, 0]}) > 1
    assert torch.equal(windows, training_windows(ids, 297, 10, seed=0).input_ids)


def test_tokens_apart_are_in_no_window():
    apart = torch.zeros(200, dtype=torch.bool)
    apart[50:60] = apart[120:121] = True
    windows = training_windows(torch.arange(200), 300, 10, seed=1, apart=apart).input_ids
    assert not apart[windows].any() and len(windows) == 300
    assert set(windows.flatten().tolist()) >= set(range(15, 50)) | set(range(60, 120)) | set(range(121, 190))
    with pytest.raises(InputError, match="no 10 tokens in a row are left beside those held out"):
        training_windows(torch.arange(200), 3, 10, seed=1, apart=torch.arange(200) % 9 == 0)


def test_rounds_limit_the_windows():
    assert len(training_windows(torch.arange(1000), 10**9, 10, seed=0, rounds=2).input_ids) == 2 * 991 // 10 + 1
    assert len(training_windows(torch.arange(1000), 7, 10, seed=0, rounds=2).input_ids) == 7
    with pytest.raises(InputError, match="one sequence needs 10"):
        training_windows(torch.arange(9), 1, 10, seed=0)
