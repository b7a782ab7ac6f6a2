"""A model made smaller computes the same when it is loaded again, or is refused before anything is written."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    StableLmConfig,
    StableLmForCausalLM,
)

from llm_surgeon import UnsupportedModelError, prune, prune_checkpoint
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.rebuild import reloaded
from llm_surgeon.structures.find.dimensions import find_dimensions
from llm_surgeon.structures.remove.groups import remove_groups
from llm_surgeon.structures.remove.verify import check_reloads
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.structures.test_find import zero
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

TOKENS = torch.randint(3, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_a_reloaded_model_has_the_same_parameters_and_logits(name):
    model = build(name)
    prune(model, TOKENS, structure="groups", sparsity=0.3, shots=1, reconstruct=False)
    again = reloaded(model)
    pairs = zip(model.named_parameters(), again.named_parameters(), strict=True)
    assert all(x[0] == y[0] and x[1].data_ptr() == y[1].data_ptr() for x, y in pairs)  # no copies
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)


def test_a_class_that_computes_something_else_is_refused():
    model = build("llama")
    for block in model.model.layers:
        block.mlp.act_fn = nn.Tanh()  # the configuration does not say so
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="cannot be loaded again: its class computes other logits"):
        prune(model, TOKENS, structure="groups", sparsity=0.3, shots=1)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(UnsupportedModelError):
        check_reloads(model)


def test_attention_with_a_mask_is_told_all_its_sizes():
    """Without a mask nothing reads the number of repeats: sequences that are padded or cached would fail."""
    config = StableLmConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = StableLmForCausalLM(config).eval()
    decoder = find_decoder(model)
    heads = find_dimensions(model, decoder)[0]
    assert heads.parts == 2 and heads.rule.attributes["self_attn.num_key_value_groups"] == "repeats"
    removed = [(heads, torch.tensor([[False, True], [True, False]]))]  # a query head of each group
    zero(removed)
    remove_groups(model, decoder, removed)
    assert [block.self_attn.num_key_value_groups for block in model.model.layers] == [1, 2]
    mask = torch.ones_like(TOKENS)
    mask[1, :4] = 0
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": mask}
    cached = model.generate(TOKENS, cache_implementation="static", **options)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **options))


@pytest.mark.parametrize("structure", ["groups", "width"])
def test_tensors_that_were_renamed_as_they_were_loaded_keep_their_new_names(structure, tmp_path):
    """GPT-NeoX's checkpoints call the output head ``embed_out``, which the code that comes with ours does not know."""
    save_folder(tmp_path / "dense", build("gpt_neox"))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 60 + 1}" for i in range(400)))
    options = {"structure": structure, "sparsity": 0.25, "shots": 1, "samples": 4, "seqlen": 16}
    prune_checkpoint(tmp_path / "dense", tmp_path / "out", calibration=str(tmp_path / "text.txt"), **options)
    model, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert type(model).__name__ == "PrunedGPTNeoXForCausalLM"
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("structure", ["groups", "width"])
def test_blocks_without_hidden_states_are_refused_by_name(structure):
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    with pytest.raises(UnsupportedModelError, match="a Block takes no hidden_states"):
        prune(model, TOKENS, structure=structure, sparsity=0.3, shots=1)
