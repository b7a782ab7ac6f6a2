"""Checkpoints are written whole or not at all, and load in plain transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_surgeon.checkpoint import save_checkpoint
from llm_surgeon.errors import InputError
from tests.surgeon.checkpoints import CHAT, logits, rounded, save_folder, tokenizer_of_words, tree
from tests.surgeon.tiny_models import build


@pytest.mark.parametrize(
    ("name", "dtype", "shard"),
    [
        ("llama", torch.float32, "5GB"),
        ("llama", torch.bfloat16, "20KB"),
        ("opt", torch.bfloat16, "5GB"),
        ("opt", torch.float32, "20KB"),
        ("gpt2", torch.bfloat16, "20KB"),
    ],
)
def test_a_saved_folder_loads_in_plain_transformers(name: str, dtype: torch.dtype, shard: str, tmp_path: Path) -> None:
    model, out = build(name), tmp_path / "new" / "out"
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    extra = {"README.md": "# Über\n", "surgeon_report.json": "{}"}
    save_checkpoint(model, tokenizer_of_words(), out, dtype=dtype, extra_files=extra, max_shard_size=shard)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard == "20KB")
    assert {key: (out / key).read_text(encoding="utf-8") for key in extra} == extra

    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == dtype
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(rounded(name, dtype)), rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("w3 w5")["input_ids"] == [3, 5] and tokenizer.chat_template == CHAT
    # Nobody needs to know where it was made.
    assert not any(str(tmp_path) in text.decode() for key, text in tree(out).items() if key.endswith(".json"))

    assert model.dtype == torch.float32
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = build("opt")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    save_checkpoint(model, tokenizer_of_words(), tmp_path / "out", dtype=torch.bfloat16, extra_files={})
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in model.parameters())


def test_zeros_are_written_positive(tmp_path: Path) -> None:
    model = build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[:, ::2] = 0.0
        weight[0, 0], weight[0, 1] = -0.0, -1e-30
    for dtype in (torch.float32, torch.float16):
        out = tmp_path / str(dtype)
        save_checkpoint(model, tokenizer_of_words(), out, dtype=dtype, extra_files={})
        stored = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        zero = stored == 0
        assert zero.sum() == weight.shape[0] * 16 + (dtype == torch.float16)  # -1e-30 is nothing in float16
        assert not torch.signbit(stored[zero]).any()
        assert torch.equal(stored, weight.to(dtype))


def test_every_file_is_as_readable_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    save_checkpoint(build("llama"), tokenizer_of_words(), tmp_path / "out", dtype=torch.float32, extra_files={"a": ""})
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["a"] == (tmp_path / "any").stat().st_mode


def test_generation_config_is_kept_even_if_it_is_inconsistent(tmp_path: Path) -> None:
    model = build("llama")
    generation = model.generation_config
    generation.do_sample, generation.temperature = False, 0.3
    save_checkpoint(model, tokenizer_of_words(), tmp_path / "out", dtype=torch.float32, extra_files={})
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.3
    assert model.generation_config is generation


def test_overwriting_leaves_nothing_of_the_old_folder(tmp_path: Path) -> None:
    out = save_folder(tmp_path / "out", build("opt"), max_shard_size="20KB")
    (out / "chat_template.json").write_text("old")
    with pytest.raises(InputError, match="is not empty: choose another folder or pass --overwrite"):
        save_checkpoint(build("llama"), tokenizer_of_words(), out, dtype=torch.float32, extra_files={})
    assert (out / "chat_template.json").exists()
    save_checkpoint(build("llama"), tokenizer_of_words(), out, dtype=torch.float32, extra_files={}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "chat_template.json").exists() and len(list(out.glob("*.safetensors"))) == 1
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), logits(build("llama")))


def test_an_empty_folder_and_a_link_to_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_checkpoint(build("llama"), tokenizer_of_words(), tmp_path / "link", dtype=torch.float32, extra_files={})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("stage", ["weights", "tokenizer", "extra files", "rename", "interrupt"])
def test_a_failed_save_leaves_everything_as_it_was(
    existing: bool, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if existing:
        save_folder(out, build("opt"))
    before = tree(tmp_path)
    failure: BaseException = KeyboardInterrupt() if stage == "interrupt" else OSError(28, "No space left on device")

    def fail(*_: object, **__: object) -> None:
        raise failure

    model, tokenizer, rename = build("llama"), tokenizer_of_words(), os.rename
    if stage == "weights":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    elif stage == "rename":
        monkeypatch.setattr(
            os, "rename", lambda a, b: fail() if ".partial-" in str(a) and str(b) == str(out) else rename(a, b)
        )
        monkeypatch.setattr("llm_surgeon.checkpoint.output._exchange", lambda one, other: False)
    elif stage == "extra files":
        monkeypatch.setattr(Path, "write_bytes", fail)
    else:
        monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt if stage == "interrupt" else InputError) as caught:
        save_checkpoint(model, tokenizer, out, dtype=torch.float32, extra_files={"README.md": "x"}, overwrite=existing)
    if stage != "interrupt":
        assert "out' cannot be written: [Errno 28] No space left on device" in str(caught.value)
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])
