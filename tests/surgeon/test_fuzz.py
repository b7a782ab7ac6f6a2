"""What comes from outside, at random: read as what it is, or refused in a sentence; never anything else.

``SURGEON_FUZZ_CASES=100000 python -m pytest tests/surgeon/test_fuzz.py`` is the long run; without it about 2,000 cases.
``SURGEON_FUZZ_TOTALS=tests/surgeon/fuzz_totals.csv`` adds how many of them had which outcome to that file.
"""

import csv
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_surgeon.packed.checkpoint import pack_checkpoint
from llm_surgeon.report.schema import collect_versions
from tests.surgeon import fuzz_checkpoints, fuzz_options, fuzz_reports, fuzz_text
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.packed_models import build_2_4
from tests.surgeon.reports import surgeon_report

CASES = int(os.environ.get("SURGEON_FUZZ_CASES", "500"))
OUTCOMES: dict[str, Counter[str]] = defaultdict(Counter)


@pytest.fixture(scope="module", autouse=True)
def totals():
    """Outcomes of this module's cases, one row of the file for each kind of input."""
    yield
    if path := os.environ.get("SURGEON_FUZZ_TOTALS"):
        versions = collect_versions()
        with Path(path).open("a", newline="") as file:
            for name, found in sorted(OUTCOMES.items()):
                outcomes = "; ".join(f"{outcome}: {count}" for outcome, count in sorted(found.items()))
                row = [name, found.total(), outcomes, versions["python"], versions["torch"], versions["transformers"]]
                csv.writer(file, lineterminator="\n").writerow(row)


def cases(share=1.0):
    """So many examples, the same ones every time unless a long run is asked for."""
    return settings(
        max_examples=max(1, int(CASES * share)),
        derandomize="SURGEON_FUZZ_CASES" not in os.environ,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def note(name, outcome, allowed):
    assert outcome in allowed
    OUTCOMES[name][outcome] += 1


@cases()
@given(document=fuzz_options.documents)
def test_option_files(tmp_path_factory, document):
    folder = tmp_path_factory.getbasetemp()
    note("option files", fuzz_options.check(folder, document), ("options", "refused"))


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
    note("reports", fuzz_reports.check_report(folder, document), ("shown", "refused"))


@cases()
@given(card=fuzz_reports.cards)
def test_model_cards(card):
    note("model cards", fuzz_reports.check_card(card), ("kept", "new"))


def test_reports_and_model_cards_are_told_apart(tmp_path):
    assert fuzz_reports.check_report(tmp_path, surgeon_report().to_json().encode()) == "shown"
    assert fuzz_reports.check_report(tmp_path, b"{}") == "refused"
    assert fuzz_reports.check_card("---\nlicense: mit\n---\n# T\n") == "kept"
    assert fuzz_reports.check_card("---\n- mit\n---\n# T\n") == "new"


@cases()
@given(file=fuzz_text.documents, field=st.sampled_from([None, None, "text", "messages"]))
def test_texts(tmp_path_factory, file, field):
    folder = tmp_path_factory.getbasetemp()
    note("texts", fuzz_text.check(folder, *file, field), ("text", "refused"))


def test_texts_are_told_apart(tmp_path):
    assert fuzz_text.check(tmp_path, ".jsonl", b'{"text": "a"}') == "text"
    assert fuzz_text.check(tmp_path, ".jsonl", b'{"id": "a"}') == "refused"
    assert fuzz_text.check(tmp_path, ".jsonl", b'{"id": "a"}', "id") == "text"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A 2:4 model in several files, and the same packed."""
    folder = tmp_path_factory.mktemp("models")
    save_folder(folder / "dense", build_2_4("llama", torch.bfloat16), max_shard_size="20KB")
    pack_checkpoint(folder / "dense", folder / "packed")
    return folder


@pytest.mark.parametrize("name", ["dense", "packed"])
def test_model_folders(folders, name):
    """Each case takes a model's loading."""
    for what, fuzz, share in (
        ("configurations and tokenizers", fuzz_checkpoints.fuzz_folder, 0.04),
        ("weights files", fuzz_checkpoints.fuzz_weights, 0.2),
    ):
        found = fuzz(folders / name, cases(share), packed=name == "packed")
        OUTCOMES[f"{what}, {name}"] += found
        assert set(found) <= {"InputError", "UnsupportedModelError", "NumericalError", "loaded"}
        assert found["InputError"] > 0 and (found["loaded"] > 0 or fuzz is fuzz_checkpoints.fuzz_weights)


def test_damage_to_packed_weights_is_told_apart(folders):
    content = (folders / "packed" / "model.safetensors").read_bytes()
    same = fuzz_checkpoints.same_weights(folders / "packed", packed=True)

    def outcomes(drawn):
        return fuzz_checkpoints.fuzz_file(
            folders / "packed", "model.safetensors", drawn, same, cases(0.01), packed=True
        )

    assert set(outcomes(st.just(content))) == {"loaded"}
    assert set(outcomes(st.just(content[:-1] + bytes([content[-1] ^ 1])))) == {"InputError"}
