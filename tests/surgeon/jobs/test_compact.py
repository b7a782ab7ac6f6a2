"""A compact checkpoint from one with zero rows and columns."""

import pytest
import torch

from llm_surgeon import InputError, prune
from llm_surgeon.checkpoint import load_model
from llm_surgeon.jobs.compact import compact_checkpoint
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.footprint import model_size
from llm_surgeon.recovery.recover import recover
from llm_surgeon.report.schema import PruneReport
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.tiny_models import VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_checkpoints_are_compacted_and_dense_ones_refused(tmp_path):
    model = build("llama")
    save_folder(tmp_path / "dense", model)
    with pytest.raises(InputError, match="no zero rows or columns"):
        compact_checkpoint(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = prune(model, TOKENS, structure="rows-columns", sparsity=0.4, shots=1)
    save_folder(tmp_path / "zeros", model)
    (tmp_path / "zeros" / "surgeon_report.json").write_text(report.to_json())
    (tmp_path / "zeros" / "README.md").write_text("# T\n\n## How it is stored\n\nas zeros\n")  # not true any more
    found = compact_checkpoint(tmp_path / "zeros", tmp_path / "out")
    sentence = f"{found.after:,} of {found.before:,} weights of its linear layers are left"
    again = PruneReport.read(tmp_path / "out" / "surgeon_report.json")
    assert len(again.history) == 1 and sentence in again.history[0]
    assert sentence in (tmp_path / "out" / "report.html").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert sentence in card and "as zeros" not in card and "trust_remote_code=True" in card
    assert {"seconds_low", "seconds", "seconds_high"} < set(found.sizes["before"]) == set(found.sizes["after"])
    for name, ours in (("before", tmp_path / "zeros"), ("after", tmp_path / "out")):
        parameters = sum(parameter.numel() for parameter in load_model(ours)[0].parameters())
        assert found.sizes[name]["parameters"] == parameters
    with pytest.raises(InputError, match="is compact already"):
        compact_checkpoint(tmp_path / "out", tmp_path / "again")
    loaded, _, _ = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert model_size(loaded, TOKENS)["macs"] == found.sizes["after"]["macs"] < found.sizes["before"]["macs"]
    with pytest.raises(InputError, match="the model is compact: recover"):
        recover(loaded, TOKENS, TOKENS[:2])
    assert found.after < found.before == sum(x.rows * x.columns for x in find_decoder(model).linears)
