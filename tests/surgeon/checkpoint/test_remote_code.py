"""Code that comes with a checkpoint runs in no command, unless --trust-remote-code is given."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from llm_surgeon import InputError, prune
from llm_surgeon.checkpoint import load_model, save_checkpoint
from surgeon_kernels import nm_select
from tests.surgeon.checkpoints import edit_json, logits, save_folder, tokenizer_of_words
from tests.surgeon.cli.test_cli import sentence, surgeon  # noqa: F401 (sentence is a fixture)
from tests.surgeon.tiny_models import build

TOKENS = torch.arange(64).view(4, 16)
SMALL = ["--calibration", "TEXT", "--samples", 4, "--seqlen", 16, "--device", "cpu", "--quiet"]
TRAINED = ["--data", "TEXT", "--steps", 1, "--seqlen", 16, "--batch-size", 2, "--device", "cpu"]
SPEED = ["--prompt", 4, "--new-tokens", 2, "--batch-size", 1, "--repeats", 1, "--device", "cpu", "--quiet"]
# Commands by what they read; MODEL is the folder in question, ZEROS one that can be compacted or trained.
COMMANDS = {
    "prune": ["prune", "MODEL", "OUT", *SMALL, "--method", "magnitude"],
    "dry run": ["prune", "MODEL", "OUT", *SMALL, "--dry-run"],
    "eval": ["eval", "MODEL", "--data", "TEXT", "--seqlen", 16, "--device", "cpu", "--quiet"],
    "recover": ["recover", "MODEL", "OUT", *TRAINED],
    "teacher": ["recover", "DENSE", "OUT", "--teacher", "MODEL", *TRAINED],
    "pack": ["pack", "MODEL", "OUT", "--quiet"],
    "compact": ["compact", "MODEL", "OUT", "--quiet"],
    "bench": ["bench", "generate", "MODEL", *SPEED],
    "bench packed": ["bench", "generate", "DENSE", "--packed", "MODEL", *SPEED],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of a dense model and of one whose blocks differ in size, 2:4 and with zero rows."""
    folder = tmp_path_factory.mktemp("models")
    save_folder(folder / "dense", build("llama"))
    model = build("llama")
    prune(model, TOKENS, structure="groups", sparsity=0.3, shots=1, round_to=8)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[:8] = 0.0
            for name, weight in block.named_parameters():
                if name.endswith("proj.weight"):
                    weight.masked_fill_(nm_select(weight.abs(), 2, 4), 0.0)
    save_checkpoint(model, tokenizer_of_words(), folder / "groups", dtype=torch.float32, extra_files={})
    (folder / "text.txt").write_text(" ".join(f"w{i % 60 + 1}" for i in range(800)))
    return folder


@pytest.fixture
def run(made, tmp_path):
    """Run a command on a copy of a model that ``change`` has changed, in a folder where code would leave a marker."""

    def of(command, change, name="groups"):
        model, out = tmp_path / "model", tmp_path / "out"
        for folder in (model, out):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made / name, model)
        change(model)
        names = {"MODEL": model, "OUT": out, "DENSE": made / "dense", "TEXT": made / "text.txt"}
        return surgeon(*[names.get(word, word) for word in COMMANDS[command]])

    return of


def evil(folder, name="evil.py", text="class Tok: pass\nclass X: pass\nclass Config: pass\n"):
    """Code that says it ran."""
    marker = folder.parent / "marker"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"open({str(marker)!r}, 'w').close()\n{text}")


