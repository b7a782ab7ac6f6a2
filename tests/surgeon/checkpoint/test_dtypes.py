"""Every tensor keeps the dtype that it was stored in, and what was not changed its bits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_surgeon import NumericalError, pack_model, prune, prune_checkpoint
from llm_surgeon.checkpoint import load_model, save_checkpoint
from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.jobs.compact import compact_checkpoint
from llm_surgeon.jobs.pack import pack_checkpoint
from llm_surgeon.jobs.recover import recover_checkpoint
from llm_surgeon.structures.remove.rows_columns import compact
from surgeon_kernels import Packed24, unpack_2_4
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.packed_models import build_2_4
from tests.surgeon.tiny_models import build

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TEXT = " ".join(f"w{i % 60 + 1}" for i in range(800))


def mixed(folder, model, others=("norm",), dtype=torch.float32, main=torch.bfloat16, **options):
    """A checkpoint in ``main``, tensors named like one of ``others`` in ``dtype``, with bits that ``main`` has not."""
    save_folder(folder, model.to(main), **options)
    generator = torch.Generator().manual_seed(0)
    for path in sorted(folder.glob("*.safetensors")):
        weights = load_file(path)
        for name, tensor in weights.items():
            if any(other in name for other in others):
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 1e-3
                weights[name] = (tensor.double() * (1 + noise)).to(dtype)
        save_file(weights, path, {"format": "pt"})
    return folder


def stored(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(found, expected, names):
    assert names
    for name in names:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_what_is_loaded_and_saved_is_the_same_to_the_bit(name, dtype, tmp_path):
    source = mixed(tmp_path / "source", build(name), ("norm", "ln_"), max_shard_size="20KB" if dtype else "5GB")
    model, tokenizer, form = load_model(source, dtype)
    assert form.main == torch.bfloat16 and set(form.others.values()) == {torch.float32}
    save_checkpoint(model, tokenizer, tmp_path / "out", dtype=form, extra_files={})
    found, expected = stored(tmp_path / "out"), stored(source)
    assert found.keys() == expected.keys()
    assert_same(found, expected, expected.keys())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("main", "dtype"), [(torch.float64, torch.float32), (torch.bfloat16, torch.float16), (torch.float16, torch.float64)]
)
def test_other_mixtures(main, dtype, tmp_path):
    source = mixed(tmp_path / "source", build("llama"), ("layers.0", "norm"), dtype, main)
    model, tokenizer, form = load_model(source)
    save_checkpoint(model, tokenizer, tmp_path / "out", dtype=form, extra_files={})
    assert_same(stored(tmp_path / "out"), stored(source), stored(source).keys())


def test_what_was_changed_is_saved_in_the_dtype_it_was_stored_in(tmp_path, caplog):
    source = mixed(tmp_path / "source", build("llama"))
    expected = stored(source)
    model, tokenizer, form = load_model(source, None)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
        model.lm_head.weight[0] = 0.0
    (source / "model.safetensors").unlink()
    save_checkpoint(model, tokenizer, tmp_path / "out", dtype=form, extra_files={})
    found = stored(tmp_path / "out")
    assert torch.equal(found["model.norm.weight"], 2 * expected["model.norm.weight"].bfloat16().float())
    assert found["lm_head.weight"].dtype == torch.bfloat16 and not found["lm_head.weight"][0].any()
    # What cannot be read again is as it is in memory, and that is said.
    name = "model.layers.1.input_layernorm.weight"
    assert torch.equal(found[name], expected[name].bfloat16().float())
    assert f"{name} is saved rounded" in caplog.text


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_pruning_keeps_what_it_does_not_touch(device, tmp_path, text):
    source, out = mixed(tmp_path / "source", build("llama")), tmp_path / "out"
    prune_checkpoint(source, out, method="magnitude", calibration=text, samples=4, seqlen=16, device=device)
    found, expected = stored(out), stored(source)
    assert_same(found, expected, [name for name in expected if "_proj" not in name])
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
    assert ((found["model.layers.0.mlp.up_proj.weight"] == 0).view(-1, 4).sum(1) == 2).all()


def test_blocks_that_change_their_number_keep_their_norms(tmp_path):
    """As on a GPU, where the weights lie in the checkpoint's dtype and norms are rounded."""
    source = mixed(tmp_path / "source", build("llama"))
    model, tokenizer, form = load_model(source, None)
    prune(model, torch.arange(64).view(4, 16), structure="layers", sparsity=0.5, shots=1, reconstruct=False)
    save_checkpoint(model, tokenizer, tmp_path / "out", dtype=form, extra_files={})
    found, expected = stored(tmp_path / "out"), stored(source)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        kept = found[f"model.layers.0.{norm}.weight"]
        assert "model.layers.1.input_layernorm.weight" not in found
        assert any(torch.equal(kept, expected[f"model.layers.{depth}.{norm}.weight"]) for depth in (0, 1))


