"""Rows of results are appended to files that have their columns."""

import pytest

from bench.environment import append_row


def test_rows_of_other_columns_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    append_row(path, {"a": 1, "b": "x, y"})
    append_row(path, {"a": 2, "b": None})
    assert path.read_text() == 'a,b\n1,"x, y"\n2,\n'
    with pytest.raises(SystemExit, match=r"rows\.csv has the columns a, b, not those of the new row: b, a$"):
        append_row(path, {"b": 1, "a": 2})
    assert len(path.read_text().splitlines()) == 3
