"""Checkpoints that are loaded, and those that are refused by name."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

import llm_surgeon.checkpoint.folder as folder_module
from llm_surgeon.checkpoint import load_model
from llm_surgeon.errors import InputError, UnsupportedModelError
from tests.surgeon.checkpoints import edit_json, logits, rounded, save_folder
from tests.surgeon.tiny_models import build


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("name", ["llama", "opt"])  # opt's embeddings are tied
def test_load_model(name: str, shard: str, tmp_path: Path) -> None:
    save_folder(tmp_path, build(name, dtype=torch.bfloat16), max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > (1 if shard == "20KB" else 0)
    model, tokenizer, own_dtype = load_model(tmp_path)
    assert own_dtype.main == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    torch.testing.assert_close(logits(model), logits(rounded(name, torch.bfloat16)), rtol=0, atol=0)
    assert tokenizer("w3 w5")["input_ids"] == [3, 5]
    half, _, _ = load_model(str(tmp_path), dtype=torch.float16, device="cpu")
    assert half.dtype == torch.float16


def test_own_dtype_is_that_of_the_files(tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    edit_json(tmp_path / "config.json", dtype="bfloat16")
    assert load_model(tmp_path)[2].main == torch.float32


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
    with pytest.raises(InputError, match=r"without a tokenizer|tokenizer of model .* is missing") as caught:
        load_model(tmp_path)
    assert not str(caught.value).endswith(":")


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tmp_path)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    size = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**size)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="is a t5, not a causal language model"):
        load_model(tmp_path)


def test_no_name_is_not_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no model folder ''"):
        load_model("")


def test_weights_outside_the_blocks_that_are_not_used_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_folder(tmp_path, build("llama"))
    path = tmp_path / "model.safetensors"
    mask = {
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8),
        "model.layers.1.self_attn.masked_bias": torch.ones(1),
    }
    save_file(load_file(path) | mask | {"value_head.weight": torch.ones(1, 32)}, path, {"format": "pt"})
    model, _, _ = load_model(tmp_path)
    torch.testing.assert_close(logits(model), logits(build("llama")), rtol=0, atol=0)
    assert "weights it does not use: model.layers.0.self_attn.bias (3 in all)" in caplog.text


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_fewer_blocks_than_are_stored_are_refused(name: str, tmp_path: Path) -> None:
    save_folder(tmp_path, build(name))
    fewer = {"layer_types": ["full_attention"]} if name == "llama" else {}
    edit_json(tmp_path / "config.json", **{"n_layer" if name == "gpt2" else "num_hidden_layers": 1}, **fewer)
    with pytest.raises(InputError, match=r"weights of its blocks that its configuration has no place for: .*\.1\."):
        load_model(tmp_path)


def test_a_bias_that_the_configuration_leaves_out_is_refused(tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    path, bias = tmp_path / "model.safetensors", "model.layers.1.self_attn.q_proj.bias"
    save_file(load_file(path) | {bias: torch.ones(32)}, path, {"format": "pt"})
    with pytest.raises(InputError, match=rf"no place for: {bias} \(1 in all\)"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1_000_000_000}, "says num_hidden_layers 1000000000, and its files hold 21 tensors"),
        ({"intermediate_size": 10**9}, "describes 192,000,010,400 weights, and its files hold 19,616"),
        ({"num_key_value_heads": 10**6}, "describes 1,024,017,568 weights, and its files hold 19,616"),
        ({"vocab_size": 10**30}, "integer of more than 64 bits: vocab_size"),
        ({"rope_parameters": {"factor": [-(10**30)]}}, "integer of more than 64 bits: factor"),
        ({"auto_map": ["modeling_x.Y"]}, "auto_map in the configuration .* is not a JSON object"),
        ({"auto_map": None}, "auto_map in the configuration .* is not a JSON object"),
        ({"auto_map": {"AutoModelForCausalLM": {"a": ["x.Y"]}}}, r"needs code that comes with it \('x.Y'\)"),
        ({"rope_parameters": 3}, "cannot be loaded"),
        ({"layer_types": {"a": 1}}, "cannot be loaded"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "is quantized"),
        ({"quantization_config": [1]}, "is quantized"),
        ({"transformers_weights": "other.safetensors"}, "names weights files of its own"),
    ],
)
def test_odd_configurations_are_refused_in_one_sentence(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", [100, 100_000])
def test_a_deeply_nested_configuration_is_refused(depth: int, tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    (tmp_path / "config.json").write_text('{"a":' * depth + "1" + "}" * depth)
    with pytest.raises(InputError, match=r"config.json' cannot be read: "):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "files", [["adapter_config.json", "adapter_model.safetensors"], ["adapter_config.json"], ["adapter_model.bin"]]
)
@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_refused(files: list[str], alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_folder(tmp_path / "source", build("llama"))
    if alone:
        (source / "model.safetensors").unlink()
        (source / "config.json").unlink()
    for file in files:
        (source / file).write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/model"}')
    with pytest.raises(InputError, match=rf"holds an adapter \({files[0]}\): merge it first"):
        load_model(source)
    monkeypatch.setattr(folder_module, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(source))
    with pytest.raises(InputError, match=r"model 'some/model' holds an adapter"):
        load_model("some/model")


def test_adapter_weights_among_the_others_are_refused(tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    path, name = tmp_path / "model.safetensors", "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    save_file(load_file(path) | {name: torch.ones(8, 32)}, path, {"format": "pt"})
    with pytest.raises(InputError, match=f"has no place for: {name}"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_what_is_no_file_is_refused_unread(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_folder(tmp_path, build("llama"))
    (tmp_path / name).unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "device":
        (tmp_path / name).symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(tmp_path)  # addresses of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    with pytest.raises(InputError, match=f"holds '{name}', which is neither a file nor a folder"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_folders_and_dangling_links_in_place_of_files(name: str, tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    for make in (Path.mkdir, lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to(path.name)):
        path = tmp_path / name
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        with pytest.raises(InputError) as caught:
            load_model(tmp_path)
        assert "\n" not in str(caught.value)


def test_links_to_files_are_files(tmp_path: Path) -> None:
    """So the hub's cache keeps them."""
    save_folder(tmp_path / "blobs", build("llama"))
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    torch.testing.assert_close(logits(load_model(tmp_path / "snapshot")[0]), logits(build("llama")), rtol=0, atol=0)


