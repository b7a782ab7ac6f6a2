"""Packed files: what is on disk, and a clear sentence for every file that is not as it should be."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llm_surgeon.formats.packed_2_4 as format_module
from llm_surgeon import InputError
from llm_surgeon.checkpoint import load_model
from llm_surgeon.inference import Surgeon24Config, pack_model
from llm_surgeon.jobs.pack import pack_checkpoint
from surgeon_kernels import Packed24, unpack_2_4
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.packed_models import build_2_4, logits

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def folder(tmp_path):
    model = build_2_4("llama", torch.bfloat16)
    pack_model(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_entry(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        key: value for key, value in (config["quantization_config"] | changes).items() if value is not None
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_what_is_on_disk(folder):
    weights = load_file(folder / "model.safetensors")
    assert f"{LAYER}.weight" not in weights
    values, indices = weights[f"{LAYER}.values"], weights[f"{LAYER}.indices"]
    assert (values.dtype, list(values.shape)) == (torch.bfloat16, [32, 24])
    assert (indices.dtype, list(indices.shape)) == (torch.uint8, [32, 6])
    dense = build_2_4("llama", torch.bfloat16).get_submodule(LAYER).weight
    assert torch.equal(unpack_2_4(Packed24(values, indices)), dense)
    assert (values.nbytes + indices.nbytes) * 16 == dense.nbytes * 9
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert set(entry) == {"quant_method", "version", "modules", "ignored"}
    assert entry["ignored"] == ["lm_head"] and len(entry["modules"]) == 14


DAMAGES = {
    "missing values": (lambda w: w.pop(f"{LAYER}.values"), rf"lacks {LAYER}.values"),
    "missing indices": (lambda w: w.pop(f"{LAYER}.indices"), rf"lacks {LAYER}.indices"),
    "rows": (
        lambda w: w.update({f"{LAYER}.values": w[f"{LAYER}.values"][:-1].clone()}),
        r"down_proj.values as BF16 \[31, 24\], where .* \[32, 24\] is needed",
    ),
    "columns": (
        lambda w: w.update({f"{LAYER}.indices": w[f"{LAYER}.indices"][:, :-1].clone()}),
        r"down_proj.indices as U8 \[32, 5\], where U8 \[32, 6\] is needed",
    ),
    "integer values": (
        lambda w: w.update({f"{LAYER}.values": w[f"{LAYER}.values"].view(torch.int16)}),
        r"down_proj.values as I16",
    ),
    "wide indices": (
        lambda w: w.update({f"{LAYER}.indices": w[f"{LAYER}.indices"].int()}),
        r"down_proj.indices as I32",
    ),
    "flipped bits": (
        lambda w: w[f"{LAYER}.indices"][7, 2:3].fill_(0x44 ^ 0x0E),
        r"packed weight of model.layers.1.mlp.down_proj is damaged: indices of row 7 are corrupt in columns 16 to 19",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_do_not_match_are_refused(folder, damage):
    change, words = DAMAGES[damage]
    edit_weights(folder, change)
    with pytest.raises(InputError, match=words) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged or cut short"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2 of surgeon-2of4, and this llm_surgeon reads version 1"),
        ({"modules": None}, "lists no modules"),
        ({"modules": "all"}, "must be a list of module names"),
        ({"ignored": [1]}, "must be a list of module names"),
        ({"group_size": 4}, "unknown entry 'group_size'"),
        ({"modules": ["model.layers.9.mlp.up_proj"]}, "the model has no such layer"),
        ({"modules": ["model.norm"]}, "model.norm is listed as packed, and it is a LlamaRMSNorm"),
    ],
)
def test_a_config_that_does_not_match_is_refused(folder, changes, words):
    edit_entry(folder, **changes)
    with pytest.raises(InputError, match=words):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_dense_model_is_not_packed_while_it_loads(folder, tmp_path):
    build_2_4("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=Surgeon24Config([LAYER]))


def test_shards(tmp_path):
    model = build_2_4("llama")
    expected = logits(model)
    pack_model(model)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    shards[-1].write_bytes(shards[-1].read_bytes()[:-8])
    with pytest.raises(InputError, match=f"{shards[-1].name}' is damaged or cut short"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.fixture
def checked(tmp_path):
    """Folder that surgeon pack writes."""
    save_folder(tmp_path / "dense", build_2_4("llama", torch.bfloat16))
    pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    return tmp_path / "packed"


def test_the_checksum_of_every_tensor_is_written(checked):
    entry = json.loads((checked / "config.json").read_text())["quantization_config"]
    weights = load_file(checked / "model.safetensors")
    assert entry["sha256"].keys() == weights.keys() and entry["version"] == 1
    for name, about in ((f"{LAYER}.indices", b"U8 [32, 6] "), ("model.norm.weight", b"BF16 [32] ")):
        stored = bytes(weights[name].view(torch.uint8).flatten().tolist())
        assert entry["sha256"][name] == hashlib.sha256(about + stored).hexdigest()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "name",
    [f"{LAYER}.values", f"{LAYER}.indices", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"],
)
@pytest.mark.parametrize("bit", [0, 3, 7])
def test_every_flipped_bit_is_found(checked, name, bit, shards):
    tensors = {key: tensor.view(torch.uint8) for key, tensor in load_file(checked / "model.safetensors").items()}
    dtypes = {key: tensor.dtype for key, tensor in load_file(checked / "model.safetensors").items()}
    place = (tensors[name].shape[0] // 2, *[0] * (tensors[name].ndim - 1))
    tensors[name][place] ^= 1 << bit
    tensors = {key: tensor.view(dtypes[key]) for key, tensor in tensors.items()}
    (checked / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"part-{k}.safetensors": names[k::shards] for k in range(shards)}
    for file, part in files.items():
        save_file({key: tensors[key] for key in part}, checked / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, part in files.items() for key in part}}
    (checked / "model.safetensors.index.json").write_text(json.dumps(index))
    for load in (AutoModelForCausalLM.from_pretrained, lambda folder: load_model(folder, packed=True)):
        with pytest.raises(InputError, match=f"{name} of the packed model is damaged"):
            load(checked)
    tensors[name].view(torch.uint8)[place] ^= 1 << bit
    for file, part in files.items():
        save_file({key: tensors[key] for key in part}, checked / file, {"format": "pt"})
    whole, dense = map(AutoModelForCausalLM.from_pretrained, (checked, checked.with_name("dense")))
    assert torch.equal(logits(whole), logits(dense))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda sums: sums.pop("lm_head.weight"), "lm_head.weight of the packed model is damaged"),
        (lambda sums: sums.update({"lm_head.bias": ""}), "the packed model lacks lm_head.bias"),
        (lambda sums: sums.update({"lm_head.weight": None}), "lm_head.weight of the packed model is damaged"),
    ],
)
def test_checksums_are_those_of_all_tensors(checked, change, words):
    sums = json.loads((checked / "config.json").read_text())["quantization_config"]["sha256"]
    change(sums)
    edit_entry(checked, sha256=sums)
    with pytest.raises(InputError, match=words):
        AutoModelForCausalLM.from_pretrained(checked)
    edit_entry(checked, sha256=["x"])
    with pytest.raises(InputError, match="sha256 of the quantization_config must give a checksum for every tensor"):
        AutoModelForCausalLM.from_pretrained(checked)


def test_a_model_without_checksums_loads_and_that_is_said_once(folder, caplog):
    format_module._say_unchecked.cache_clear()
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(model.get_submodule(LAYER).weight, build_2_4("llama").bfloat16().get_submodule(LAYER).weight)
    assert [record.getMessage() for record in caplog.records if "checksum" in record.getMessage()] == [
        "the packed model has no checksums: damage to it may pass unseen (surgeon pack writes them)"
    ]


def test_a_model_saved_again_in_another_dtype_has_no_stale_checksums(checked, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checked, dtype=torch.float32)
    model.save_pretrained(tmp_path / "wide")
    assert "sha256" not in json.loads((tmp_path / "wide" / "config.json").read_text())["quantization_config"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "wide")), logits(model))


def test_a_name_of_several_lines_is_told_in_one(folder):
    edit_entry(folder, modules=["a\nlayer\x1b[31m"])
    with pytest.raises(InputError, match=r"^a\\nlayer\\x1b\[31m is listed as packed, and the model has no such layer$"):
        AutoModelForCausalLM.from_pretrained(folder)
