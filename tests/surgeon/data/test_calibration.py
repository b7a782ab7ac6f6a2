from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from llm_surgeon.data.calibration import Calibration, calibration_windows, evaluation_windows
from llm_surgeon.data.tokens import tokenize
from llm_surgeon.errors import InputError
from tests.surgeon.checkpoints import tokenizer_of_words
from tests.surgeon.data.test_tokens import word_tokenizer


def test_windows_are_counted_before_they_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    for samples in (2_000_000_000, 10**12, 10**30):
        with pytest.raises(InputError, match=rf"memory are needed on cpu for {samples} windows of 2048 tokens and"):
            calibration_windows(torch.arange(5000), samples, 2048, seed=0)
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=8 * 3 * 6 - 1))
    with pytest.raises(InputError, match="about 144 bytes of memory are needed on cpu for 3 windows of 5 tokens"):
        calibration_windows(torch.arange(50), 3, 5, seed=0)


def test_evaluation_windows_drop_the_tail() -> None:
    assert evaluation_windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert evaluation_windows(torch.arange(4), 4).tolist() == [[0, 1, 2, 3]]


def test_calibration_windows_are_seeded_consecutive_and_reach_both_ends() -> None:
    ids = torch.arange(100, 112)
    windows = calibration_windows(ids, samples=200, seqlen=5, seed=3)
    starts = windows.input_ids[:, 0] - 100
    assert windows.attention_mask is None
    assert torch.equal(windows.input_ids, 100 + starts[:, None] + torch.arange(5))
    assert set(starts.tolist()) == set(range(8))
    assert torch.equal(windows.input_ids, calibration_windows(ids, samples=200, seqlen=5, seed=3).input_ids)
    assert not torch.equal(windows.input_ids, calibration_windows(ids, samples=200, seqlen=5, seed=4).input_ids)
    assert calibration_windows(ids, samples=3, seqlen=12, seed=0).input_ids.tolist() == [ids.tolist()] * 3


def test_windows_of_a_text_that_is_too_short() -> None:
    with pytest.raises(InputError, match="has 3 tokens and one sequence needs 4"):
        calibration_windows(torch.arange(3), samples=1, seqlen=4, seed=0)
    with pytest.raises(InputError, match="has 3 tokens and one sequence needs 4"):
        evaluation_windows(torch.arange(3), 4)


def test_calibration_of_a_tensor_and_of_itself() -> None:
    calibration = Calibration.of(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32))
    assert calibration.input_ids.dtype == torch.int64 and calibration.attention_mask is None
    assert calibration.input_ids.tolist() == [[1, 2], [3, 4]]
    assert Calibration.of(calibration) is calibration


def test_calibration_of_mappings_pads_on_the_right() -> None:
    calibration = Calibration.of(
        [
            {"input_ids": [5, 6, 7]},
            {"input_ids": torch.tensor([[1, 2], [3, 4]])},
            {"input_ids": [[8, 8, 8, 8]], "attention_mask": torch.tensor([[False, True, True, True]])},
        ]
    )
    assert calibration.input_ids.tolist() == [[5, 6, 7, 0], [1, 2, 0, 0], [3, 4, 0, 0], [8, 8, 8, 8]]
    assert calibration.attention_mask is not None and calibration.attention_mask.dtype == torch.bool
    assert calibration.attention_mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1]]


def test_calibration_of_a_tokenizer_output_and_of_a_data_loader() -> None:
    tokenizer = word_tokenizer("<s>")
    encoded = tokenizer(["a b", "c d"], return_tensors="pt")
    expected = [[0, 1, 2], [0, 3, 4]]
    single = Calibration.of(encoded)
    assert single.input_ids.tolist() == expected and single.attention_mask is None  # a mask without padding is none
    rows = [{"input_ids": row, "attention_mask": torch.ones(3)[row >= 0].long()} for row in encoded["input_ids"]]
    assert Calibration.of(DataLoader(rows, batch_size=1)).input_ids.tolist() == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.rand(2, 3), "integers, not torch.float32"),
        (torch.ones(2, 3, dtype=torch.bool), "integers, not torch.bool"),
        (torch.arange(3), r"not of shape \(3,\)"),
        (torch.ones(0, 3, dtype=torch.int64), "at least 2 tokens"),
        (torch.ones(3, 1, dtype=torch.int64), "at least 2 tokens"),
        (torch.tensor([[1, -100]]), "negative token id -100"),
        ([], "holds no sequences"),
        ("some text", "not str"),
        (7, "not int"),
        ([{"ids": [1, 2]}], "item 0 is not a mapping with input_ids"),
        ([{"input_ids": [1, 2]}, [1, 2]], "item 1 is not a mapping"),
        ([{"input_ids": ["a", "b"]}], "item 0 is not a rectangular array"),
        ([{"input_ids": [[1, 2], [3]]}], "item 0 is not a rectangular array"),
        ([{"input_ids": [0.5, 1.5]}], "must be integers"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "another shape"),
        ([{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 0]}], "sequence 0 has fewer than 2 tokens"),
        ([{"input_ids": [1, 2]}, {"input_ids": [1]}], "sequence 1 has fewer than 2 tokens"),
    ],
)
def test_calibration_refuses(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Calibration.of(value)


def test_calibration_refuses_a_mask_of_another_shape() -> None:
    with pytest.raises(InputError, match=r"shape of input_ids, \(1, 2\), not \(1, 3\)"):
        Calibration(torch.tensor([[1, 2]]), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="not list"):
        Calibration(torch.tensor([[1, 2]]), [[1, 1]])  # type: ignore[arg-type]


def test_batches_in_order_with_a_ragged_last_one() -> None:
    ids = torch.arange(10).view(5, 2)
    parts = list(Calibration(ids).batches(2, "cpu"))
    assert [part.tolist() for part, _ in parts] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]
    assert all(mask is None for _, mask in parts)
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[4, 2] = False
    masks = [part for _, part in Calibration(torch.zeros(5, 3, dtype=torch.int64), mask).batches(3, "cpu")]
    assert torch.equal(torch.cat([part for part in masks if part is not None]), mask)
    assert [len(part) for part in masks if part is not None] == [3, 2]


def test_windows_of_a_text_are_those_of_its_stream(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{1 + n % 40}" for n in range(300)), encoding="utf-8")
    tokenizer = tokenizer_of_words()
    found = Calibration.from_text(tokenizer, tmp_path / "text.txt", samples=3, seqlen=20, seed=5)
    ids = tokenize(" ".join(f"w{1 + n % 40}" for n in range(300)), tokenizer)
    assert torch.equal(found.input_ids, calibration_windows(ids, 3, 20, 5).input_ids) and found.input_ids.shape == (
        3,
        20,
    )
    with pytest.raises(InputError, match="one sequence needs 400"):
        Calibration.from_text(tokenizer, tmp_path / "text.txt", seqlen=400)
