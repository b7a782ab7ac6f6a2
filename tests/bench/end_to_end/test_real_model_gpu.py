"""The protocol of pretrained models on a GPU, where it is meant to run."""

import pytest
import torch

from tests.bench.end_to_end.test_real_model import main, rows, tokens  # noqa: F401, a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_baselines_run_and_follow_the_cpu(monkeypatch, tmp_path, tokens):  # noqa: F811
    # Labels would be drawn otherwise there, and rounding to 16 bits changes so small a model by a fifth.
    exact = "surgeon sequential, fisher empirical, compute_dtype float32"
    methods = ("sparsegpt", "sparsegpt sequential", "admm", "admm sequential", exact)
    options = ("--structures", "2:4", "unstructured 70%", "--methods", *methods, "--seeds", 0, "--devices")
    main(monkeypatch, tmp_path, tokens, *options, "cpu", "--out", tmp_path / "cpu")
    main(monkeypatch, tmp_path, tokens, *options, "cuda")
    by_device = [rows(tmp_path, name) for name in ("../cpu/real_model_trials.csv", "real_model_trials.csv")]
    assert len(by_device[0]) == 11
    for expected, actual in zip(*by_device, strict=True):
        assert actual["error"] == "" and actual["device"] != "CPU"
        assert (actual["structure"], actual["method"]) == (expected["structure"], expected["method"])
        # Where costs nearly agree other weights may go.
        assert float(actual["c4_test"]) == pytest.approx(float(expected["c4_test"]), rel=0.15)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_share_the_trials(monkeypatch, tmp_path, tokens):  # noqa: F811
    options = ("--structures", "2:4", "--methods", "sparsegpt sequential", "--seeds", 0, 1, 2)
    main(monkeypatch, tmp_path, tokens, *options, "--devices", "cuda:0", "cuda:1")
    made = rows(tmp_path, "real_model_trials.csv")
    assert len(made) == 4 and not any(row["error"] for row in made)
