"""Input from outside, at random: read as what it is, or refused in a sentence; never anything else.

``SURGEON_FUZZ_CASES=100000 python -m pytest tests/surgeon/test_fuzz.py`` is the long run; without it about 2,000 cases.
``python -m tests.surgeon.long_runs fuzz`` keeps its totals.
"""

import os
from collections import Counter

import pytest

from tests.surgeon import fuzz_options, fuzz_reports, fuzz_text
from tests.surgeon.fuzz_checkpoints import Folder
from tests.surgeon.fuzz_targets import TARGETS, run
from tests.surgeon.reports import surgeon_report

LONG = int(os.environ.get("SURGEON_FUZZ_CASES", "0"))
# A page takes a second to draw, and a model some tenths to load.
SHORT = {"reports": 100, "checkpoints": 200, "packed checkpoints": 200}


@pytest.mark.parametrize("target", TARGETS)
def test_drawn_at_random(tmp_path, target):
    cases, outcomes = LONG or SHORT.get(target, 500), Counter()
    run(target, tmp_path, cases, outcomes, derandomize=not LONG)
    assert len(outcomes) == 2 and cases * 0.9 <= outcomes.total()


@pytest.mark.parametrize(
    "document, outcome",
    [(b"structure: 2:4\nshots: 3", "options"), (b"shots: 1\nshots: 2", "refused"), (b"\xff\xfe", "refused")],
)
def test_option_files_are_told_apart(tmp_path, document, outcome):
    assert fuzz_options.check(tmp_path, document) == outcome


def test_reports_and_model_cards_are_told_apart(tmp_path):
    assert fuzz_reports.check_report(tmp_path, surgeon_report().to_json().encode()) == "shown"
    assert fuzz_reports.check_report(tmp_path, b"{}") == "refused"
    assert fuzz_reports.check_card("---\nlicense: mit\n---\n# T\n") == "kept"
    assert fuzz_reports.check_card("---\n- mit\n---\n# T\n") == "new"


def test_texts_are_told_apart(tmp_path):
    assert fuzz_text.check(tmp_path, ".jsonl", b'{"text": "a"}') == "text"
    assert fuzz_text.check(tmp_path, ".jsonl", b'{"id": "a"}') == "refused"
    assert fuzz_text.check(tmp_path, ".jsonl", b'{"id": "a"}', "id") == "text"


def test_checkpoints_are_told_apart(tmp_path):
    folder = Folder(tmp_path, packed=True)
    whole = folder.files["model.safetensors"]
    assert folder.check(("model.safetensors", whole)) == "loaded"
    assert folder.check(("model.safetensors", whole[:-1] + bytes([whole[-1] ^ 1]))) == "refused"
    assert folder.check(("config.json", b"{}")) == "refused"
    assert {path.name: path.read_bytes() for path in folder.folder.iterdir()} == folder.files
