"""Numbers as a person reads them."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from llm_surgeon.resources import human_bytes

MISSING = "–"


def percent(fraction: float) -> str:
    """``0.5`` -> ``"50.0%"``."""
    return f"{100 * fraction:.1f}%"


def signed(value: float | None, digits: int = 4) -> str:
    """``0.0123`` -> ``"+0.0123"``; ``None`` -> a dash."""
    return MISSING if value is None else f"{value:+.{digits}f}"


def perplexity_of(loss: float) -> float:
    """``exp(loss)``, infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def two_decimals(value: float) -> str:
    """``27.184`` -> ``"27.18"``; from a million on ``"1.2e+06"``."""
    return f"{value:.2f}" if abs(value) < 1e6 else f"{value:.2g}"


def base_name(path: str) -> str:
    """The last part of a local path: folders of one's own machine are nobody else's concern."""
    return Path(path).absolute().name or path


def published_name(source: str) -> str:
    """``source`` as it may be published: of a path that is one of this machine's only its last part."""
    path = Path(source).expanduser()
    try:
        local = path.is_absolute() or path.exists()
    except (OSError, ValueError):  # too long for a path, or with a zero byte
        local = False
    return base_name(source) if local else source


def command_line(words: list[str]) -> str:
    """A command as it is typed into a shell, of absolute paths the last parts only."""
    parts = [word.rpartition("=") for word in words]
    return shlex.join(
        name + sign + (base_name(value) if Path(value).is_absolute() else value) for name, sign, value in parts
    )


def compact(count: int) -> str:
    """``84934656`` -> ``"84.9 M"``."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        # 999,950 would round to "1000.0 K": it belongs to the next unit.
        if count >= 0.99995 * size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def duration(seconds: float) -> str:
    """``192.3`` -> ``"3 min 12 s"``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plural(count: int, noun: str) -> str:
    """``(5, "shot")`` -> ``"5 shots"``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size_table(sizes: dict[str, dict[str, float]]) -> list[list[str]]:
    """Parameters, multiply-accumulates per token, memory and latency: before, after, their ratio; under a head line."""
    names = {"parameters": "parameters", "macs": "MACs", "bytes": "memory", "seconds": "latency"}
    rows = [["", "before", "after", "ratio"]]
    for key, name in names.items():
        values = [sizes[state][key] for state in ("before", "after")]
        shown = {"bytes": lambda x: human_bytes(int(x)), "seconds": lambda x: f"{1000 * x:.1f} ms"}.get(
            key, lambda x: compact(int(x))
        )
        rows.append([name, *map(shown, values), f"{values[1] / values[0]:.2f}"])
    return rows
