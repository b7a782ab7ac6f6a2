"""The fit of the times by which csrc/sparse24/linear_2_4.cpp chooses a kernel, on timings of known constants."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.kernels import linear_2_4_fit as module
from bench.kernels.linear_2_4_fit import (
    HEADER,
    KERNELS,
    MMA,
    RECORD,
    Constants,
    Times,
    Timing,
    estimate,
    fit,
    in_force,
    lean,
    losses,
    losses_left_out,
    read_timings,
    report,
    source,
    written,
)
from surgeon_kernels.runtime import toolchain
from tests.kernels.sparse24.test_linear_2_4_dispatch import run

ROOT = Path(__file__).parents[3]
CSRC = toolchain.csrc()
TILES = {-1: (128, 32), 0: (192, 32), 1: (128, 64), 12: (128, 128), 13: (192, 128), 19: (128, 256)}  # rows, tokens
BLOCKS = {-1: 264, 0: 132, 1: 132, 12: 132, 13: 132, 19: 132}
CLUSTERS = {1: 132, 2: 66, 3: 43, 4: 29, 6: 18, 8: 14}
KNOWN = Constants(
    {
        -1: Times(0.7, 1.2, 0.9),
        0: Times(0.51, 1.7, 2.5),
        1: Times(0.395, 1.5, 3.5),
        12: Times(0.565, 1.9, 3.5),
        13: Times(0.79, 2.0, 4.6),
        19: Times(0.92, 2.6, 7.0),
    },
    2.7,
)


def timings(shapes, tokens):
    """Every kernel and split that the rule weighs, their times still 0."""
    return [
        Timing(rows, columns, n, kernel, *TILES[kernel], split, BLOCKS[kernel], resident * BLOCKS[kernel] // 132, 0.0)
        for rows, columns in shapes
        for n in tokens
        for kernel, (tile_rows, tile_tokens) in TILES.items()
        if tile_tokens >= 128 or n <= 8 * tile_tokens
        for split, resident in CLUSTERS.items()
        if split == 1 or (split <= -(-columns // 128) and -(-rows // tile_rows) * -(-n // tile_tokens) % BLOCKS[kernel])
    ]


def timed(known, noise=0.0):
    """With a launch, a norm, and the time to read W."""
    cases = timings(
        [(4096, 4096), (12288, 4096), (4096, 11008), (5120, 2048), (8192, 3072), (2048, 8192), (28672, 8192)],
        [2, 20, 48, 64, 100, 128, 256, 400, 512, 1024, 4096],
    )
    factors = np.exp(noise * np.random.default_rng(0).standard_normal(len(cases)))
    a = estimate(known, cases)
    memory = np.array([case.rows * case.columns * 1.125 / 4e6 for case in cases])
    norm = np.array([case.tokens * case.columns for case in cases]) * 1e-6
    return [
        case._replace(us=us, dense_us=100.0, default_us=80.0)
        for case, us in zip(cases, (1.2 + norm + (a**4 + memory**4) ** 0.25) * factors, strict=True)
    ]


def test_an_estimate_by_hand():
    whole = Timing(4096, 4096, 512, 12, 128, 128, 1, 132, 132, 0.0)  # 128 tiles, one wave, 32 units
    assert estimate(KNOWN, [whole]) == pytest.approx(32 * 0.565 + 1.9)
    assert estimate(KNOWN, [whole._replace(tokens=1024)]) == pytest.approx(2 * (32 * 0.565 + 1.9))
    # 256 tiles: 132 in a wave; 124 in five waves of 29 clusters of 4, 8 units a block.
    shared = whole._replace(tokens=1024, split=4, clusters=29)
    assert estimate(KNOWN, [shared]) == pytest.approx(32 * 0.565 + 1.9 + 2.7 + 5 * (8 * 0.565 + 1.9 + 3.5))
    # Fewer tiles than blocks: no first launch. 33 units in 4 parts are 9 of them.
    alone = whole._replace(columns=4104, tokens=128, split=4, clusters=29)
    assert estimate(KNOWN, [alone]) == pytest.approx(2 * (9 * 0.565 + 1.9 + 3.5))
    # On mma.sp all tiles share K: 32 of them, in two waves of 29 clusters.
    few = Timing(4096, 4096, 32, -1, 128, 32, 4, 264, 29, 0.0)
    assert estimate(KNOWN, [few]) == pytest.approx(2 * (8 * 0.7 + 1.2 + 0.9))
    assert estimate(KNOWN, [few._replace(split=1)]) == pytest.approx(32 * 0.7 + 1.2)
    assert estimate(Constants({0: Times(1, 1, 1)}, 1.0), [whole, whole._replace(kernel=0)])[0] == np.inf


def test_known_constants_are_found():
    cases = timed(KNOWN)
    found = fit(cases)
    assert sorted(found.kernels) == sorted(KNOWN.kernels)
    for kernel, times in KNOWN.kernels.items():
        assert found.kernels[kernel].unit == pytest.approx(times.unit, rel=0.1)
    relevant = [case for case in cases if case.us < 2 * min(other.us for other in cases if other.size == case.size)]
    errors = np.abs(estimate(found, relevant) / estimate(KNOWN, relevant) - 1)
    assert np.median(errors) < 0.02 and np.percentile(errors, 95) < 0.1
    lost = [*losses(found, cases).values()]
    assert np.mean(lost) < 0.002 and max(lost) < 0.05


def test_known_constants_are_found_in_noise():
    noisy = timed(KNOWN, noise=0.03)
    found = fit(noisy)
    for kernel, times in KNOWN.kernels.items():
        assert found.kernels[kernel].unit == pytest.approx(times.unit, rel=0.1)
    left_out = losses_left_out(noisy)
    assert left_out.keys() == {case.size for case in noisy}
    assert np.mean([*left_out.values()]) < 0.04  # of noise of 0.03, and the least of many


def test_times_that_no_choice_depends_on_change_nothing():
    slow = [case._replace(us=1000 * case.us) if case.split == 8 else case for case in timed(KNOWN)]
    assert fit(slow).kernels[12].unit == pytest.approx(KNOWN.kernels[12].unit, rel=0.05)


def test_losses_by_hand():
    one = Timing(4096, 4096, 512, 12, 128, 128, 1, 132, 132, 20.0)
    cases = [one, one._replace(kernel=13, tile_rows=192, us=15.0), one._replace(tokens=256, us=10.0)]
    constants = Constants({12: Times(0.1, 1, 1), 13: Times(10, 1, 1)}, 1.0)
    assert losses(constants, cases) == {one.size: pytest.approx(1 / 3), cases[2].size: 0.0}
    without = Constants({13: Times(10, 1, 1)}, 1.0)
    assert losses(without, cases) == {one.size: 0.0, cases[2].size: np.inf}


def test_a_kernel_that_saves_nothing_is_left_out():
    cases = timed(KNOWN)
    twins = [case._replace(kernel=5, us=1.001 * case.us) for case in cases if case.kernel == 12]
    constants = Constants({**KNOWN.kernels, 5: KNOWN.kernels[12]}, KNOWN.launch)
    found = lean(constants, cases + twins)
    assert 5 not in found.kernels and {1, 12, 13} <= found.kernels.keys()
    assert np.mean([*losses(found, cases).values()]) < 0.005
    only = [case for case in cases if case.kernel == 0]
    assert lean(KNOWN, only).kernels == {0: KNOWN.kernels[0]}


def test_losses_left_out_need_shapes_to_leave_out():
    one = [case for case in timed(KNOWN) if case.columns == 11008]
    with pytest.raises(ValueError, match="timings of two shapes"):
        losses_left_out(one)


def test_rows_of_a_file_are_fitted_without_a_gpu_and_rows_to_check_only_judge(tmp_path):
    path = tmp_path / "kernels.csv"
    cases = timed(KNOWN)
    check = [case._replace(sample="check", us=2 * case.us) for case in cases if case.columns == 4096]
    lines = [",".join([*Timing._fields, "device"])]
    lines += [",".join([*map(str, case), "a device"]) for case in cases + check]
    path.write_text("\n".join(lines) + "\n")
    assert read_timings(path) == cases + check
    command = [sys.executable, "-m", "bench.kernels.linear_2_4_fit", path]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    constants = lean(fit(cases), cases)
    assert printed == report(constants, cases + check) + "\n"
    assert printed.startswith(source(constants, cases)) and f"{len(cases)} times" in printed
    assert "sizes to check: 0." in printed and printed.count("22 points") == 1
    assert "default choice when these were timed\n" in printed and "geometric mean 1.250" in printed


def test_what_is_written_is_what_is_in_force(monkeypatch, tmp_path):
    cases, path, header = timed(KNOWN), tmp_path / "rows.csv", tmp_path / "times.h"
    header.write_text(HEADER.read_text())
    text = written(HEADER.read_text(), KNOWN, cases)
    assert in_force(text).launch == 2.7 and in_force(text).kernels.keys() == KNOWN.kernels.keys()
    for kernel, times in in_force(text).kernels.items():
        assert times == pytest.approx(KNOWN.kernels[kernel])
    assert written(text, KNOWN, cases) == text and "constexpr int kFewTokens = 0;" in text
    assert text.split("// clang-format off")[0] == HEADER.read_text().split("// clang-format off")[0]
    assert "constexpr int kFewTokens = 16;" in source(KNOWN, [case for case in cases if case.tokens > 16])
    with pytest.raises(ValueError, match="29 rows for 30 kernels"):
        in_force(text.replace("    {0, 0, 0},\n", "", 1))

    fields = [*Timing._fields]
    path.write_text("\n".join([",".join(fields), *(",".join(map(str, case)) for case in cases)]) + "\n")
    monkeypatch.setattr(module, "HEADER", header)
    monkeypatch.setattr(sys, "argv", ["fit", str(path), "--write"])
    module.main()
    assert header.read_text() == written(HEADER.read_text(), lean(fit(cases), cases), cases)


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    """Lines that the dispatch prints of a device that is only pretended, by their first word."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    toolkit = Path(re.search(r"TOP=(\S+)", run("nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null"))[1])
    program = tmp_path_factory.mktemp("program") / "dispatch"
    sources = [ROOT / "tests/kernels/sparse24/linear_2_4_dispatch.cpp", CSRC / "sparse24" / "linear_2_4.cpp"]
    run("c++", "-std=c++17", f"-I{toolkit / 'include'}", f"-I{CSRC}", *sources, "-o", program)
    lines = [line.split() for line in run(program, "choices").splitlines()]
    return {
        word: [tuple(map(int, line[1:])) for line in lines if line[0] == word] for word in ("kernel", "run", "choice")
    }


