"""Amounts that options name in words."""

import pytest

from llm_surgeon.checks import parse_bytes
from llm_surgeon.errors import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GB", 24 * 10**9),
        ("22.5 GiB", 22.5 * 2**30),
        ("500M", 5 * 10**8),
        ("1024", 1024),
        (4096, 4096),
        ("1kB", 1000),
    ],
)
def test_parse_bytes(text: str | int, expected: float) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "24 parsecs", "-1GB", "1e9"])
def test_no_amount_of_memory(text: str) -> None:
    with pytest.raises(InputError, match="is no amount of memory"):
        parse_bytes(text)
