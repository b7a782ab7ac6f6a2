"""How the chunked update divides its work: which weights share a system, and which systems share a batch."""

import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgeon_kernels import chunked_update

from .dense import factor, random_mask, random_weight, relative_error, repeatable

# The package exports a function under the module's name.
module = importlib.import_module("surgeon_kernels.chunked_update")


@pytest.mark.parametrize(
    ("pruned_per_row", "m", "expected"),
    [
        ([], 3, []),
        ([0, 0], 3, []),
        ([3, 2, 4], 5, [(0, 5, 0, 2), (5, 9, 2, 3)]),
        ([3, 2, 4], 4, [(0, 3, 0, 1), (3, 5, 1, 2), (5, 9, 2, 3)]),
        ([3, 2, 4], 9, [(0, 9, 0, 3)]),
        ([0, 2, 0, 2, 0], 3, [(0, 2, 1, 3), (2, 4, 3, 5)]),
        ([7], 3, [(0, 3, 0, 1), (3, 6, 0, 1), (6, 7, 0, 1)]),
        ([6], 3, [(0, 3, 0, 1), (3, 6, 0, 1)]),
        ([7, 2, 1], 3, [(0, 3, 0, 1), (3, 6, 0, 1), (6, 9, 0, 2), (9, 10, 2, 3)]),
        ([1, 7, 2], 3, [(0, 1, 0, 1), (1, 4, 1, 2), (4, 7, 1, 2), (7, 10, 1, 3)]),
        ([1, 1], 1, [(0, 1, 0, 1), (1, 2, 1, 2)]),
    ],
)
def test_the_chunk_rule(pruned_per_row, m, expected):
    assert list(module._chunks(pruned_per_row, m)) == expected


@repeatable
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 12))
def test_chunks_cover_every_pruned_weight_once(pruned_per_row, m):
    chunks = list(module._chunks(pruned_per_row, m))
    row_of = [row for row, count in enumerate(pruned_per_row) for _ in range(count)]
    assert [i for start, end, *_ in chunks for i in range(start, end)] == list(range(len(row_of)))
    for start, end, first, last in chunks:
        assert 1 <= end - start <= m
        assert first <= row_of[start] and row_of[end - 1] < last <= len(pruned_per_row)


@pytest.mark.parametrize("limit", [1, 9, 40, 100])
def test_batches_of_systems_do_not_change_the_result(monkeypatch, limit):
    W, pruned = random_weight(5, 6, 0), random_mask(5, 6, "random", 3)
    G_inv, A_inv = factor(5, "plain", 1), factor(6, "plain", 2)
    whole = chunked_update(W, pruned, G_inv, A_inv, max_correlated=4, sequential=False)
    monkeypatch.setattr(module, "_BATCH_ELEMENTS", limit)
    split = chunked_update(W, pruned, G_inv, A_inv, max_correlated=4, sequential=False)
    assert relative_error(split.delta, whole.delta) < 1e-13


def test_batches_respect_the_limit(monkeypatch):
    monkeypatch.setattr(module, "_BATCH_ELEMENTS", 20)
    sizes = [2, 2, 3, 1, 5, 1, 1, 2, 2, 2, 2, 2]
    chunks = [(0, size, 0, 1) for size in sizes]
    batches = [[end for _, end, *_ in batch] for batch in module._batches(chunks)]
    assert [size for batch in batches for size in batch] == sizes
    assert batches == [[2, 2], [3, 1], [5], [1, 1, 2, 2, 2], [2, 2]]
