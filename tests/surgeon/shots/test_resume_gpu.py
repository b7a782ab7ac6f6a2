"""Interrupted runs on a GPU go on from their states to the bit, offloaded or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_surgeon import prune
from tests.surgeon.shots.test_resume import HELD_OUT, RUNS, TOKENS, Interrupted, Interrupting, same, weights
from tests.surgeon.tiny_models import build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["2:4", "2:4 in shots", "unstructured", "offload", "rows-columns, fitted", "groups"])
def test_a_run_goes_on_from_its_states_to_the_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    name, options = RUNS[kind]
    wanted = build(name, dtype).cuda()
    whole = Interrupting(tmp_path / "whole")
    report = prune(wanted, TOKENS, held_out=HELD_OUT, checkpoint=whole, **options)
    whole.close()
    assert whole.count > 1
    for most in range(1, whole.count + 1):
        model, states = build(name, dtype).cuda(), Interrupting(tmp_path / str(most), most)
        dense = weights(model)
        if most < whole.count:
            with pytest.raises(Interrupted):
                prune(model, TOKENS, held_out=HELD_OUT, checkpoint=states, **options)
            assert same(weights(model), dense)
        else:
            prune(model, TOKENS, held_out=HELD_OUT, checkpoint=states, **options)
            model = build(name, dtype).cuda()
        states.close()
        states = Interrupting(tmp_path / str(most), resume=True)
        found = prune(model, TOKENS, held_out=HELD_OUT, checkpoint=states, **options)
        assert same(weights(model), weights(wanted)) and states.count == whole.count - most
        assert found.held_out == report.held_out
        states.remove()
