"""Trials of recoveries on a tiny model: what they train on, and their rows."""

import csv
import sys

import numpy as np
import pytest
import torch

from bench.end_to_end import recover
from llm_surgeon import perplexity
from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.data.calibration import Calibration, evaluation_windows
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.half_zero import half_zero
from tests.surgeon.tiny_models import VOCABULARY, build


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr(recover, "HELD_OUT_SEQLEN", 16)
    protocol = recover.Protocol
    monkeypatch.setattr(recover, "Protocol", lambda *first: protocol(*first[:3], 6, 16))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the bench with some arguments; its rows."""
    draw = np.random.default_rng(7)
    lengths = {"c4_train": 400, "wt_train": 900, "wt_test": 70, "c4_test": 50}
    np.savez(tmp_path / "tokens.npz", **{name: draw.integers(0, VOCABULARY, n) for name, n in lengths.items()})
    dense, pruned = (
        save_folder(tmp_path / "dense", build("llama")),
        save_folder(tmp_path / "pruned", half_zero("llama")),
    )

    def running(*arguments, pruned=pruned):
        common = ["--tokens", tmp_path / "tokens.npz", "--out", tmp_path, "--device", "cpu", "--held-out", 2]
        monkeypatch.setattr(sys, "argv", list(map(str, ["recover.py", dense, pruned, *common, *arguments])))
        recover.main()
        with (tmp_path / "recover.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return running


def test_a_row_for_every_trial(run, tmp_path):
    options = "seqlen=16 batch_size=4 patience=100 warmup_steps=0"
    trials = [f"learning_rate=1e-2 {options}", f"learning_rate=1e30 {options}"]
    dense, pruned, good, failed = run("--trials", *trials, "--budget", 640)
    assert [row["trial"] for row in (dense, pruned, good, failed)] == ["dense", "pruned", *trials]
    ids = torch.from_numpy(np.load(tmp_path / "tokens.npz")["c4_test"])
    assert float(dense["other_perplexity"]) == pytest.approx(
        perplexity(build("llama"), evaluation_windows(ids, 16)), rel=1e-4
    )
    assert (good["tokens"], good["trained_on"], good["error"]) == ("640", "c4_train 0.29, wt_train 0.71", "")
    assert float(good["held_out_perplexity"]) > 1 and float(good["perplexity"]) != float(pruned["perplexity"])
    assert "is not a number" in failed["error"] and failed["perplexity"] == ""


def test_models_are_pruned_here_and_kept(run, tmp_path):
    options = '{"structure": "2:4", "method": "magnitude"}'
    rows = run("--save", tmp_path / "kept", "--trials", pruned=options)
    assert [row["pruned"] for row in rows] == ["", "structure 2:4, method magnitude"]
    again = run("--trials", pruned=tmp_path / "kept" / "0")[-1]
    assert again["perplexity"] == rows[-1]["perplexity"]


def test_nothing_held_out_is_trained_on_and_shares_are_kept():
    first, second = torch.arange(1000), torch.arange(5000, 8000)
    text = recover.Text({"a": first, "b": second}, (first, first), Calibration(first[None, :16]))
    config = RecoverConfig(steps=10, batch_size=8, seqlen=16)
    windows, description = text.training(config, 0.75, held_out=4)
    assert description == "a 0.75, b 0.25" and len(windows) == 80
    assert int((windows[:, 0] < 5000).sum()) == 60
    held_out = text.held_out(4)
    assert held_out.flatten().tolist() == list(range(936, 1000))
    assert not set(held_out.flatten().tolist()) & set(windows.flatten().tolist())
