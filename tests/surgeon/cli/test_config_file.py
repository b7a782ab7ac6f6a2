"""A YAML file of options: how its values are read, and one sentence for whatever else stands in it."""

import math
import os

import pytest

from llm_surgeon.cli.config_file import read_options
from llm_surgeon.errors import InputError

KNOWN, TEXT = {"structure", "calibration", "overwrite", "seed", "damp_a", "skip_layers"}, {"structure", "calibration"}


@pytest.fixture
def read(tmp_path):
    def options(content):
        path = tmp_path / "options.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_options(path, KNOWN, TEXT)

    return options


@pytest.mark.parametrize(
    "content, expected",
    [
        ("structure: 2:4", {"structure": "2:4"}),  # base 60 in YAML 1.1
        ("structure: no\ncalibration: 2020-01-01", {"structure": "no", "calibration": "2020-01-01"}),
        ("calibration: 12", {"calibration": "12"}),
        ("overwrite: no", {"overwrite": False}),
        ("overwrite: On", {"overwrite": True}),
        ("overwrite: 'no'", {"overwrite": "no"}),
        ("seed: 7\ndamp-a: 1e-3", {"seed": 7, "damp_a": 0.001}),
        ("seed: 010", {"seed": 10}),  # octal in YAML 1.1
        ("seed: 1:30", {"seed": "1:30"}),
        ("seed: 2020-99-99", {"seed": "2020-99-99"}),
        ("damp_a: .inf", {"damp_a": math.inf}),
        ("damp_a:\nseed: ~", {"damp_a": None, "seed": None}),
        ("{structure: '2:4', seed: 1}  # a comment", {"structure": "2:4", "seed": 1}),
        ("seed: " + "9" * 5000, {"seed": "9" * 5000}),
        ("\ufeffseed: 1", {"seed": 1}),
    ],
)
def test_values(read, content, expected):
    found = read(content)
    assert found == expected and [type(value) for value in found.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    "content, words",
    [
        ("seed: 1\n\nseed: 2", "line 3: the option 'seed' is given twice"),
        ("damp-a: 1\ndamp_a: 2", "line 2: the option 'damp_a' is given twice"),
        ("seed: 1\nsede: 2", "line 2: unknown option 'sede': do you mean 'seed'?"),
        ("damp_a: &a [1, 2]", "line 1: anchors and aliases are not read"),
        ("damp_a: &a 1\nseed: *a", "line 1: anchors and aliases are not read"),
        ("<<: *a", "line 1: anchors and aliases are not read"),
        ("seed: 1\ndamp_a: [1]", "line 2: an option is one value"),
        ("seed: {a: 1}", "line 1: an option is one value"),
        ("seed: " + "[" * 500_000, "an option is one value"),
        ("".join(" " * depth + "a:\n" for depth in range(1000)), "line 2: an option is one value"),
        ("seed: !!python/object/apply:os.getcwd []", "an option is one value"),
        ("seed: !!python/name:os.getcwd ''", "the tag 'tag:yaml.org,2002:python/name:os.getcwd' is not read"),
        ("seed: 1\n---\nseed: 2", "must hold option: value lines"),
        ("", "must hold option: value lines"),
        ("just words", "must hold option: value lines"),
        ("seed: [", "an option is one value"),
        ("seed: 1: 2", "cannot be read: mapping values are not allowed here"),
        ("seed: '", "cannot be read"),
        (b"seed: \xff", "cannot be read: 'utf-8' codec"),
        (b"seed: \0", "cannot be read"),
        ("# " + "x" * 2**20, "is larger than the 1048576 bytes"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_refusals_are_one_line_and_name_the_file(read, content, words):
    with pytest.raises(InputError) as error:
        read(content)
    assert words in str(error.value) and "options.yaml" in str(error.value)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 600


def test_a_pipe_or_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="cannot be read"):
            read_options(path, KNOWN, TEXT)
