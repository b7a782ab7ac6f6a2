from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import llm_surgeon.checkpoint.load as load_module
import llm_surgeon.checkpoint.save as save_module
from llm_surgeon.checkpoint import check_output, load_model, save_checkpoint
from llm_surgeon.errors import InputError, UnsupportedModelError
from tests.surgeon.tiny_models import VOCABULARY, build

IDS = torch.arange(12).view(2, 6) * 5
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<s>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", chat_template=CHAT)


def save_folder(folder: Path, model: PreTrainedModel, **options: Any) -> Path:
    """As a checkpoint of someone else's making."""
    model.save_pretrained(folder, **options)
    tokenizer_of_words().save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tree(folder: Path) -> dict[str, bytes]:
    """All files below ``folder``, hidden ones included, with their contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rounded(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The float32 model whose weights are those of ``build(name)`` rounded to ``dtype``."""
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


# ---- load_model


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("name", ["llama", "opt"])  # opt's embeddings are tied
def test_load_model(name: str, shard: str, tmp_path: Path) -> None:
    save_folder(tmp_path, build(name, dtype=torch.bfloat16), max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > (1 if shard == "20KB" else 0)
    model, tokenizer, own_dtype = load_model(tmp_path)
    assert own_dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    torch.testing.assert_close(logits(model), logits(rounded(name, torch.bfloat16)), rtol=0, atol=0)
    assert tokenizer("w3 w5")["input_ids"] == [3, 5]
    half, _, _ = load_model(str(tmp_path), dtype=torch.float16, device="cpu")
    assert half.dtype == torch.float16


def test_own_dtype_is_that_of_the_files(tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    edit_json(tmp_path / "config.json", dtype="bfloat16")
    assert load_model(tmp_path)[2] == torch.float32


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json' cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config.json' is not a JSON object"):
        load_model(tmp_path)
    with pytest.raises(InputError, match=r"config.json' is a file: pass the folder"):
        load_model(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"no model folder '/does/not/exist'$"):
        load_model("/does/not/exist")


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no model.safetensors: pickled weights \(.bin, .pt\) are never loaded"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0, 6, 300, -1])
def test_a_cut_weights_file_is_named(keep: int, tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"), max_shard_size="20KB")
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=rf"weights file '.*{path.name}' is damaged or cut short"):
        load_model(tmp_path)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"), max_shard_size="20KB")
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises(InputError, match=f"lacks the weights file '{path.name}' that its index lists"):
        load_model(tmp_path)
    edit_json(tmp_path / "model.safetensors.index.json", weight_map={})
    with pytest.raises(InputError, match="lists no weights"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("no")
    with pytest.raises(InputError, match=r"index.json' cannot be read"):
        load_model(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for name in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        del weights[name]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights: lm_head.weight \(2 in all\)"):
        load_model(tmp_path)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    edit_json(tmp_path / "config.json", intermediate_size=16)
    with pytest.raises(InputError, match=r"layers.0.mlp.down_proj.weight as \(32, 48\), where .* says \(32, 16\)"):
        load_model(tmp_path)


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UnsupportedModelError, match="stored as I8"):
        load_model(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModelError, match="is quantized"):
        load_model(tmp_path)


def test_remote_code_is_run_only_when_allowed(tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    edit_json(
        tmp_path / "config.json",
        model_type="of_my_own",
        auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    )
    (tmp_path / "mine.py").write_text("raise AssertionError('remote code ran')")
    with pytest.raises(InputError, match="read that code, then pass --trust-remote-code"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="cannot be loaded: remote code ran"):
        load_model(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_type": "of_nobody"}, "does not recognize"), ({"hidden_size": "many"}, "hidden_size")],
)
def test_configurations_that_cannot_be_loaded(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(InputError, match=f"cannot be loaded: .*{message}") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "qwen2"])
def test_a_missing_tokenizer(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="tokenizer"):
        load_model(tmp_path)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tmp_path)


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(load_module, "hub_reachable", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="no model folder 'some/model', and it cannot be downloaded: the Hugging Face"):
        load_model("some/model")


def test_a_hub_id_is_downloaded_without_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    files = ["model.safetensors", "pytorch_model.bin", "original/a.safetensors", "config.json", "tokenizer.model"]

    def download(name: str, **options: Any) -> str:
        wanted = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
        )
        assert (name, options["local_files_only"]) == ("some/model", False)
        assert list(wanted) == ["model.safetensors", "config.json", "tokenizer.model"]
        return str(tmp_path)

    monkeypatch.setattr(load_module, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, _, _ = load_model("some/model")
    torch.testing.assert_close(logits(model), logits(build("llama")))
    assert model.config.name_or_path == "some/model"


def test_a_download_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("cut off\nsomewhere")

    monkeypatch.setattr(load_module, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"cannot be downloaded: cut off$"):
        load_model("some/model")


# ---- save_checkpoint


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
    (out / "old.txt").write_text("old")
    with pytest.raises(InputError, match="is not empty: choose another folder or pass --overwrite"):
        save_checkpoint(build("llama"), tokenizer_of_words(), out, dtype=torch.float32, extra_files={})
    assert (out / "old.txt").exists()
    save_checkpoint(build("llama"), tokenizer_of_words(), out, dtype=torch.float32, extra_files={}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "old.txt").exists() and len(list(out.glob("*.safetensors"))) == 1
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
    elif stage == "extra files":
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt if stage == "interrupt" else InputError) as caught:
        save_checkpoint(model, tokenizer, out, dtype=torch.float32, extra_files={"README.md": "x"}, overwrite=existing)
    if stage != "interrupt":
        assert "out' cannot be written: [Errno 28] No space left on device" in str(caught.value)
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])


# ---- check_output


def test_output_may_be_new_or_empty(tmp_path: Path) -> None:
    source = save_folder(tmp_path / "model", build("llama"))
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "a" / "b", tmp_path / "empty"):
        check_output(out, source, overwrite=False)
        check_output(str(out), "some/model", overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model"]


@pytest.mark.parametrize("out", ["model", "model/inside/deep", ".", "link", "link/inside", "model/../model"])
def test_output_must_not_overlap_the_source(out: str, tmp_path: Path) -> None:
    source = save_folder(tmp_path / "here" / "model", build("llama"))
    (tmp_path / "here" / "link").symlink_to(source)
    with pytest.raises(InputError, match="overlaps the model"):
        check_output(tmp_path / "here" / out, source, overwrite=True)
    with pytest.raises(InputError, match="overlaps the model"):
        check_output(source, tmp_path / "here" / "link", overwrite=True)


def test_outputs_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_folder(tmp_path / "model", build("llama"))
    other = shutil.copytree(source, tmp_path / "other")
    with pytest.raises(InputError, match=r"is not empty: .* pass --overwrite"):
        check_output(other, source, overwrite=False)
    check_output(other, source, overwrite=True)
    (other / "config.json").unlink()
    with pytest.raises(InputError, match="something other than a model"):
        check_output(other, source, overwrite=True)
    file = source / "config.json"
    with pytest.raises(InputError, match="is a file"):
        check_output(file, None, overwrite=True)
    with pytest.raises(InputError, match="not a writable folder"):
        check_output(file / "below", None, overwrite=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match=f"'{tmp_path}' is not a writable folder"):
        check_output(tmp_path / "a" / "b", None, overwrite=False)
    monkeypatch.undo()
    monkeypatch.setattr(save_module.Path, "is_mount", lambda path: True)
    with pytest.raises(InputError, match="is a mount point"):
        check_output(tmp_path / "a", None, overwrite=False)
