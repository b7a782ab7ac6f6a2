"""Runs of float32 models whose passes multiply in bfloat16."""

import pytest
import torch

from llm_surgeon import prune
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.passes import mean_loss
from tests.surgeon.tiny_models import VOCABULARY, build

TOKENS = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{"update": "joint", "shots": 3}, {"update": "sequential"}])
@pytest.mark.parametrize("around", [False, True])
def test_passes_see_the_weights_of_the_last_update(options, around):
    """Casts of weights are not kept from one update to the next, whatever context the caller is in."""
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        report = prune(model, TOKENS, structure="2:4", compute_dtype="bfloat16", **options)
    losses = [shot.loss_before for shot in report.shots]
    losses.append(losses[-1] + report.shots[-1].measured_increase)
    assert len(set(losses)) == len(losses)
    assert losses[-1] == pytest.approx(mean_loss(model, Calibration(TOKENS), 6), abs=5e-3)
