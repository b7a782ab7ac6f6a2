"""Cards of recovered, packed and compacted models, made from cards that may hold anything."""

import pytest
import yaml

from llm_surgeon import InputError
from llm_surgeon.report import render
from llm_surgeon.report.card import Records, extend_card, split_front_matter
from llm_surgeon.report.schema import PruneReport
from tests.surgeon.reports import Page, surgeon_report

TEXT = "All weights were trained."


def front(card: str) -> dict:
    start, matter, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter)


def extended(matter: str) -> dict:
    card = extend_card(f"---\n{matter}---\n# T\n\nbody\n", "packed", TEXT, name="m", tags=["2:4"])
    assert card.endswith(f"---\n\n# T\n\n## Packed\n\n{TEXT}\n\nbody\n")
    card.encode("utf-8")
    return front(card)


@pytest.mark.parametrize(
    "tags, expected",
    [
        ("tags: [pruned, sparse]", ["pruned", "sparse", "2:4"]),
        ("tags:", ["2:4"]),
        ("tags: 7", ["7", "2:4"]),
        ("tags: abc", ["abc", "2:4"]),
        ("tags: {a: b}", ["2:4"]),
        ("tags: [{a: b}, c, [d], true, null, 2:4]", ["c", "2:4"]),
    ],
)
def test_tags_of_any_kind_become_a_list_of_texts(tags, expected):
    assert extended(f"license: mit\n{tags}\n") == {"license": "mit", "tags": expected}


def test_dates_and_ratios_stay_text():
    matter = extended("model-index: [a]\ndate: 2020-99-99\nday: 2020-01-02\nratio: 2:4\ncount: 12\ninference: false\n")
    assert matter == {
        "date": "2020-99-99", "day": "2020-01-02", "ratio": "2:4", "count": 12, "inference": False, "tags": ["2:4"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "damaged",
    [
        "a: [\n",
        "- a list\n",
        "tags: " + "[" * 20_000 + "\n",
        "? [a]\n: b\n",
        "n: " + "9" * 5000 + "\n",
        "x: y\n" * 30_000,
    ],
    ids=["syntax", "list", "deep", "key", "digits", "long"],
)
def test_front_matter_that_cannot_be_read_is_left_out(damaged):
    assert extended(damaged) == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["2:4"]}


def test_merges_do_not_explode():
    bomb = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
    )
    assert "x" not in extended(bomb)


def test_a_text_without_front_matter_is_all_body():
    assert split_front_matter("# Title\n---\n") == ({}, "# Title\n---\n")
    assert split_front_matter("---\r\na: b\r\n---\r\nbody") == ({"a": "b"}, "body")
    assert split_front_matter("\ufeff---\n---\nbody") == ({}, "body")


def test_a_model_without_a_card_gets_one(tmp_path):
    card = extend_card(None, "packed", TEXT, name=str(tmp_path / "llama"))
    assert card == (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# llama, packed\n\n## Packed\n\n{TEXT}\n"
    )


def test_the_section_on_loading_is_replaced():
    old = render.render_model_card(surgeon_report(), "facebook/opt-125m")
    card = extend_card(old, "packed", TEXT, name="m", loading="```python\nimport llm_surgeon\n# no heading\n```")
    assert card.count("## How to load it") == 1 and card.count("from_pretrained") == 0
    assert card.endswith("## How to load it\n\n```python\nimport llm_surgeon\n# no heading\n```\n")
    assert card.index("# facebook/opt-125m, 50.0% pruned") < card.index("## Packed") < card.index("## What was removed")
    assert "## How it was made" in card and front(card)["base_model"] == "facebook/opt-125m"


def test_records_of_what_was_made_from_a_pruned_model(tmp_path):
    (tmp_path / "README.md").write_bytes("# T\n\ncaf\xe9\n".encode("latin-1"))
    (tmp_path / "surgeon_report.json").write_text(surgeon_report().to_json(), encoding="utf-8")
    files = Records.read(tmp_path).followed_by("recovered", TEXT, name="m")
    assert set(files) == {"README.md", "surgeon_report.json", "report.html"}
    assert f"# T\n\n## Recovered\n\n{TEXT}\n\ncaf\ufffd\n" in files["README.md"]
    again = Records(files["README.md"], PruneReport.from_json(files["surgeon_report.json"]))
    files = again.followed_by("packed", "It was\npacked.", name="m")
    assert PruneReport.from_json(files["surgeon_report.json"]).history == [TEXT, "It was packed."]
    page = Page(files["report.html"])
    assert page.text.index(TEXT) < page.text.index("It was packed.")
    assert files["README.md"].index("## Packed") < files["README.md"].index("## Recovered")


def test_a_model_without_records_gets_a_card_alone(tmp_path):
    assert set(Records.read(tmp_path).followed_by("packed", TEXT, name="m")) == {"README.md"}
    assert set(Records.read(tmp_path / "a hub id").followed_by("packed", TEXT, name="m")) == {"README.md"}


def test_a_damaged_report_is_refused_before_anything_is_made_of_it(tmp_path):
    (tmp_path / "surgeon_report.json").write_text("{")
    with pytest.raises(InputError, match=r"surgeon_report\.json' is damaged"):
        Records.read(tmp_path)
