"""Checkpoints made from a model of images and text still take images."""

from __future__ import annotations

import contextlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from llm_surgeon import UnsupportedModelError, prune_checkpoint
from llm_surgeon.jobs.compact import compact_checkpoint
from llm_surgeon.jobs.pack import pack_checkpoint
from llm_surgeon.jobs.recover import recover_checkpoint
from tests.surgeon.checkpoints import CHAT, save_folder, tree
from tests.surgeon.tiny_models import VOCABULARY

FILES = {
    "processor_config.json": b'{"processor_class": "Gemma3Processor", "image_seq_length": 4}',
    "preprocessor_config.json": b'{"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 9, "width": 9}}',
    "video_preprocessor_config.json": b'{"fps": 2}',
    "chat_template.json": b'{"chat_template": "x"}',
}


@pytest.fixture
def source(tmp_path):
    """bfloat16, norms in float32, and tensors that transformers renames as it loads and saves them."""
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "sliding_window": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "num_channels": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60, boi_token_index=61,
        eoi_token_index=62,
    )  # fmt: skip
    folder = save_folder(tmp_path / "source", Gemma3ForConditionalGeneration(config).to(torch.bfloat16))
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "norm" in name:
            weights[name] = torch.rand(tensor.shape) / 10
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 59 + 1}" for i in range(800)))
    return folder


def test_the_processor_and_all_but_the_decoder_s_matrices_are_kept(source, tmp_path):
    data = str(tmp_path / "text.txt")
    small = {"calibration": data, "samples": 4, "seqlen": 16, "device": "cpu", "method": "magnitude"}
    sparse, packed, recovered = (tmp_path / name for name in ("sparse", "packed", "recovered"))
    prune_checkpoint(source, sparse, **small)
    pack_checkpoint(sparse, packed)
    training = {"data": data, "device": "cpu", "seqlen": 16, "steps": 1, "batch_size": 2}
    recover_checkpoint(sparse, recovered, method="lora", **training)
    expected = load_file(source / "model.safetensors")
    for folder in (sparse, packed, recovered):
        assert {name: (folder / name).read_bytes() for name in FILES} == FILES
        assert (folder / "chat_template.jinja").read_text() == CHAT
        with contextlib.suppress(ImportError):  # some versions of transformers need torchvision for it
            assert type(AutoImageProcessor.from_pretrained(folder)).__name__.startswith("Gemma3ImageProcessor")
        found = load_file(folder / "model.safetensors")
        for name, tensor in expected.items():
            if "language_model" not in name or "_proj" not in name:
                assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (folder, name)
    pixels = torch.rand(1, 3, 28, 28, dtype=torch.bfloat16)
    model, dense = (AutoModelForCausalLM.from_pretrained(folder) for folder in (sparse, source))
    with torch.no_grad():
        features = [m.get_image_features(pixels).pooler_output for m in (model, dense)]
    assert torch.equal(*features)


@pytest.mark.parametrize("structure", ["groups", "width", "layers", None])
def test_folders_of_several_modalities_keep_their_sizes(source, tmp_path, structure):
    before = tree(tmp_path)
    words = "Gemma3ForConditionalGeneration wraps a language model with others: groups, width and layers cannot leave"
    with pytest.raises(UnsupportedModelError, match=words):
        if structure is None:
            compact_checkpoint(source, tmp_path / "out")
        else:
            small = {"calibration": str(tmp_path / "text.txt"), "samples": 4, "seqlen": 16, "device": "cpu"}
            prune_checkpoint(source, tmp_path / "out", structure=structure, sparsity=0.3, **small)
    assert tree(tmp_path) == before
