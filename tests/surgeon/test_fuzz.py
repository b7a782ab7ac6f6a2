"""What comes from outside, at random: read as what it is, or refused in a sentence; never anything else.

``SURGEON_FUZZ_CASES=100000 python -m pytest tests/surgeon/test_fuzz.py`` is the long run; without it about 2,000 cases.
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.surgeon import fuzz_options, fuzz_reports, fuzz_text
from tests.surgeon.reports import surgeon_report

CASES = int(os.environ.get("SURGEON_FUZZ_CASES", "500"))


def cases(share=1.0):
    """So many examples, the same ones every time unless a long run is asked for."""
    return settings(
        max_examples=max(1, int(CASES * share)),
        derandomize="SURGEON_FUZZ_CASES" not in os.environ,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@cases()
@given(document=fuzz_options.documents)
def test_option_files(tmp_path_factory, document):
    folder = tmp_path_factory.getbasetemp()
    assert fuzz_options.check(folder, document) in ("options", "refused")


@pytest.mark.parametrize(
    "document, outcome",
    [(b"structure: 2:4\nshots: 3", "options"), (b"shots: 1\nshots: 2", "refused"), (b"\xff\xfe", "refused")],
)
def test_option_files_are_told_apart(tmp_path, document, outcome):
    assert fuzz_options.check(tmp_path, document) == outcome


@cases(0.1)  # a page takes a second to draw
@given(document=fuzz_reports.reports)
def test_reports(tmp_path_factory, document):
    folder = tmp_path_factory.getbasetemp()
    assert fuzz_reports.check_report(folder, document) in ("shown", "refused")


@cases()
@given(card=fuzz_reports.cards)
def test_model_cards(card):
    assert fuzz_reports.check_card(card) in ("kept", "new")


def test_reports_and_model_cards_are_told_apart(tmp_path):
    assert fuzz_reports.check_report(tmp_path, surgeon_report().to_json().encode()) == "shown"
    assert fuzz_reports.check_report(tmp_path, b"{}") == "refused"
    assert fuzz_reports.check_card("---\nlicense: mit\n---\n# T\n") == "kept"
    assert fuzz_reports.check_card("---\n- mit\n---\n# T\n") == "new"


@cases()
@given(file=fuzz_text.documents, field=st.sampled_from([None, None, "text", "messages"]))
def test_texts(tmp_path_factory, file, field):
    folder = tmp_path_factory.getbasetemp()
    assert fuzz_text.check(folder, *file, field) in ("text", "refused")


def test_texts_are_told_apart(tmp_path):
    assert fuzz_text.check(tmp_path, ".jsonl", b'{"text": "a"}') == "text"
    assert fuzz_text.check(tmp_path, ".jsonl", b'{"id": "a"}') == "refused"
    assert fuzz_text.check(tmp_path, ".jsonl", b'{"id": "a"}', "id") == "text"
