"""Low-rank corrections between shots."""

import math

import pytest
import torch

from llm_surgeon import prune, prune_checkpoint
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import InputError
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.passes import mean_loss
from llm_surgeon.progress import Progress
from llm_surgeon.recovery.correct import correct
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.half_zero import half_zero, text_windows, weights
from tests.surgeon.tiny_models import build

IDS = text_windows(8)


def test_a_correction_lowers_the_loss_moves_linears_alone_and_keeps_their_zeros():
    model = half_zero("opt")
    before, data = weights(model), Calibration(IDS)
    loss = mean_loss(model, data, 8)
    config = PruneConfig(lora_rank=4, lora_steps=8, lora_learning_rate=1e-2)
    correct(model, find_decoder(model), data, config, 1, Progress())
    assert mean_loss(model, data, 8) < loss - 0.1
    linears = {f"{linear.name}.weight" for linear in find_decoder(model).linears}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in linears)
        if name in linears:
            assert torch.equal(parameter == 0, before[name] == 0)
            assert torch.linalg.matrix_rank((parameter - before[name]).detach()) > 4  # masked: no longer of rank 4


def test_padding_is_not_learned_from():
    """Tokens where the mask says padding change nothing."""
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[:, :5] = False
    corrected = []
    for filler in (0, 7):
        model = half_zero("llama")
        data = Calibration(IDS.masked_fill(~mask, filler), mask)
        correct(model, find_decoder(model), data, PruneConfig(lora_rank=2, lora_steps=3), 1, Progress())
        corrected.append(weights(model))
    for name, parameter in corrected[0].items():
        torch.testing.assert_close(parameter, corrected[1][name])


def test_in_a_run_every_shot_is_corrected_and_the_report_says_so():
    options = {"structure": "2:4", "shots": 2}
    plain, corrected = build("llama"), build("llama")
    prune(plain, IDS, **options)
    report = prune(corrected, IDS, **options, lora_rank=3, lora_steps=8, lora_learning_rate=1e-2)
    assert [shot.correction_rank for shot in report.shots] == [3, 6]
    assert "rank so far: 3, 6" in report.summary()
    assert all("correction" in shot.seconds for shot in report.shots)
    assert mean_loss(corrected, Calibration(IDS), 8) < mean_loss(plain, Calibration(IDS), 8) - 0.1
    assert math.isclose(report.sparsity, 0.5)
    for linear in find_decoder(corrected).linears:
        groups = linear.matrix()[:, : linear.columns].unflatten(1, (-1, 4))
        assert int((groups != 0).sum(-1).max()) <= 2


def test_corrections_learn_from_a_text_of_their_own():
    other = (IDS * 7) % 61 + 1  # another order of the tokens
    losses = []
    for data in (None, other):
        model = build("llama")
        options = {"structure": "2:4", "shots": 1, "lora_rank": 4, "lora_steps": 16, "lora_learning_rate": 1e-2}
        prune(model, IDS, **options, correction_data=data)
        losses.append(mean_loss(model, Calibration(other), 8))
    assert losses[1] < losses[0] - 0.3


def test_the_text_of_corrections_is_an_option_of_checkpoints(tmp_path, monkeypatch):
    source = save_folder(tmp_path / "dense", build("llama"))
    for name, seed in (("text", 0), ("other", 1)):
        words = " ".join(f"w{int(token)}" for token in text_windows(40, seed).flatten())
        (tmp_path / f"{name}.txt").write_text(words)
    common = {"calibration": str(tmp_path / "text.txt"), "samples": 8, "seqlen": 16, "device": "cpu", "shots": 1}
    found = []
    monkeypatch.setattr("llm_surgeon.jobs.prune.write_pruned", lambda model, *rest: found.append(weights(model)))
    for data in (None, str(tmp_path / "text.txt"), str(tmp_path / "other.txt")):
        prune_checkpoint(source, tmp_path / "out", **common, lora_data=data, lora_rank=2, lora_steps=2)
    assert all(torch.equal(found[1][name], weight) for name, weight in found[0].items())
    assert not all(torch.equal(found[2][name], weight) for name, weight in found[0].items())
    with pytest.raises(InputError, match="lora_data means nothing without lora_rank"):
        prune_checkpoint(source, tmp_path / "none", **common, lora_data=common["calibration"])
    with pytest.raises(InputError, match="without lora_rank"):
        prune(build("llama"), IDS, correction_data=IDS)


@pytest.mark.parametrize("structure", ["width", "layers"])
def test_structures_without_corrections_refuse_them(structure):
    with pytest.raises(InputError, match=f"lora_rank has no meaning for structure '{structure}'"):
        PruneConfig(structure=structure, lora_rank=2)


@pytest.mark.parametrize("options", [{"lora_rank": -1}, {"lora_rank": 2, "lora_steps": 0}, {"lora_learning_rate": 0.0}])
def test_bad_options(options):
    with pytest.raises(InputError, match=next(iter(options)) if len(options) == 1 else "lora_steps"):
        PruneConfig(**options)
