"""Options that reports leave out make no difference."""

import dataclasses

import pytest

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.report.options import with_effect

RUNS = {
    "2:4": {},
    "some dense": {"dense_fraction": 0.2, "dense_by": "none"},
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda", "structure": "unstructured"},
    "sparsegpt": {"method": "sparsegpt", "update": "sequential"},
    "chunked": {"update": "chunked", "gradient_steps": 0, "shots": 2},
    "groups": {"structure": "groups", "uniform": True},
    "groups as they are": {"structure": "groups", "reconstruct": False, "gradient_steps": 0},
    "without": {"swaps": 0, "gradient_steps": 0},
    "corrections": {"structure": "rows-columns", "lora_rank": 4},
    "two terms": {"kron_rank": 2, "gradient_steps": 0},
    "offloaded": {"offload": "cpu", "gradient_steps": 0},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_without_what_is_left_out_is_the_same(name):
    config = PruneConfig(**RUNS[name])
    found = with_effect(dataclasses.asdict(config))
    assert PruneConfig(**found) == config
    assert None not in found.values() and set(found) < set(dataclasses.asdict(config))


def test_what_has_no_effect_is_left_out():
    shown = with_effect(dataclasses.asdict(PruneConfig(method="magnitude", structure="unstructured", samples=4)))
    assert shown == {
        "structure": "unstructured", "method": "magnitude", "sparsity": 0.5, "update": "none", "shots": 1,
        "min_kept": 0.02, "samples": 4, "seed": 0, "compute_dtype": "auto",
    }  # fmt: skip
    shown = with_effect(dataclasses.asdict(PruneConfig(gradient_steps=2)))
    assert {"gradient_target", "residual_weight", "fisher", "tolerance"} <= shown.keys()
    assert not {"sparsity", "lora_steps", "max_correlated", "importance", "min_kept"} & shown.keys()
    assert with_effect({"method": "unknown", "seqlen": None}) == {"method": "unknown"}
