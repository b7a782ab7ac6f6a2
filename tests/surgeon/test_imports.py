"""Modules that importing the package and asking for help bring along; packed models load all the same."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import llm_surgeon

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch",
    "transformers",
    "accelerate",
    "triton",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "peft",
    "datasets",
    "pyarrow",
    "surgeon_kernels",
)
HELP = """
import os, sys
from llm_surgeon.cli import main
for line in ("--help", "-h", "prune --help", "bench generate -h", "recover -h", "--version"):
    try:
        main(line.split())
    except SystemExit as exit:
        assert not exit.code, (line, exit.code)
os.environ |= {"_SURGEON_COMPLETE": "complete_bash", "COMP_WORDS": "surgeon prune --method spa", "COMP_CWORD": "3"}
try:
    main([])
except SystemExit:
    pass
"""


def loaded(code, *names):
    """Modules of ``names`` that a fresh interpreter has after ``code``."""
    code = f"{code}\nimport sys; print([name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return eval(done.stdout.splitlines()[-1]), done.stdout


def test_neither_the_package_nor_help_import_what_is_slow():
    assert loaded("import llm_surgeon", *HEAVY)[0] == []
    found, text = loaded(HELP, *HEAVY)
    assert found == []
    assert "Usage: surgeon" in text and "--install-completion" in text and "\nsurgeon-kernels " in text
    assert "\nsparsegpt\n" in text


@pytest.mark.parametrize(
    "first, second",
    [
        ("import llm_surgeon", "import transformers.modeling_utils"),
        ("import transformers.modeling_utils", "import llm_surgeon"),
        ("import llm_surgeon.inference.pack", "import transformers.modeling_utils"),
        ("from transformers import AutoModelForCausalLM; import llm_surgeon", "import transformers.modeling_utils"),
        (
            "import importlib.util, llm_surgeon; importlib.util.find_spec('transformers.modeling_utils')",
            "import transformers.modeling_utils",
        ),
    ],
)
def test_transformers_knows_the_packed_format_whichever_was_imported_first(first, second):
    mapping = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known"
    code = f"{first}\n{second}\n{mapping}\nassert known['surgeon-2of4'].__name__ == 'Surgeon24Quantizer'"
    assert loaded(code, "llm_surgeon.inference.quantizer")[0] == ["llm_surgeon.inference.quantizer"]


def test_the_quantizer_needs_nothing_that_is_half_way_when_it_is_imported():
    assert loaded("import llm_surgeon.inference", "transformers.modeling_utils")[0] == []


@pytest.mark.parametrize("code", ["from llm_surgeon import prune", "import llm_surgeon.models.decoder"])
def test_what_the_quantizer_needs_can_be_the_first_that_is_imported(code):
    code = f"{code}\nimport transformers.models.llama.modeling_llama"
    assert loaded(code, "llm_surgeon.inference.quantizer")[0] == ["llm_surgeon.inference.quantizer"]


def test_every_public_name_is_there_and_listed():
    for name in llm_surgeon.__all__:
        assert getattr(llm_surgeon, name).__name__ == name
        assert name in dir(llm_surgeon)
    assert set(llm_surgeon._PLACES) == set(llm_surgeon.__all__)
    with pytest.raises(AttributeError, match="module 'llm_surgeon' has no attribute 'prone'"):
        llm_surgeon.prone  # noqa: B018


@pytest.mark.parametrize(
    "former, name, now",
    [
        ("llm_surgeon.packed", "fuse_linears", "llm_surgeon.inference.merge_packed_linears"),
        ("llm_surgeon.packed", "pack_model", "llm_surgeon.inference.pack_model"),
        ("llm_surgeon.fused", "fused", "llm_surgeon.models.fused_pointwise.fused_pointwise"),
        ("llm_surgeon.joined", "joined", "llm_surgeon.inference.merge_linears"),
    ],
)
def test_former_names_lead_to_the_new_ones_and_say_so(former, name, now):
    package, _, new = now.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{former} is llm_surgeon"):
        sys.modules.pop(former, None)
        module = importlib.import_module(former)
    assert getattr(module, name) is getattr(importlib.import_module(package), new)


def test_the_former_place_of_calibrations_leads_to_the_new_one_and_says_so():
    with pytest.warns(DeprecationWarning, match=r"llm_surgeon\.data\.Calibration is llm_surgeon\.Calibration now"):
        from llm_surgeon.data import Calibration
    assert Calibration is llm_surgeon.Calibration
    with pytest.raises(AttributeError, match=r"module 'llm_surgeon\.data' has no attribute 'calibrations'"):
        llm_surgeon.data.calibrations  # noqa: B018
