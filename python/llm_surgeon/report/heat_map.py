"""Heat map of the predicted loss increase, decoder block by kind of layer: rows and colours of its cells."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llm_surgeon.report.schema import PruneReport

# More kinds, of experts say, are added up by the names that numbers are taken out of.
_MOST_KINDS = 24
# Sizes in pixels: height of a row, width of all cells, and the narrowest and widest cell.
_ROW, _WIDTH, _NARROWEST, _WIDEST = 20, 720, 9, 48


@dataclass(frozen=True)
class Row:
    """Cells of a kind of layer, or of all kinds.

    Attributes:
        share: of the increase of the whole model.
        cells: number of the block, its increase in nats per token, and the opacity of its colour in 0..1.
    """

    name: str
    share: float
    cells: list[tuple[int, float, float]]


@dataclass(frozen=True)
class HeatMap:
    """Rows of kinds in execution order, then one of all; ``worst`` is the darkest cell ``(kind, block, increase)``."""

    rows: list[Row]
    blocks: list[int]
    worst: tuple[str, int, float]

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height of a cell in pixels."""
        return max(_NARROWEST, min(_WIDEST, _WIDTH // len(self.blocks))), _ROW

    @property
    def labelled(self) -> list[int]:
        """Places of blocks whose numbers there is room for."""
        step = -(-28 // self.cell[0])
        return list(range(0, len(self.blocks), step))


def heat_map(report: PruneReport) -> HeatMap | None:
    """The heat map of a report; ``None`` where the parts of layers are not known, or nothing was predicted to be lost.

    Opacity is the square root of an increase over the largest one of its row's sort; a negative increase, which what
    earlier shots were predicted to cost can leave, counts as none.
    """
    increases = report.layer_increases
    known = [layer for layer in report.layers if layer.name in increases]
    names = list(dict.fromkeys(layer.kind for layer in known))
    joined = len(names) > _MOST_KINDS
    table: dict[str, dict[int, float]] = {}
    for layer in known:
        row = table.setdefault(re.sub(r"\d+", "*", layer.kind) if joined else layer.kind, {})
        row[layer.depth] = row.get(layer.depth, 0.0) + increases[layer.name]
    blocks = list(dict.fromkeys(layer.depth for layer in known))
    total = sum(increases.values())
    worst = max(((value, kind, depth) for kind, row in table.items() for depth, value in row.items()), default=None)
    if worst is None or worst[0] <= 0.0 or total <= 0.0:
        return None
    rows = [Row(kind, sum(row.values()) / total, _cells(row, worst[0])) for kind, row in table.items()]
    every = {depth: sum(row.get(depth, 0.0) for row in table.values()) for depth in blocks}
    rows.append(Row("all", 1.0, _cells(every, max(every.values()))))
    return HeatMap(rows, blocks, (worst[1], worst[2], worst[0]))


def _cells(row: dict[int, float], largest: float) -> list[tuple[int, float, float]]:
    return [
        (depth, value, math.sqrt(max(0.0, value) / largest) if largest > 0 else 0.0) for depth, value in row.items()
    ]
