"""The fit of the times by which Gram configurations are chosen, on timings of known constants."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from bench.kernels.gram import work
from bench.kernels.gram_fit import Constants, Timing, estimate, fit, in_force, label, losses, read_timings, report
from surgeon_kernels.gram import plan
from surgeon_kernels.gram.plan import CONFIGS, schedule

WIDE, SQUARE = map(label, CONFIGS[9, torch.bfloat16])
KNOWN = Constants({f"bfloat16 {WIDE}": 0.63, f"bfloat16 {SQUARE}": 0.36}, 10.0, 15.0, 4e6)


def timed(noise=0.0):
    found = []
    for tokens in (1024, 2048, 5000, 16384):
        for columns in (2048, 2560, 3072, 4096, 5120, 11008):
            for config in CONFIGS[9, torch.bfloat16]:
                amounts = work(columns, tokens, config, 132)
                found.append(Timing(tokens, columns, "bfloat16", label(config), *amounts, 0.0))
    factors = np.exp(noise * np.random.default_rng(0).standard_normal(len(found)))
    return [timing._replace(us=estimate(KNOWN, timing) * factor) for timing, factor in zip(found, factors, strict=True)]


@pytest.mark.parametrize(("columns", "tokens"), [(4096, 16384), (2048, 2048), (2500, 999), (11008, 4096)])
def test_the_estimate_is_the_plan_s(columns, tokens):
    for config in CONFIGS[9, torch.bfloat16]:
        timing = Timing(tokens, columns, "bfloat16", "this", *work(columns, tokens, config, 132), 0.0)
        known = Constants({"bfloat16 this": config.step}, plan._UNIT_COST, plan._REDUCTION_COST, plan._REDUCTION_BYTES)
        expected = schedule(columns, -(-tokens // config.block_k), config, 132).time
        assert estimate(known, timing) == pytest.approx(expected)


def test_known_constants_are_found():
    found = fit(timed())
    assert found.step == pytest.approx(KNOWN.step) and found.unit == KNOWN.unit
    assert found.launch == pytest.approx(KNOWN.launch) and found.bandwidth == pytest.approx(KNOWN.bandwidth)


def test_known_constants_are_found_in_noise():
    found = fit(timed(noise=0.02))
    assert found.step == pytest.approx(KNOWN.step, rel=0.03) and found.unit == pytest.approx(KNOWN.unit, abs=2)


def test_rows_are_read_and_reported(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [",".join(["commit", *Timing._fields]), *(",".join(map(str, ("abc", *timing))) for timing in timed())]
    path.write_text("\n".join(rows))
    text = report(read_timings(path))
    assert f"step of bfloat16 {WIDE}: 0.63\n" in text and "_UNIT_COST = 10\n_REDUCTION_COST = 15.0\n" in text
    assert "slower than the fastest by 0.0% (mean), 0.0% (worst); by the constants in force 0.0% (mean)" in text


def test_the_constants_in_force_are_judged_on_the_rows_on_record():
    timings = read_timings(Path(__file__).parents[3] / "bench" / "results" / "gram_kernels.csv")
    known = in_force()
    known.step["bfloat16 128x128x64x8x4x1x128"] = known.step[f"bfloat16 {SQUARE}"]  # its runs were added to the output
    lost = losses(known, timings)
    assert len(lost) == 32
    assert np.mean(lost) == pytest.approx(0.0135, abs=1e-4) and max(lost) == pytest.approx(0.2708, abs=1e-4)