def tokenizer_code(folder):
    evil(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Tok", auto_map={"AutoTokenizer": [None, "evil.Tok"]})


def tokenizer_code_as_a_list(folder):
    evil(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Tok", auto_map=["evil.Tok", None])


def configuration_code(folder):
    evil(folder)
    auto_map = json.loads((folder / "config.json").read_text()).get("auto_map", {})
    edit_json(folder / "config.json", auto_map=auto_map | {"AutoConfig": "evil.Config"})


def code_of_another_folder(folder):
    evil(folder.parent / "modeling_pruned.d", text="class X: pass\n")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_pruned.d--evil.X"})


def code_beside_our_own(folder):
    evil(folder, "modeling_pruned/evil.py")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_pruned.PrunedX\nevil.X"})


def a_kernel_of_the_hub(folder):
    edit_json(folder / "config.json", attn_implementation="someone/kernel@main:attention")


CODE = [
    tokenizer_code,
    tokenizer_code_as_a_list,
    configuration_code,
    code_of_another_folder,
    code_beside_our_own,
    a_kernel_of_the_hub,
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("change", CODE)
def test_code_is_refused_unrun(command, change, run, tmp_path, sentence, monkeypatch):  # noqa: F811
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)  # where modeling_pruned.d is found
    for name in ("groups", "dense") if change is tokenizer_code else ("groups",):
        assert run(command, change, name) == 2
        assert "read that code, then pass --trust-remote-code" in sentence()
    assert not (tmp_path / "marker").exists() and not (tmp_path / "out").exists()


def a_function_for_generate(folder):
    evil(folder, "custom_generate/generate.py", "def generate(model, **options): raise AssertionError\n")


def a_changed_copy_of_our_own(folder):
    evil(folder, "modeling_pruned.py", "raise AssertionError")


@pytest.mark.parametrize("command", COMMANDS)
def test_code_that_is_not_needed_is_not_run(command, run, tmp_path, capsys):
    """And so a model of our own class is taken by every command without the flag."""

    def both(folder):
        a_function_for_generate(folder)
        a_changed_copy_of_our_own(folder)

    code = run(command, both)
    text = capsys.readouterr().err
    # Only a packed model may stand for one, and what was compacted is dense in this sense.
    assert code == (2 if command == "bench packed" else 0), text
    assert command != "bench packed" or "is not packed" in text
    assert not (tmp_path / "marker").exists()


def test_a_changed_copy_of_our_class_is_said_and_the_package_s_is_used(made, tmp_path, caplog):
    shutil.copytree(made / "groups", tmp_path / "model")
    a_changed_copy_of_our_own(tmp_path / "model")
    expected = logits(load_model(made / "groups")[0])
    assert "differs" not in caplog.text
    for trust in (False, True):
        model, tokenizer, form = load_model(tmp_path / "model", trust_remote_code=trust)
        assert type(model).__module__ == "llm_surgeon.formats.modeling_pruned"
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    assert "modeling_pruned.py differs from this package's, which is used" in caplog.text
    assert not (tmp_path / "marker").exists()
    save_checkpoint(model, tokenizer, tmp_path / "out", dtype=form, extra_files={})
    assert (tmp_path / "out" / "modeling_pruned.py").read_bytes() == (made / "groups/modeling_pruned.py").read_bytes()


def test_the_flag_lets_the_code_run(made, tmp_path):
    shutil.copytree(made / "groups", tmp_path / "model")
    tokenizer_code(tmp_path / "model")
    with pytest.raises(InputError, match=r"the tokenizer of model .* cannot be loaded"):
        load_model(tmp_path / "model", trust_remote_code=True)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("name", ["AutoTokenizer", "AutoModelForCausalLM", "RagTokenizer", "pipeline", "models"])
def test_the_class_of_a_tokenizer_must_be_one(where, name, made, tmp_path):
    """transformers would call from_pretrained of it, with an answer of its own to code in the folder."""
    folder = shutil.copytree(made / "dense", tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", tokenizer_class=None)
    edit_json(folder / where, tokenizer_class=name)
    with pytest.raises(InputError, match=f"names '{name}' as its tokenizer's class, which is none"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_pruned.PrunedNothing"}}, "no model class of that name"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_pruned.PrunedLlamaConfig"}}, "no model class of that name"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_pruned.PrunedAutoModel"}}, "no model class of that name"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_pruned.PrunedGPT2LMHeadModel"}}, "is of a 'llama'"),
        ({"pruned_blocks": "model.nothing"}, "cannot be loaded: .*nothing"),
        ({"pruned_modules": {"0": {"self_attn.forward": "x"}}}, "self_attn.forward of a block is a number, not 'x'"),
        ({"per_layer_config": None}, "stores model.layers.0"),
    ],
)
def test_models_of_our_classes_that_do_not_fit(changes, message, made, tmp_path):
    folder = shutil.copytree(made / "groups", tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_code_is_downloaded_only_where_it_may_run(made, monkeypatch):
    import huggingface_hub

    import llm_surgeon.checkpoint.folder as folder_module

    wanted = []

    def download(name: str, allow_patterns: list[str], **_: object) -> str:
        wanted.append("*.py" in allow_patterns)
        return str(made / "dense")

    monkeypatch.setattr(folder_module, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_model("some/model")
    load_model("some/model", trust_remote_code=True)
    assert wanted == [False, True]
