"""Damaged checkpoint folders: each is refused in a sentence, or loads; where checksums tell, as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from llm_surgeon import SurgeonError
from llm_surgeon.checkpoint import load_model
from llm_surgeon.jobs.pack import pack_checkpoint
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.packed_models import build_2_4
from tests.surgeon.tiny_models import build

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


class Folder:
    """A model in ``folder``, in shards or packed, one file of which is damaged at a time."""

    def __init__(self, folder: Path, *, packed: bool) -> None:
        self.folder, self.packed = folder / "model", packed
        if packed:
            pack_checkpoint(save_folder(folder / "sparse", build_2_4("opt")), self.folder)
        else:
            save_folder(self.folder, build("llama"), max_shard_size="20KB")
        self.weights = load_model(self.folder, packed=packed)[0].state_dict()
        self.files = {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}

    def damaged(self) -> st.SearchStrategy[tuple[str, bytes]]:
        """A file's name and what is in it now: of safetensors the header is damaged, and with checksums the numbers."""
        configurations, weights = [], []
        for name, content in self.files.items():
            if name.endswith(".json"):
                drawn = _damages(content, len(content)) | _odd_json(json.loads(content))
                configurations.append(st.tuples(st.just(name), drawn))
            elif name.endswith(".safetensors"):
                header = _damages(content, 8 + int.from_bytes(content[:8], "little"))
                drawn = header | _damages(content, len(content)) if self.packed else header
                weights.append(st.tuples(st.just(name), drawn))
        return st.one_of(st.one_of(configurations), st.one_of(weights))

    def check(self, file: tuple[str, bytes]) -> str:
        """Load the folder with ``file`` in it; what became of it: "loaded" or "refused".

        Raises:
            AssertionError: weights changed unseen by the index or by checksums; any other exception than
                :class:`SurgeonError` passes, as the fault that it is.
        """
        name, content = file
        (self.folder / name).write_bytes(content)
        try:
            found = load_model(self.folder, packed=self.packed)[0].state_dict()
        except SurgeonError as error:
            assert str(error) and "\n" not in str(error)
            return "refused"
        finally:
            (self.folder / name).write_bytes(self.files[name])
        if name.endswith(".index.json") or (self.packed and name.endswith(".safetensors")):
            assert found.keys() == self.weights.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in self.weights.items())
        return "loaded"


def _damages(content: bytes, end: int) -> st.SearchStrategy[bytes]:
    """``content`` with a bit flipped, cut short, with bytes put in, or with bytes replaced, before byte ``end``."""
    places, few = st.integers(0, end - 1), st.binary(min_size=1, max_size=8)
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


def _odd_json(content: Any) -> st.SearchStrategy[bytes]:
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
