"""The fit of the times by which csrc/sparse24/linear_2_4.cpp chooses a kernel, on timings of known constants."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.kernels import linear_2_4 as bench
from bench.kernels.linear_2_4_fit import (
    KERNELS,
    Constants,
    Timing,
    errors,
    estimate,
    fit,
    in_force,
    losses,
    read_timings,
    report,
)
from surgeon_kernels.runtime import toolchain
from tests.kernels.sparse24.test_linear_2_4_dispatch import run

ROOT = Path(__file__).parents[3]
CSRC = toolchain.csrc()
TILES = [(192, 32), (128, 64), (192, 64), (128, 128), (192, 128), (128, 256)]  # rows, tokens; of Wgmma24
BLOCKS = 132
CLUSTERS = {1: 132, 2: 66, 3: 43, 4: 29, 5: 23, 6: 18, 8: 14}
KNOWN = Constants(np.array([0.51, 0.395, 0.535, 0.565, 0.79, 0.92]), np.array([2.5, 3.5, 4.0, 3.5, 4.6, 7.0]), 1.7, 2.7)


def timings(shapes, tokens, clusters=CLUSTERS):
    """Every kernel and split that the rule weighs, their times still 0."""
    return [
        Timing(rows, columns, n, kernel, tile_rows, tile_tokens, split, BLOCKS, resident, 0.0)
        for rows, columns in shapes
        for n in tokens
        for kernel, (tile_rows, tile_tokens) in enumerate(TILES)
        if tile_tokens >= 128 or n <= 8 * tile_tokens
        for split, resident in clusters.items()
        if split == 1 or (split <= -(-columns // 128) and -(-rows // tile_rows) * -(-n // tile_tokens) % BLOCKS)
    ]


def timed(known, noise=0.0):
    cases = timings([(4096, 4096), (12288, 4096), (4096, 11008), (5120, 2048)], [32, 64, 128, 256, 512, 1024, 4096])
    factors = np.exp(noise * np.random.default_rng(0).standard_normal(len(cases)))
    return [case._replace(us=us) for case, us in zip(cases, estimate(known, cases) * factors, strict=True)]


def test_an_estimate_by_hand():
    whole = Timing(4096, 4096, 512, 3, 128, 128, 1, 132, 132, 0.0)  # 128 tiles, one wave, 32 units
    assert estimate(KNOWN, [whole]) == pytest.approx(32 * 0.565 + 1.7)
    assert estimate(KNOWN, [whole._replace(tokens=1024)]) == pytest.approx(2 * (32 * 0.565 + 1.7))
    # 256 tiles: 132 in a wave; 124 in five waves of 29 clusters of 4, 8 units a block.
    shared = whole._replace(tokens=1024, split=4, clusters=29)
    assert estimate(KNOWN, [shared]) == pytest.approx(32 * 0.565 + 1.7 + 2.7 + 5 * (8 * 0.565 + 1.7 + 3.5))
    # Fewer tiles than blocks: no first launch. 33 units in 4 parts are 9 of them.
    alone = whole._replace(columns=4104, tokens=128, split=4, clusters=29)
    assert estimate(KNOWN, [alone]) == pytest.approx(2 * (9 * 0.565 + 1.7 + 3.5))


def test_known_constants_are_found():
    found = fit(timed(KNOWN))
    for value, known in zip(found, KNOWN, strict=True):
        assert value == pytest.approx(known, rel=1e-6)
    assert max(errors(timed(KNOWN))) < 1e-9


def test_known_constants_are_found_in_noise():
    noisy = timed(KNOWN, noise=0.03)
    found = fit(noisy)
    assert found.unit == pytest.approx(KNOWN.unit, rel=0.03)
    assert found.cluster == pytest.approx(KNOWN.cluster, rel=0.3)
    assert [found.tile, found.launch] == pytest.approx([1.7, 2.7], rel=0.3)
    left_out = errors(noisy)
    assert 0.01 < left_out.median < 0.04 and left_out.percentile_95 < 0.12  # of noise of 0.03
    assert left_out.mean_loss < 0.05


def test_times_that_no_choice_depends_on_change_nothing():
    slow = [case._replace(us=1000 * case.us) if case.split == 8 else case for case in timed(KNOWN)]
    assert fit(slow).unit == pytest.approx(KNOWN.unit, rel=1e-6)


def test_errors_need_a_shape_to_leave_out():
    one = [case for case in timed(KNOWN) if case.columns == 11008]
    with pytest.raises(ValueError, match="timings of two shapes"):
        errors(one)


def test_rows_of_a_file_are_fitted_without_a_gpu(tmp_path):
    path = tmp_path / "kernels.csv"
    cases = timed(KNOWN)
    lines = [",".join([*Timing._fields, "device"])]
    lines += [",".join([*map(str, case), "a device"]) for case in cases]
    path.write_text("\n".join(lines) + "\n")
    assert read_timings(path) == cases
    command = [sys.executable, "-m", "bench.kernels.linear_2_4", "--fit", path]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == report(cases) + "\n"
    assert "kUnitTime[kWgmmaCount] = {510, 395, 535, 565, 790, 920};" in printed
    assert "kClusterTime[kWgmmaCount] = {2500, 3500, 4000, 3500, 4600, 7000};" in printed
    assert "kTileTime = 1700, kLaunchTime = 2700;" in printed and f"{len(cases)} times" in printed


def test_every_kernel_and_split_is_timed(monkeypatch):
    """With ops that are only pretended: choices 0 to 6 on mma.sp, then Wgmma24 by 7 splits, then the dense product."""
    splits, ran = list(CLUSTERS), []

    def geometry(choice, half):
        kernel, index = choice // 7 - 1, choice % 7
        tile = TILES[kernel] if kernel >= 0 else (64, 8)
        return [] if kernel == 5 else [kernel, *tile, splits[index], CLUSTERS[splits[index]]]

    def run_choice(x, fragments, rows, choice):
        ran.append(choice)
        return None if splits[choice % 7] == 8 else x  # 8 are more than the units

    ops = torch.ops.surgeon_kernels
    monkeypatch.setattr(ops, "linear_2_4_choices", lambda: 7 * (KERNELS + 1) + 1, raising=False)
    monkeypatch.setattr(ops, "linear_2_4_geometry", geometry, raising=False)
    monkeypatch.setattr(ops, "linear_2_4_run", run_choice, raising=False)
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "_ROTATED_BYTES", 1 << 16)
    monkeypatch.setattr(bench, "graph_ms", lambda calls, repetitions: [call() for call in calls] and 0.5)
    # 1 or 2 tiles of 192 rows; 132 tiles of 128 x 128 leave nothing to share.
    found = list(bench.measure_kernels(bench.weight_2_4(256, 512, torch.bfloat16), [64]))
    found += bench.measure_kernels(bench.weight_2_4(128, 512, torch.bfloat16), [128 * 132])
    assert min(ran) == 7 and max(ran) < 7 * KERNELS
    assert all(timing.us == 500 and timing.kernel < 5 and timing.split < 8 for timing in found)
    small = [timing for timing in found if timing.rows == 256]
    assert len(small) == 5 * 6 and small[1] == Timing(256, 512, 64, 0, 192, 32, 2, BLOCKS, 66, 500.0)
    assert [timing.split for timing in found if timing.rows == 128 and timing.kernel == 3] == [1]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_the_source_chooses_by_the_same_estimate(tmp_path):
    toolkit = Path(re.search(r"TOP=(\S+)", run("nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null"))[1])
    program = tmp_path / "dispatch"
    sources = [ROOT / "tests/kernels/sparse24/linear_2_4_dispatch.cpp", CSRC / "sparse24" / "linear_2_4.cpp"]
    run("c++", "-std=c++17", f"-I{toolkit / 'include'}", f"-I{CSRC}", *sources, "-o", program)
    lines = run(program, "choices").splitlines()
    assert len(lines) > 100
    constants = in_force((CSRC / "sparse24" / "linear_2_4.cpp").read_text())
    clusters = {split: 132 if split <= 3 else 118 for split in CLUSTERS}  # of the device that is pretended
    splits = set()
    for rows, columns, tokens, kernel, split in (map(int, line.split()) for line in lines):
        cases = timings([(rows, columns)], [tokens], clusters)
        us = dict(zip([(case.kernel, case.split) for case in cases], estimate(constants, cases), strict=True))
        assert us[kernel, split] == pytest.approx(min(us.values()), rel=1e-5)
        splits.add(split)
    assert len(splits) > 2


def test_the_constants_in_force_are_judged_on_the_rows_on_record():
    timings = read_timings(ROOT / "bench" / "results" / "linear_2_4_kernels.csv")
    constants = in_force((CSRC / "sparse24" / "linear_2_4.cpp").read_text())
    assert len(constants.unit) == len(constants.cluster) == KERNELS
    lost = losses(constants, timings)
    assert np.mean(lost) == pytest.approx(0.0107, abs=1e-4) and max(lost) == pytest.approx(0.2123, abs=1e-4)
    assert np.mean(lost) < errors(timings).mean_loss
