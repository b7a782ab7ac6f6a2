"""The protocol of pretrained models on a tiny one: its windows, its rows, and that none is made twice."""

import csv
import math
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.end_to_end import real_model, trials
from llm_surgeon import prune
from llm_surgeon.checkpoint import load_model
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.tiny_models import VOCABULARY, build

SAMPLES, SEQLEN = 6, 16


@pytest.fixture
def tokens(tmp_path):
    """Texts of which a tiny model knows all tokens, the one for calibration first."""
    draw = np.random.default_rng(7)
    texts = {"c4_train": 400, "wt_test": 70, "c4_test": 50}
    path = tmp_path / "tokens.npz"
    np.savez(path, **{name: draw.integers(0, VOCABULARY, n).astype(np.int32) for name, n in texts.items()})
    return path


def main(monkeypatch, tmp_path, tokens, *more):
    folder = tmp_path / "tiny"
    if not folder.exists():
        save_folder(folder, build("llama"))
    arguments = ["--model", folder, "--tokens", tokens, "--out", tmp_path / "out", "--devices", "cpu"]
    sizes = ["--samples", SAMPLES, "--seqlen", SEQLEN]
    monkeypatch.setattr(sys, "argv", ["real_model.py", *map(str, [*arguments, *sizes, *more])])
    real_model.main()


