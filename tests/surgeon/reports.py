"""Small reports with known numbers, and a strict reader of the pages made of them."""

import dataclasses
import math
from html.parser import HTMLParser

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.report.schema import HeldOutLoss, LayerReport, PruneReport, ShotReport, SolverTrace

QUERY, DOWN = "self_attn.q_proj", "mlp.down_proj"


def layer(depth: int, kind: str, removed: int, rows: int, columns: int) -> LayerReport:
    return LayerReport(f"model.layers.{depth}.{kind}", kind, depth, rows, columns, rows * columns, removed)


def surgeon_report() -> PruneReport:
    """Two blocks of a 10 x 10 and a 10 x 30 layer, two shots; the last shot's solver took 3, 2 and 0 iterations."""
    layers = [layer(0, QUERY, 20, 10, 10), layer(0, DOWN, 120, 10, 30)]
    layers += [layer(1, QUERY, 60, 10, 10), layer(1, DOWN, 200, 10, 30)]
    names = [each.name for each in layers]
    traces = [
        SolverTrace(names[0], [8.0, 5.0, 4.4, 4.0], gap=0.004),
        SolverTrace(names[1], [3.0, 2.2, 2.0], gap=0.02),
        SolverTrace(names[2], [0.0, 0.0]),  # nothing to remove: no ratio to draw
        SolverTrace(names[3], [1.0]),
    ]
    first = ShotReport(1, 0.25, 0.2501, 1e-6, 3.0, 0.0123, 0.015, {"curvature": 2.0, "update": 0.5})
    second = ShotReport(2, 0.5, 0.5, 2e-6, 3.015, 0.0456, 0.05, {"curvature": 2.5}, traces, {names[1]: 3e-4})
    return PruneReport(
        config=dataclasses.asdict(PruneConfig("unstructured", update="joint", shots=2)),
        versions={"python": "3.11.7", "torch": "2.13.0"},
        model="facebook/opt-125m",
        device="NVIDIA H100",
        parameters=1_234_567,
        started="2026-01-02T03:04:05+00:00",
        seconds=192.3,
        peak_memory_bytes=3 * 2**29,
        layers=layers,
        shots=[first, second],
        evaluation=HeldOutLoss(8, 1024, math.log(27.654), math.log(34.0)),
    )


def magnitude_report() -> PruneReport:
    """A method without passes, and a run that did not even record its shots."""
    report = surgeon_report()
    report.config = dataclasses.asdict(PruneConfig("2:4", method="magnitude"))
    report.shots, report.evaluation, report.peak_memory_bytes = [], None, 0
    return report


class Page(HTMLParser):
    """Collects what the tests ask about, and fails on tags that do not match."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self._element(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self._element(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += " " + " ".join(data.split())
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data.strip()

    def _element(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
