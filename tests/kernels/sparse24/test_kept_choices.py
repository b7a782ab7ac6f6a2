"""The files of the choices of `tune_2_4`; test_linear_2_4_tune.py has what is done with them."""

import re

import pytest

from surgeon_kernels.sparse24 import kept_choices
from surgeon_kernels.sparse24.kept_choices import add_kept, kept_path, read_kept


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(monkeypatch, tmp_path):
    path = tmp_path / "file.json"
    add_kept(path, {"a": 1})

    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr(kept_choices.os, "replace", fails)
    kept_choices._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="no space left"):
        add_kept(path, {"b": 2})
    assert read_kept(path) == {"a": 1} and [*tmp_path.iterdir()] == [path]


def test_the_folder_is_that_of_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        path = kept_path("NVIDIA H200 (x)", [1])
        assert path.expanduser().parent == tmp_path / ".cache" / "surgeon-kernels"
        assert re.fullmatch(r"linear-2-4-nvidia-h200-x-[0-9a-f]{16}\.json", path.name)