def rows(tmp_path, name):
    with (tmp_path / "out" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def perplexity_of(model, ids):
    """By one forward pass of all windows."""
    windows = torch.from_numpy(ids.astype(np.int64))[: len(ids) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    return math.exp(F.cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten()))


def test_rows_are_of_the_protocol(monkeypatch, tmp_path, tokens):
    method = "surgeon joint, shots 2"
    main(monkeypatch, tmp_path, tokens, "--structures", "unstructured 40%", "--methods", method, "--seeds", 3)
    dense, pruned = rows(tmp_path, "real_model_trials.csv")
    assert [dense["method"], pruned["method"]] == ["dense", method]
    assert (pruned["windows"], pruned["calibration"], pruned["seed"]) == ("6x16", "c4_train", "3")
    texts = dict(np.load(tokens))
    starts = np.random.default_rng(3).integers(0, len(texts["c4_train"]) - SEQLEN, SAMPLES)
    windows = np.stack([texts["c4_train"][start : start + SEQLEN] for start in starts]).astype(np.int64)
    model, _, _ = load_model(tmp_path / "tiny")
    for name in ("wt_test", "c4_test"):
        assert float(dense[name]) == pytest.approx(perplexity_of(model, texts[name]), abs=1e-3)
    options = {"structure": "unstructured", "sparsity": 0.4, "update": "joint", "shots": 2, "seed": 3}
    report = prune(model, torch.from_numpy(windows), **options)
    for name in ("wt_test", "c4_test"):
        assert float(pruned[name]) == pytest.approx(perplexity_of(model, texts[name]), abs=1e-3)
    increases = [shot.measured_increase for shot in report.shots]
    predicted = [shot.predicted_increase for shot in report.shots]
    loss = report.shots[0].loss_before
    assert float(pruned["loss_before"]) == pytest.approx(loss, abs=1e-4)
    assert float(pruned["loss_after"]) == pytest.approx(loss + sum(increases), abs=1e-4)
    assert float(pruned["predicted_increase"]) == pytest.approx(sum(predicted), abs=1e-4)
    assert (pruned["sparsity"], pruned["shots"], pruned["error"]) == ("0.40000", "2", "")


def test_nothing_is_run_twice_and_the_summary_has_the_means(monkeypatch, tmp_path, tokens, capsys):
    options = ("--structures", "2:4", "--methods", "wanda", "magnitude", "--seeds")
    main(monkeypatch, tmp_path, tokens, *options, 0)
    before = rows(tmp_path, "real_model_trials.csv")
    main(monkeypatch, tmp_path, tokens, *options, 0, 1)
    made = rows(tmp_path, "real_model_trials.csv")
    assert [(row["method"], row["seed"]) for row in made] == [
        ("dense", "0"), ("wanda", "0"), ("magnitude", "0"), ("wanda", "1"),
    ]  # fmt: skip
    assert made[:3] == before
    summary = {row["method"]: row for row in rows(tmp_path, "real_model.csv")}
    assert list(summary) == ["magnitude", "wanda", "dense"]
    of_wanda = [float(row["wt_test"]) for row in made if row["method"] == "wanda"]
    assert float(summary["wanda"]["wt_test"]) == pytest.approx(sum(of_wanda) / 2, abs=1e-3)
    assert summary["wanda"]["seeds"] == "0 1"
    with monkeypatch.context() as patch:
        patch.setattr(real_model, "perplexity", lambda *_: 2.0)
        main(monkeypatch, tmp_path, tokens, *options, 0, "--again")
    assert len(rows(tmp_path, "real_model_trials.csv")) == 7
    (again,) = [row for row in rows(tmp_path, "real_model.csv") if row["method"] == "wanda"]
    assert again["wt_test_by_seed"].split() == ["2.0000", made[3]["wt_test"]]


def test_a_failure_is_a_row_and_is_tried_again(monkeypatch, tmp_path, tokens):
    options = ("--structures", "2:4", "--methods", "wanda", "magnitude", "--seeds", 0)

    def fail(*_, config, **__):
        raise RuntimeError(f"no {config.method}\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(trials, "prune", fail)
        main(monkeypatch, tmp_path, tokens, *options)
    failed = rows(tmp_path, "real_model_trials.csv")[1:]
    assert [row["error"] for row in failed] == ["RuntimeError: no wanda", "RuntimeError: no magnitude"]
    assert [row["wt_test"] for row in failed] == ["", ""]
    assert [row["method"] for row in rows(tmp_path, "real_model.csv")] == ["dense"]
    main(monkeypatch, tmp_path, tokens, *options)
    assert [row["error"] for row in rows(tmp_path, "real_model_trials.csv")][3:] == ["", ""]


def test_pruned_models_are_saved(monkeypatch, tmp_path, tokens):
    options = ("--structures", "groups 30%", "--methods", "taylor1 local, round_to 8", "--seeds", 0)
    main(monkeypatch, tmp_path, tokens, *options, "--save", tmp_path / "saved")
    model, _, _ = load_model(tmp_path / "saved" / "tiny-groups-30-taylor1-local-round_to-8-0")
    row = rows(tmp_path, "real_model_trials.csv")[1]
    assert float(row["c4_test"]) == pytest.approx(perplexity_of(model, np.load(tokens)["c4_test"]), abs=1e-3)
    assert model.num_parameters() < build("llama").num_parameters()


@pytest.mark.slow
def test_two_processes_make_the_same_rows_as_one(monkeypatch, tmp_path, tokens):
    options = ("--structures", "2:4", "--methods", "wanda", "--seeds", 0, 1)
    main(monkeypatch, tmp_path, tokens, *options)
    main(monkeypatch, tmp_path, tokens, *options, "--devices", "cpu", "cpu", "--out", tmp_path / "both")
    one, two = rows(tmp_path, "real_model_trials.csv"), rows(tmp_path, "../both/real_model_trials.csv")
    texts = [{(row["method"], row["seed"]): (row["wt_test"], row["c4_test"]) for row in each} for each in (one, two)]
    assert texts[0] == texts[1] and len(one) == len(two) == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--tokens", "nowhere.npz"), r"there is no file '.*nowhere\.npz'"),
        (("--evaluation", "pile"), r"'.*tokens\.npz' holds c4_train, wt_test, c4_test, and no 'pile'"),
        (("--seqlen", 64), r"'c4_test' has 50 tokens: a window of 64 needs more"),
        (("--methods", "wanda, damp_a -1"), r"damp_a must be .*"),
    ],
)
def test_bad_input_is_refused_in_a_sentence_before_any_trial(monkeypatch, tmp_path, tokens, capsys, options, sentence):
    with pytest.raises(SystemExit) as exit:
        main(monkeypatch, tmp_path, tokens, *options)
    assert exit.value.code == 2
    assert re.fullmatch(sentence, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "out").exists()


def test_rows_of_other_texts_are_refused(monkeypatch, tmp_path, tokens, capsys):
    main(monkeypatch, tmp_path, tokens, "--methods", "magnitude", "--evaluation", "wt_test")
    with pytest.raises(SystemExit):
        main(monkeypatch, tmp_path, tokens, "--methods", "magnitude")
    assert "is of other evaluation texts: choose another --out" in capsys.readouterr().err
