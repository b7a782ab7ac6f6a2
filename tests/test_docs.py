"""Pages name files and modules that are there, and the examples of docs/adding.md run as they stand."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from llm_surgeon.config import methods, structure
from llm_surgeon.models.decoder import find_decoder
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.tiny_models import build

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "csrc/README.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md"))),
)
EXAMPLES = dict(
    re.findall(
        r"^`([\w/.]+)`\n\n```\w+\n(.*?)^```$",
        (ROOT / "docs" / "adding.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the examples, on the path; what they register is forgotten afterwards."""
    for name, text in EXAMPLES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for registry in (methods._methods, structure._structures):
        monkeypatch.setattr(registry, "records", dict(registry.records))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("ria", "test_ria", "columns", "test_columns"):
        sys.modules.pop(name, None)


def test_a_method(folder: Path) -> None:
    importlib.import_module("test_ria").test_half_of_every_layer_goes_the_cheapest_first()


def test_a_structure(folder: Path) -> None:
    test = importlib.import_module("test_columns").test_a_quarter_of_the_columns_goes_the_shortest_first
    test("llama")
    test("opt")


def test_an_architecture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(folder / "try_architecture.py"))
    assert capsys.readouterr().out.count("\nRemoved ") == 4


def test_an_op(folder: Path) -> None:
    pytest.importorskip("triton", reason="needs Triton's interpreter")
    from tests.kernels.interpreter import assert_agrees

    shutil.copytree(ROOT / "surgeon_kernels", folder / "surgeon_kernels", dirs_exist_ok=True)
    for name in ("__init__.py", "kernels/__init__.py", "kernels/selection/__init__.py", "kernels/dense.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests" / name)
    command = [sys.executable, "-m", "pytest", "tests"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_agrees("selection.interpreted_row_norms", folder)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = re.sub(r"^```\w*\n.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text)
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
    named = re.findall(r"`((?:bench|csrc|docs|python|surgeon_kernels|tests)/[\w/.-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists() and name not in EXAMPLES] == []


def test_messages_that_troubleshooting_quotes_are_those_of_the_code() -> None:
    rows = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    messages = [
        message for row in rows if row.startswith("| `") for message in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    folders = (ROOT / "python", ROOT / "surgeon_kernels")
    code = "\n".join(file.read_text(encoding="utf-8") for folder in folders for file in sorted(folder.rglob("*.py")))
    assert len(messages) > 10 and [message for message in messages if message not in code] == []


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert block.count("samples=32, seqlen=512") == 1
    save_folder(tmp_path / "MODEL", build("llama"))
    (tmp_path / "train.txt").write_text(" ".join(f"w{1 + n % 40}" for n in range(200)))
    monkeypatch.chdir(tmp_path)
    exec(block.replace("samples=32, seqlen=512", "samples=4, seqlen=16"), {})
    for linear in find_decoder(AutoModelForCausalLM.from_pretrained("OUT")).linears:
        assert bool(((linear.weight == 0.0).unflatten(1, (-1, 4)).sum(dim=2) == 2).all())


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    names = set(re.findall(r"python -m ((?:bench|tests)(?:\.\w+)+)", text))
    assert [name for name in names if importlib.util.find_spec(name) is None] == []
