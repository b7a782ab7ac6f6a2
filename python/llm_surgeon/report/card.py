"""Model cards of what is made from a pruned model: recovered, packed, compacted.

A card is someone's text: its YAML front matter may be damaged, of any type, or hostile. What can be read of it is kept.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llm_surgeon.checkpoint.folder import read_files
from llm_surgeon.report.format import published_name
from llm_surgeon.report.schema import PruneReport

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(?P<yaml>.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_LONGEST_FRONT_MATTER = 100_000  # characters; what is longer is no front matter
_NEW = {"library_name": "transformers", "pipeline_tag": "text-generation"}
# Sections of a card that are about the files.
STORAGE, LOADING = "How it is stored", "How to load it"


class _Loader(yaml.SafeLoader):
    """Safe YAML where ``2:4`` and dates, impossible ones too, are text, and nothing is merged, which can explode."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (declared by the base class)
        first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in ("int", "timestamp", "merge")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+\Z"), list("-+0123456789"))


@dataclass(frozen=True)
class Records:
    """Records in a model's folder of its pruning: README.md and surgeon_report.json, where it has them."""

    card: str | None = None
    report: PruneReport | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Records:
        """The records in ``folder``; a card that is not UTF-8 is read with marks where its bytes are none.

        Raises:
            InputError: surgeon_report.json is damaged, or a file cannot be read.
        """
        path = Path(os.path.expanduser(folder), "surgeon_report.json")
        card = read_files(folder, "README.md").get("README.md")
        return cls(
            None if card is None else card.decode("utf-8", errors="replace"),
            PruneReport.read(path) if path.is_file() else None,
        )

    def followed_by(
        self, what: str, text: str, *, name: str, tags: Iterable[str] = (), loading: str | None = None
    ) -> dict[str, str]:
        """The records of a model that was made from this one, texts by file name.

        README.md says ``text`` first, then what the old card said; surgeon_report.json and report.html, where there was
        a report, list ``text`` as what was done after pruning.

        Args:
            what: was done, "recovered" say: in the title of a new card, and of the new section.
            name: of the model, a path of which the last part is shown, for the title where there was no card.
            tags: new ones for the card.
            loading: Markdown in the place of the old sections on how the model is stored and how to load it.
        """
        from llm_surgeon.report.render import render_html  # brings matplotlib: only where it is needed

        files = {"README.md": extend_card(self.card, what, text, name=name, tags=tags, loading=loading)}
        if self.report is not None:
            sentence = " ".join(text.split())
            report = dataclasses.replace(self.report, history=[*self.report.history, sentence])
            files |= {"surgeon_report.json": report.to_json(), "report.html": render_html(report)}
        return files


def extend_card(
    card: str | None, what: str, text: str, *, name: str, tags: Iterable[str] = (), loading: str | None = None
) -> str:
    """``card`` with new ``tags`` and a section ``text`` under its title; a new card where there is none.

    The text comes first, as what the old card says is true of the model before. Front matter that is no mapping, or
    cannot be read, is left out.
    """
    front, body = split_front_matter(card or "")
    front = front or dict(_NEW)
    front.pop("model-index", None)  # results of the model before
    front["tags"] = list(dict.fromkeys([*clean_tags(front.get("tags")), *tags]))
    if not front["tags"]:
        del front["tags"]
    if not body.strip():
        body = f"# {published_name(name)}, {what}\n"
    if loading is not None:
        body = _without_sections(body, STORAGE, LOADING).rstrip() + f"\n\n## {LOADING}\n\n{loading.strip()}\n"
    title, rest = _split_title(body)
    head = f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n"
    parts = [title.strip(), f"## {what.capitalize()}\n\n{text.strip()}", rest.strip()]
    return head + "\n\n".join(part for part in parts if part) + "\n"


def split_front_matter(card: str) -> tuple[dict[str, Any], str]:
    """The YAML mapping at the head of a model card, empty where there is none that can be read, and the rest."""
    match = _FRONT_MATTER.match(card)
    if match is None:
        return {}, card
    body = card[match.end() :]
    if len(match["yaml"]) > _LONGEST_FRONT_MATTER:
        return {}, body
    try:
        front = yaml.load(match["yaml"], Loader=_Loader)
        yaml.safe_dump(front)  # that it can be written again
        return (front if isinstance(front, dict) else {}), body
    # Deep nesting is a RecursionError, a number of thousands of digits a ValueError.
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}, body


def clean_tags(tags: Any) -> list[str]:
    """The tags of a card as a list of texts, whatever someone wrote there; what is no text or number is left out."""
    several = tags if isinstance(tags, list) else [tags]
    return [str(tag) for tag in several if isinstance(tag, (str, int, float)) and not isinstance(tag, bool)]


def _split_title(body: str) -> tuple[str, str]:
    """The first heading of a text with what stands before it, and what follows; no title where it does not begin so."""
    match = re.match(r"\s*# [^\n]*(?:\n|\Z)", body)
    return (body[: match.end()], body[match.end() :]) if match else ("", body)


def _without_sections(body: str, *headings: str) -> str:
    """``body`` without its sections ``## heading``, up to the next heading of that level outside of a code block."""
    kept, inside, fenced = [], False, False
    for line in body.splitlines(keepends=True):
        if line.startswith("```"):
            fenced = not fenced
        elif line.startswith(("# ", "## ")) and not fenced:
            inside = line.strip() in [f"## {heading}" for heading in headings]
        if not inside:
            kept.append(line)
    return "".join(kept)
