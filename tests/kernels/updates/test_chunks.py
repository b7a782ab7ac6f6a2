"""The work of the chunked update: weights that share a system, systems that share a batch or a block."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon_kernels import chunked_update
from surgeon_kernels.linalg import chunked_solve as solve_module
from surgeon_kernels.updates import chunked_update as update_module
from tests.kernels.dense import factor, random_mask, random_weight, relative_error, repeatable


@pytest.mark.parametrize(
    ("pruned_per_row", "m", "expected"),
    [
        ([], 3, [0]),
        ([0, 0], 3, [0]),
        ([3, 2, 4], 5, [0, 5, 9]),
        ([3, 2, 4], 4, [0, 3, 5, 9]),
        ([3, 2, 4], 9, [0, 9]),
        ([0, 2, 0, 2, 0], 3, [0, 2, 4]),
        ([7], 3, [0, 3, 6, 7]),
        ([6], 3, [0, 3, 6]),
        ([6, 0, 1], 3, [0, 3, 6, 7]),
        ([7, 2, 1], 3, [0, 3, 6, 9, 10]),
        ([1, 7, 2], 3, [0, 1, 4, 7, 10]),
        ([1, 1], 1, [0, 1, 2]),
    ],
)
def test_the_chunk_rule(pruned_per_row, m, expected):
    assert update_module._chunk_offsets(pruned_per_row, m).tolist() == expected


@repeatable
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 12))
def test_chunks_are_not_empty_and_cover_every_pruned_weight(pruned_per_row, m):
    offsets = update_module._chunk_offsets(pruned_per_row, m).tolist()
    assert offsets[0] == 0 and offsets[-1] == sum(pruned_per_row)
    assert all(1 <= end - start <= m for start, end in pairwise(offsets))


@pytest.mark.parametrize("limit", [1, 9, 40, 100])
def test_batches_of_systems_do_not_change_the_result(monkeypatch, limit):
    W, pruned = random_weight(5, 6, 0), random_mask(5, 6, "random", 3)
    G_inv, A_inv = factor(5, "plain", 1), factor(6, "plain", 2)
    whole = chunked_update(W, pruned, G_inv, A_inv, max_correlated=4, sequential=False)
    monkeypatch.setattr(solve_module, "_BATCH_ELEMENTS", limit)
    split = chunked_update(W, pruned, G_inv, A_inv, max_correlated=4, sequential=False)
    assert relative_error(split.delta, whole.delta) < 1e-13


def test_batches_respect_the_limit(monkeypatch):
    monkeypatch.setattr(solve_module, "_BATCH_ELEMENTS", 20)
    sizes = [2, 2, 3, 1, 5, 1, 1, 2, 2, 2, 2, 2]
    assert list(solve_module._batches(sizes)) == [(0, 2), (2, 4), (4, 5), (5, 10), (10, 12)]
    assert list(solve_module._batches([])) == list(solve_module._batches([0, 0])) == []


def test_blocks_respect_memory_and_rows(monkeypatch):
    monkeypatch.setattr(update_module, "_FACTOR_BYTES", 20 * 64**2 * 4)
    monkeypatch.setattr(update_module, "_PENDING_ROWS", 10)
    sizes = [100, 128, 128, 129, 60, 1000, 5, 5, 5]
    ranges = [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 9], [9, 12], [12, 19], [19, 20]]
    assert list(update_module._blocks(sizes, ranges)) == [(0, 3), (3, 5), (5, 6), (6, 8), (8, 9)]
    assert list(update_module._blocks([], [])) == []


def test_row_ranges_skip_empty_rows():
    pruned_per_row = torch.tensor([0, 2, 0, 2, 7, 0])
    offsets = update_module._chunk_offsets(pruned_per_row.tolist(), 4)
    assert offsets.tolist() == [0, 4, 8, 11]
    assert update_module._row_ranges(pruned_per_row, offsets).tolist() == [[1, 4], [4, 5], [4, 5]]
