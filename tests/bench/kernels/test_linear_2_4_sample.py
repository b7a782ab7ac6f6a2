"""The random sample on which 2:4 linears are judged, and what is said of it."""

import pytest
import torch

from bench.environment import append_row
from bench.kernels import linear_2_4_sample as module
from bench.kernels.linear_2_4_fit import fit, read_timings
from bench.kernels.linear_2_4_sample import (
    BANDS,
    COUNTS,
    MOST_TOKENS,
    SHAPES,
    Geometry,
    Point,
    Timings,
    Weights,
    candidates,
    measured,
    rough_us,
    sample,
    shapes,
    summary,
)

BLOCKS = 132


@pytest.mark.parametrize("name", ["fit", "check"])
def test_a_sample_is_the_same_every_time_and_has_what_it_promises(name):
    points = sample(name)
    assert points == sample(name) and len(set(points)) == len(points) == SHAPES * COUNTS
    assert len({point[:2] for point in points}) == SHAPES
    for rows, columns, tokens in points:
        assert min(rows, columns) >= 1024 and max(rows, columns) <= 28672 and columns % 64 == 0
        assert 1 <= tokens <= MOST_TOKENS
    for least, most in BANDS:
        assert sum(least <= point.tokens <= most for point in points) > 0.1 * len(points)
    assert sample(name, 3) == [point for at, point in enumerate(points) if at % COUNTS < 3]


def test_the_shapes_that_judge_are_others_than_those_that_tune():
    fit, check = ({point[:2] for point in sample(name)} for name in ("fit", "check"))
    assert not fit & check and fit | check <= set(shapes())
    assert {(6144, 4096), (28672, 4096), (4096, 14336), (3584, 18944), (5120, 5120)} <= set(shapes())


def test_summary_names_least_and_mean_of_every_band_and_the_worst():
    text = summary({Point(1024, 1024, 1): 2.0, Point(1024, 2048, 16): 0.5, Point(4096, 4096, 900): 4.0})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "all tokens: 3 points, min 0.50, geometric mean 1.587"
    assert lines[1] == "1-16 tokens: 2 points, min 0.50, geometric mean 1.000"
    assert lines[2] == "257-1024 tokens: 1 points, min 4.00, geometric mean 4.000"
    assert lines[3].startswith("worst: 1024 x 2048, 16 tokens: 0.50, 1024 x 1024, 1 tokens: 2.00")


def test_points_measured_by_the_same_code_are_known_and_others_are_not(tmp_path):
    path, about = tmp_path / "rows.csv", {"device": "a", "commit": "b"}
    row = {"sample": "fit", "rows": 1024, "columns": 2048, "tokens": 3, "dense_us": "6.00", "us": "4.00"}
    append_row(path, {**row, **about})
    append_row(path, {**row, "tokens": 4, **about, "commit": "c"})
    append_row(path, {**row, "tokens": 5, "sample": "check", **about})
    assert measured(path, about, "fit") == {Point(1024, 2048, 3): 1.5}
    assert measured(tmp_path / "none.csv", about, "fit") == {}


def test_rough_time_of_a_whole_wave_by_hand():
    point, whole = Point(4096, 4096, 1024), Geometry(5, 128, 256, 1, BLOCKS)
    # 128 tiles in a wave of 32 units, each (2 * 512 + 512 + 288) cycles at 1800 a microsecond.
    assert rough_us(point, whole, BLOCKS) == pytest.approx(32 * 1824 / 1800 + 1.7)
    assert rough_us(point._replace(tokens=2048), whole, BLOCKS) == pytest.approx(2 * (32 * 1824 / 1800 + 1.7))
    few = rough_us(Point(28672, 8192, 1), Geometry(-3, 64, 8, 1, 1000), 1000)
    assert few == pytest.approx(28672 * 8192 * 1.125 / 4.3e6)  # the time to read W


def test_candidates_are_the_best_split_of_each_kernel_that_may_be_the_fastest():
    known = {
        0: Geometry(-1, 128, 32, 1, 264),
        1: Geometry(3, 128, 128, 1, BLOCKS),
        2: Geometry(3, 128, 128, 2, 66),
        3: Geometry(5, 128, 256, 1, BLOCKS),
        4: Geometry(5, 128, 256, 2, 66),
    }
    assert set(candidates(Point(4096, 4096, 1024), known, most=2)) == {1, 3}  # 256 tiles, 128 tiles
    assert 0 not in candidates(Point(4096, 4096, 1024), known)  # few tokens alone
    assert 0 in candidates(Point(1024, 4096, 8), known)
    # 32 tiles of a kernel: in half of a wave, they share K.
    assert next(iter(candidates(Point(4096, 4096, 128), known))) == 2


def test_rows_of_kernels_are_those_that_the_fit_reads(monkeypatch, tmp_path, capsys):
    """With times that are only pretended: every candidate that runs, what is chosen by default, and dense."""
    known = {
        7 * kernel + at: Geometry(kernel, rows, tokens, split, 132 // split)
        for kernel, rows, tokens in ((-1, 128, 32), (0, 192, 32), (12, 128, 128))
        for at, split in enumerate((1, 2, 4))
    }

    def us(point, geometry):
        tiles = -(-point.rows // geometry.tile_rows) * -(-point.tokens // geometry.tile_tokens)
        return 3 + tiles * point.columns / 1e5 * (2 + geometry.kernel)

    def measure(point, copies, products):
        chosen = [known[product.keywords["choice"]] for product in products[1:]]
        return Timings(50.0, [40.0, *(us(point, geometry) for geometry in chosen)])

    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "geometries", lambda: known)
    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "weights", lambda r, c: Weights([torch.empty(r, c, device="meta")], [None]))
    monkeypatch.setattr(module, "_by_choice", lambda x, weight, choice: None if choice == 1 else x)
    path = tmp_path / "kernels.csv"
    module.run("fit", 2, 1e9, path, True)
    printed = capsys.readouterr().out
    assert f"fit: {2 * SHAPES} of {2 * SHAPES} points" in printed
    assert f"all tokens: {2 * SHAPES:4} points, min 1.25, geometric mean 1.250" in printed  # of the default choice
    timings = read_timings(path)
    assert {timing.size for timing in timings} == set(sample("fit", 2))
    for timing in timings:
        geometry = Geometry(timing.kernel, timing.tile_rows, timing.tile_tokens, timing.split, timing.clusters)
        assert geometry in known.values() and geometry != known.get(1)
        assert timing[7:] == (132, 132 // timing.split, round(us(timing.size, geometry), 2), 50.0, 40.0, "fit")
    assert fit(timings).kernels.keys() == {timing.kernel for timing in timings}