@pytest.mark.parametrize("outside", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", 3])
def test_an_index_that_leads_elsewhere_is_refused(outside: Any, tmp_path: Path) -> None:
    source = save_folder(tmp_path / "source", build("llama"), max_shard_size="20KB")
    save_folder(tmp_path / "other", build("llama"))
    (source / "sub").mkdir()
    (source / "sub" / "model.safetensors").symlink_to(tmp_path / "other" / "model.safetensors")
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"lm_head.weight": outside})
    with pytest.raises(InputError, match=r"must name files that lie beside it, not |lacks the weights file '(|\.\.)'"):
        load_model(source)


def test_an_index_and_files_that_differ(tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"), max_shard_size="20KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    weights, name = load_file(second), next(iter(load_file(first)))
    save_file(weights | {name: load_file(first)[name] * 2}, second, {"format": "pt"})
    with pytest.raises(InputError, match=f"'{first.name}' and '{second.name}' both hold {name}: delete the one"):
        load_model(tmp_path)
    removed = next(iter(weights))
    save_file({key: tensor for key, tensor in weights.items() if key != removed}, second, {"format": "pt"})
    with pytest.raises(InputError, match=rf"lacks weights that its index lists: {removed} \(1 in all\)"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.fp16.safetensors", "no model.safetensors: rename 'model.fp16.safetensors' to that if"),
        ("model-00001-of-00002.safetensors", r"and no model.safetensors.index.json that would say how 'model-00001"),
        ("shard-00001-model-00001-of-00002.safetensors", "is a distributed checkpoint"),
        ("pytorch_model.bin", r"pickled weights \(.bin, .pt\) are never loaded"),
        ("weights.h5", r"no model.safetensors$"),
    ],
)
def test_weights_of_another_name(name: str, message: str, tmp_path: Path) -> None:
    save_folder(tmp_path, build("llama"))
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def test_shards_of_processes_beside_the_weights_are_refused(tmp_path: Path) -> None:
    """transformers would load them in place of model.safetensors."""
    save_folder(tmp_path, build("llama"))
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "shard-00000-model-00001-of-00001.safetensors")
    with pytest.raises(InputError, match="is a distributed checkpoint"):
        load_model(tmp_path)


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folder_module, "hub_reachable", lambda: False)
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

    monkeypatch.setattr(folder_module, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, _, _ = load_model("some/model")
    torch.testing.assert_close(logits(model), logits(build("llama")))
    assert model.config.name_or_path == "some/model"


def test_a_download_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("cut off\nsomewhere")

    monkeypatch.setattr(folder_module, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"cannot be downloaded: cut off$"):
        load_model("some/model")