def test_the_source_chooses_by_the_same_estimate(choices):
    constants = in_force(HEADER.read_text())
    tiles_of = {(kernel, split): tile for kernel, *tile, split, _ in choices["kernel"]}
    resident = {(kernel, split): clusters for kernel, _, _, split, clusters in choices["kernel"]}
    running = {}
    for *size, kernel, split in choices["run"]:
        tile_rows, tile_tokens = tiles_of[kernel, split]
        blocks, clusters = resident[kernel, 1], resident[kernel, split]
        tiles = -(-size[0] // tile_rows) * -(-size[2] // tile_tokens)
        if split == 1 or kernel < 0 or tiles % blocks:
            case = Timing(*size, kernel, tile_rows, tile_tokens, split, blocks, clusters, 0.0)
            running.setdefault(tuple(size), []).append(case)
    assert len(choices["choice"]) > 100
    splits = set()
    for *size, kernel, split in choices["choice"]:
        cases = running[tuple(size)]
        us = dict(zip([(case.kernel, case.split) for case in cases], estimate(constants, cases), strict=True))
        assert us[kernel, split] == pytest.approx(min(us.values()), rel=1e-5)
        splits.add(split)
    assert len(splits) > 2


def test_the_tiles_that_the_test_pretends_are_those_of_the_source(choices):
    """Tokens, consumers of 64 rows and, last of seven, blocks that share x, in the order of the files."""
    found = []
    for part in ("narrow", "middle", "wide", "shared"):
        text = (CSRC / "sparse24" / f"linear_2_4_wgmma_{part}.cu").read_text()
        for numbers in re.findall(r"wgmma_kernel<(.*?)>", text):
            tokens, consumers, *rest = map(int, numbers.split(","))
            found.append((64 * consumers * (rest[4] if len(rest) > 4 else 1), tokens))
    pretended = [line[1:3] for line in choices["kernel"] if line[0] >= 0 and line[3] == 1]
    assert len(found) == KERNELS and found == pretended
    assert sum(line[0] < 0 and line[3] == 1 for line in choices["kernel"]) == MMA


def test_the_header_says_what_the_constants_in_force_lose_on_the_rows_on_record():
    timings = [timing for timing in read_timings(RECORD) if timing.sample == "fit"]
    header = HEADER.read_text()
    lost = losses(in_force(header), timings).values()
    mean, worst = re.findall(r"kernels\s(?:// )?(\S+)% slower than the fastest \(mean; (\d+)% worst\)", header)[0]
    assert f"{100 * np.mean([*lost]):.1f}" == mean and f"{100 * max(lost):.0f}" == worst
