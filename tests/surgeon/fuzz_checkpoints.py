"""Damage to checkpoint folders, drawn by hypothesis: a damaged folder is refused in one sentence, or loads as it was.

Each ``fuzz_...`` draws damages by the settings ``cases``, raises for the first one that is met with another exception
than :class:`SurgeonError` or, where checksums must tell, passes unseen, and returns how many cases had which outcome.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from llm_surgeon import SurgeonError
from llm_surgeon.checkpoint import load_model

# What a value of a configuration may be replaced by.
_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [-1, 0, 1, 3, 2**31, 2**63, 10**30, 1e308, float("inf"), float("nan"), "", "x", "é\n", [], {}, [[]]]
    ),
    st.integers(-(10**9), 10**9),
    st.recursive(
        st.none() | st.integers(0, 9) | st.text(max_size=3),
        lambda x: st.lists(x) | st.dictionaries(st.text(max_size=3), x),
    ),
)


def damages(content: bytes, end: int | None = None) -> st.SearchStrategy[bytes]:
    """``content`` with a bit flipped, cut short, with bytes put in, or with bytes replaced, up to byte ``end``."""
    places = st.integers(0, max(0, (end or len(content)) - 1))
    few = st.binary(min_size=1, max_size=8)
    return st.one_of(
        st.builds(
            lambda at, bit: content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :],
            places,
            st.integers(0, 7),
        ),
        st.builds(lambda at: content[:at], places),
        st.builds(lambda at, new: content[:at] + new + content[at:], places, few),
        st.builds(lambda at, new: content[:at] + new + content[at + len(new) :], places, few),
    )


def odd_json(content: Any) -> st.SearchStrategy[bytes]:
    """JSON ``content`` with one value, at any depth, replaced by an odd one or left out."""
    paths: list[tuple[Any, ...]] = []

    def walk(part: Any, path: tuple[Any, ...]) -> None:
        if path:
            paths.append(path)
        for key, value in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
            walk(value, (*path, key))

    def changed(path: tuple[Any, ...], odd: Any, drop: bool) -> bytes:
        whole = json.loads(json.dumps(content))
        part = whole
        for key in path[:-1]:
            part = part[key]
        if drop:
            del part[path[-1]]
        else:
            part[path[-1]] = odd
        return json.dumps(whole).encode()

    walk(content, ())
    return st.builds(changed, st.sampled_from(paths), _ODD, st.integers(0, 9).map(lambda k: k == 0))


def fuzz_file(
    folder: Path,
    name: str,
    drawn: st.SearchStrategy[bytes],
    check: Callable[[PreTrainedModel], None],
    cases: settings,
    *,
    packed: bool = False,
) -> Counter[str]:
    """Load ``folder`` with file ``name`` replaced by what is ``drawn``; ``check`` what loads."""
    path = folder / name
    whole, outcomes = path.read_bytes(), Counter[str]()

    @cases
    @given(drawn)
    def run(content: bytes) -> None:
        path.write_bytes(content)
        try:
            model, _, _ = load_model(folder, packed=packed)
        except SurgeonError as error:
            assert "\n" not in str(error), error
            outcomes[type(error).__name__] += 1
        else:
            check(model)
            outcomes["loaded"] += 1

    try:
        run()
    finally:
        path.write_bytes(whole)
    return outcomes


def fuzz_folder(folder: Path, cases: settings, *, packed: bool = False) -> Counter[str]:
    """All files of a model folder whose damage must not go beyond a :class:`SurgeonError`."""
    outcomes = Counter[str]()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        content = (folder / name).read_bytes()
        drawn = damages(content) | odd_json(json.loads(content))
        outcomes += fuzz_file(folder, name, drawn, lambda _: None, cases, packed=packed)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = index.read_bytes()
        drawn = damages(content) | odd_json(json.loads(content))
        outcomes += fuzz_file(folder, index.name, drawn, same_weights(folder, packed), cases, packed=packed)
    return outcomes


def fuzz_weights(folder: Path, cases: settings, *, packed: bool) -> Counter[str]:
    """The safetensors files: their headers, and with ``packed`` their numbers, which have checksums."""
    outcomes = Counter[str]()
    check = same_weights(folder, packed) if packed else lambda _: None
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        drawn = damages(content, header) | damages(content) if packed else damages(content, header)
        outcomes += fuzz_file(folder, path.name, drawn, check, cases, packed=packed)
    return outcomes


def same_weights(folder: Path, packed: bool) -> Callable[[PreTrainedModel], None]:
    """A check that a model has the weights that ``folder`` holds now."""
    expected = load_model(folder, packed=packed)[0].state_dict()

    def check(model: PreTrainedModel) -> None:
        found = model.state_dict()
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key

    return check