def test_packing_keeps_everything(tmp_path):
    up = "model.layers.0.mlp.up_proj"
    source = mixed(tmp_path / "source", build_2_4("llama"), ("norm", up))
    report = pack_checkpoint(source, tmp_path / "out")
    assert sorted(report.ignored) == ["lm_head", up] and len(report.modules) == 13
    found, expected = stored(tmp_path / "out"), stored(source)
    assert_same(found, expected, [name for name in expected if "_proj" not in name or up in name])
    for name in report.modules:
        packed = Packed24(found[f"{name}.values"], found[f"{name}.indices"])
        assert torch.equal(unpack_2_4(packed), expected[f"{name}.weight"]), name


def test_recovery_trains_in_float32_and_saves_as_stored(tmp_path, text):
    source = mixed(tmp_path / "source", build_2_4("llama"))
    options = {"data": text, "device": "cpu", "seqlen": 16, "steps": 2, "batch_size": 2, "learning_rate": 1e-2}
    expected = stored(source)
    norms = [name for name in expected if "norm" in name]
    for method in ("full", "lora"):
        recover_checkpoint(source, tmp_path / method, method=method, **options)
        found = stored(tmp_path / method)
        assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
        if method == "lora":  # norms are not trained
            assert_same(found, expected, norms)
        else:
            assert any(not torch.equal(found[name], expected[name]) for name in norms)


def test_compacting_keeps_what_it_does_not_touch(tmp_path):
    model = build("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[:16] = 0.0
            block.mlp.gate_proj.weight[:16] = 0.0
            block.mlp.down_proj.weight[:, :16] = 0.0
    source = mixed(tmp_path / "source", model)
    compact_checkpoint(source, tmp_path / "out")
    found, expected = stored(tmp_path / "out"), stored(source)
    assert found["model.layers.0.mlp.up_proj.weight"].shape == (32, 32)
    assert_same(found, expected, [name for name in expected if "mlp" not in name])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_few_weights_of_eight_bits_are_refused(dtype, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    source = mixed(tmp_path / "source", build("llama"), (name,), dtype)
    with pytest.raises(UnsupportedModelError, match=rf"stores {name} as F8_\w+, and its configuration does not say"):
        load_model(source)


def test_a_few_integer_weights_are_refused(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    source = mixed(tmp_path / "source", build("llama"), (name,), torch.int8)
    with pytest.raises(UnsupportedModelError, match=f"stores {name} as I8"):
        load_model(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
def test_nan_and_infinity_are_refused_by_name(name, value, tmp_path):
    source = save_folder(tmp_path / "source", build_2_4("llama", torch.bfloat16))
    weights = load_file(source / "model.safetensors")
    weights[name].view(-1)[-1] = value  # a token, or a channel, that no text needs
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    attempts = (
        load_model,
        lambda folder: pack_checkpoint(folder, tmp_path / "out"),
        lambda folder: compact_checkpoint(folder, tmp_path / "out"),
        lambda folder: pack_model(AutoModelForCausalLM.from_pretrained(folder)),
        lambda folder: compact(AutoModelForCausalLM.from_pretrained(folder)),
        lambda folder: prune(AutoModelForCausalLM.from_pretrained(folder), torch.arange(32).view(2, 16)),
    )
    for attempt in attempts:
        with pytest.raises(NumericalError, match=f"^{name} holds NaN or infinity$"):
            attempt(source)
    assert not (tmp_path / "out").exists()
