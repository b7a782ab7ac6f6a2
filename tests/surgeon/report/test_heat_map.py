"""The heat map carries the report's predicted increases."""

import pytest

from llm_surgeon.report.heat_map import heat_map
from llm_surgeon.report.render import render_html
from tests.surgeon.reports import DOWN, QUERY, Page, layer, surgeon_report


def report_with(*increases):
    report = surgeon_report()
    report.shots[0].layer_increases = {layer.name: value for layer, value in zip(report.layers, increases, strict=True)}
    return report


def test_cells_are_the_increases_of_all_shots_and_shares_those_of_kinds():
    report = report_with(0.01, 0.02, 0.03, 0.02)
    report.shots[1].layer_increases = {report.layers[3].name: 0.02}
    found = heat_map(report)
    assert (found.blocks, found.worst) == ([0, 1], (DOWN, 1, 0.04))
    assert [(row.name, row.share) for row in found.rows] == [
        (QUERY, pytest.approx(0.4)), (DOWN, pytest.approx(0.6)), ("all", 1.0),
    ]  # fmt: skip
    assert [value for row in found.rows for _, value, _ in row.cells] == pytest.approx(
        [0.01, 0.03, 0.02, 0.04, 0.03, 0.07]
    )
    opacities = [opacity for row in found.rows for *_, opacity in row.cells]
    assert opacities == pytest.approx([0.5, 0.75**0.5, 0.5**0.5, 1.0, (3 / 7) ** 0.5, 1.0])
    page = Page(render_html(report))
    assert f"{DOWN}, block 1: +0.04000" in page.text and "0.1 nats per token in all" in " ".join(page.text.split())
    assert ("fill-opacity", "0.87") in page.attributes


def test_what_lowers_the_loss_has_no_colour():
    found = heat_map(report_with(-0.01, 0.02, 0.03, 0.02))
    assert found.rows[0].cells[0] == (0, -0.01, 0.0)


def test_many_kinds_are_added_up_by_what_is_no_number():
    report = surgeon_report()
    report.layers = [layer(depth, f"experts.{expert}.up", 1, 2, 2) for depth in range(2) for expert in range(30)]
    report.shots[0].layer_increases = {each.name: 0.5 for each in report.layers}
    rows = heat_map(report).rows
    assert [(row.name, [value for _, value, _ in row.cells]) for row in rows] == [
        ("experts.*.up", [15.0, 15.0]), ("all", [15.0, 15.0]),
    ]  # fmt: skip


def test_every_block_has_room_and_some_a_number():
    report = surgeon_report()
    report.layers = [layer(depth, QUERY, 1, 2, 2) for depth in range(126)]
    report.shots[0].layer_increases = {each.name: 0.5 for each in report.layers}
    found = heat_map(report)
    assert found.cell == (9, 20) and found.labelled == list(range(0, 126, 4))


def test_there_is_none_where_nothing_is_known_or_lost():
    assert heat_map(surgeon_report()) is None
    assert heat_map(report_with(0.0, 0.0, 0.0, 0.0)) is None
    assert "<rect" not in render_html(surgeon_report()).split("<svg")[0]
