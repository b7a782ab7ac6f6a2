"""The demo a new user runs first."""

import pytest
import torch
from safetensors.torch import load_file

from llm_surgeon import InputError
from llm_surgeon.demo import run_demo
from llm_surgeon.report.schema import PruneReport


@pytest.mark.slow
def test_the_demo_ranks_the_methods_and_leaves_a_2_4_model(tmp_path):
    results = run_demo(tmp_path / "out")
    assert [result.name for result in results] == ["Dense", "Magnitude", "Wanda", "SparseGPT", "Surgeon"]
    dense, magnitude, wanda, sparsegpt, surgeon = (result.perplexity for result in results)
    assert dense < surgeon < sparsegpt < wanda < magnitude
    assert dense == pytest.approx(21.77, abs=0.02)
    assert surgeon == pytest.approx(27.28, rel=0.02)  # rounding differs a little between machines
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            assert bool(((weight == 0).view(-1, 4).sum(dim=1) == 2).all()), name
            assert weight.dtype == torch.bfloat16
    report = PruneReport.from_json((tmp_path / "out" / "surgeon_report.json").read_text())
    found = report.evaluation
    assert (found.perplexity_before, found.perplexity_after) == pytest.approx((dense, surgeon))


def test_the_demo_does_not_overwrite_a_folder(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InputError):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
