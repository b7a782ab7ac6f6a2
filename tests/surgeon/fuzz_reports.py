"""Random reports and model cards: every report is shown, or refused in a sentence; every card can be extended."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from llm_surgeon import InputError
from llm_surgeon.data.record import DataRecord
from llm_surgeon.report import render
from llm_surgeon.report.card import extend_card
from llm_surgeon.report.schema import GradientStep, HeldOutLoss, PruneReport
from tests.surgeon.reports import surgeon_report


def _example() -> dict[str, Any]:
    """A report with something in every field."""
    report = surgeon_report()
    report.held_out, report.warnings, report.history = HeldOutLoss(4, 400, 3.0, 3.5), ["a"], ["b"]
    report.command, report.revision = ["surgeon", "prune", "a", "b"], "c0ffee"
    report.data = {"calibration": DataRecord("c4", "calibration", "ab", 100, 4, 3, 16, "text", "plain")}
    report.shots[0].gradient_steps, report.shots[1].correction_rank = [GradientStep(0.1, 3.0, 2.9)], 4
    names = ("parameters", "macs", "bytes", "seconds", "seconds_low", "seconds_high")
    report.sizes = {state: dict.fromkeys(names, 2.0) for state in ("before", "after")}
    found: dict[str, Any] = json.loads(report.to_json())
    return found


_EXAMPLE = _example()


def _places(value: Any, where: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [where, *(place for key, part in parts for place in _places(part, (*where, key)))]


_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.sampled_from([1e30, -1e30, 1e-300, 2**63 - 1, 2**63]),
    st.text(st.characters(), max_size=8),
)
_values = st.recursive(
    _scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=6
)
_changes = st.lists(
    st.tuples(st.sampled_from(_places(_EXAMPLE)[1:]), st.sampled_from(["set", "drop", "repeat"]), _values), max_size=4
)


def _changed(changes: list[tuple[tuple[str | int, ...], str, Any]]) -> str:
    data = copy.deepcopy(_EXAMPLE)
    for place, how, value in changes:
        parent = data
        try:
            for key in place[:-1]:
                parent = parent[key]  # type: ignore[index]
            if how == "set":
                parent[place[-1]] = value  # type: ignore[index]
            elif how == "drop":
                del parent[place[-1]]  # type: ignore[arg-type]
            else:
                parent[place[-1]] = [parent[place[-1]]] * 2  # type: ignore[index]
        except (LookupError, TypeError):
            continue  # an earlier change took it away
    return json.dumps(data)


def _cut(text: str, cut: int) -> str:
    return text[: cut % len(text)]


_odd = st.sampled_from(["[" * 100_000, '{"a":' * 50_000, '{"schema_version": 1}', '{"a": 1e999}', "9" * 5000, "null"])
# Texts of surgeon_report.json: a whole report changed in a few places, cut short, or anything at all.
reports = st.one_of(
    _changes.map(_changed),
    st.builds(_cut, _changes.map(_changed), st.integers(0, 10**5)),
    _odd,
    st.text(max_size=60),
).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=60)


def check_report(folder: Path, document: bytes) -> str:
    """Read ``document`` as a report and show it; what became of it: "shown" or "refused".

    Raises:
        AssertionError: it is not the same after a round trip, or cannot be written; any other exception than
            :class:`InputError` passes, as the fault that it is.
    """
    path = folder / "surgeon_report.json"
    path.write_bytes(document)
    try:
        report = PruneReport.read(path)
    except InputError as error:
        assert str(error) and "\n" not in str(error)
        return "refused"
    assert PruneReport.from_json(report.to_json()) == report
    card = render.render_model_card(report, "a/b")
    for text in (report.to_json(), report.summary(), card, render.render_html(report)):
        text.encode("utf-8")
    assert isinstance(yaml.safe_load(card.split("---\n", 2)[1]), dict)
    return "shown"


_yaml_lines = st.one_of(
    st.sampled_from(
        ["tags:", "tags: 7", "tags: abc", "tags: {a: b}", "tags: [2:4, {a: b}, [c], true]", "tags: !!set {a, b}"]
    ),
    st.sampled_from(["date: 2020-99-99", "date: 2020-01-01", "x: 0x" + "f" * 5000, "n: " + "9" * 5000, '"\\ud800": 1']),
    st.sampled_from(["a: &a [*a]", "b: {<<: [*a, *a]}", "? [a]\n: b", "t: !!binary aGk=", "- a", "x: " + "[" * 600]),
    st.tuples(st.text(max_size=8), st.text(max_size=12)).map(": ".join),
)
_bodies = st.lists(
    st.one_of(
        st.sampled_from(["# T", "## How to load it", "## How it is stored", "```", "---", "text", "## End", ""]),
        st.text(max_size=12),
    ),
    max_size=8,
).map("\n".join)


def _card(lines: list[str], body: str, newline: str) -> str:
    return "\n".join(["---", *lines, "---", body]).replace("\n", newline)


# Model cards: lines of front matter and of a body, or any text at all.
cards = st.builds(_card, st.lists(_yaml_lines, max_size=4), _bodies, st.sampled_from(["\n", "\r\n"])) | st.text(
    max_size=60
)


def check_card(card: str) -> str:
    """Extend ``card``, twice; what became of its front matter: "kept" or "new".

    Raises:
        AssertionError: the new card's front matter is no mapping with the tags, or the text is not in it.
    """
    once = extend_card(card, "packed", "What was done.", name="m", tags=["2:4"], loading="Like this.")
    twice = extend_card(once, "recovered", "And then.", name="m", tags=["x"])
    for text, tags, done in ((once, ["2:4"], "## Packed\n\nWhat was done."), (twice, ["2:4", "x"], "## Recovered")):
        text.encode("utf-8", "surrogatepass")
        start, matter, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
        assert start == "" and done in body
        front = yaml.safe_load(matter)
        assert front["tags"][-len(tags) :] == tags or set(tags) <= set(front["tags"])
        assert all(isinstance(tag, str) for tag in front["tags"])
    assert once.count("\n## How to load it\n\nLike this.\n") == 1
    return "new" if "library_name: transformers" in once else "kept"
