"""Random option files: every one gives options that make a configuration, or is refused in a sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml
from hypothesis import strategies as st

from llm_surgeon import InputError, PruneConfig
from llm_surgeon.cli.config_file import read_options

KNOWN = [field.name for field in dataclasses.fields(PruneConfig)]
TEXT = {"structure", "method", "update", "fisher", "importance", "skip_layers", "offload"}

_scalars = st.one_of(
    st.sampled_from(
        ["2:4", "unstructured", "groups", "surgeon", "wanda", "joint", "none", "24GB", "0-3", "true", "no"]
    ),
    st.integers(-(10**30), 10**30).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["~", "null", "", ".inf", "1e400", "2020-99-99", "0x1F", "1_000", "'quoted'", '"\\x00"', "9" * 5000]
    ),
    st.text(max_size=12),
)
_keys = st.one_of(st.sampled_from(KNOWN), st.text(max_size=8))
_lines = st.tuples(_keys, _scalars).map(": ".join)
_structures = st.sampled_from(
    [
        *("a: &x [1]\nb: *x", "? [1]\n: 2", "shots: {a: 1}", "- 1", "shots: !!python/name:os.system x", "--- 1\n--- 2"),
        *("[" * 3000, "{" * 3000, "shots: " + "[" * 3000),
        *("\ufeffshots: 2", "shots: 1\nshots: 2", "%YAML 9.9\n---\na: b"),
    ]
)

_plausible = st.lists(
    st.sampled_from(
        [
            *("structure: 2:4", "structure: 16:32", "structure: unstructured", "sparsity: .5", "sparsity: 1e-1"),
            *("method: surgeon", "method: wanda", "method: k-obd", "update: chunked", "update: none", "shots: 0x3"),
            *("samples: 010", "seqlen: 1_000", "seed: -1", "swaps: 0", "gradient-steps: 1", "skip-layers: 0-3"),
            *("fisher: sampled", "skip_layers: 2020-01-01", "lora_rank: 8", "kron_rank: 2", "round_to: 1:30"),
        ]
    ),
    max_size=4,
    unique_by=lambda line: line.split(":")[0],
)
# Whole files: what may be right, lines of options, lines with odd structures between, or any bytes at all.
documents = st.one_of(
    _plausible.map("\n".join),
    st.tuples(_plausible, _lines).map(lambda both: "\n".join([*both[0], both[1]])),
    st.lists(_lines, max_size=6).map("\n".join),
    st.lists(st.one_of(_lines, _structures), max_size=4).map("\n".join),
).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=60)


def check(folder: Path, document: bytes) -> str:
    """Read ``document`` as an option file; what became of it: "options", "refused".

    Raises:
        AssertionError: a value differs from the scalar that YAML's own plainest reader sees; any other exception than
            :class:`InputError` passes, as the fault that it is.
    """
    path = folder / "options.yaml"
    path.write_bytes(document)
    try:
        options = read_options(path, KNOWN, TEXT)
        config = PruneConfig.from_mapping(options)
    except InputError as error:
        assert str(error) and "\n" not in str(error)
        return "refused"
    plain = yaml.load(document, yaml.BaseLoader)
    for name, value in options.items():
        if name in TEXT and value is not None:
            assert value == {key.replace("-", "_"): text for key, text in plain.items()}[name]
    again = PruneConfig.from_mapping(dataclasses.asdict(config))
    assert again == config  # a resolved configuration is one that can be given
    return "options"
