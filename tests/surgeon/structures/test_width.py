"""Channels of the residual stream: found everywhere, removed exactly."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, OPTConfig, PersimmonConfig, PersimmonForCausalLM

from llm_surgeon import InputError, NumericalError, PruneConfig, UnsupportedModelError, prune
from llm_surgeon.config.prune import IMPORTANCES
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.structures.find.residual import find_residual, kept_width
from llm_surgeon.structures.remove.channels import remove_channels, zero_channels
from llm_surgeon.structures.remove.verify import probe_logits
from tests.surgeon.tiny_models import VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
NAMES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gpt_neox")


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def untied_opt():
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def model_of(name):
    return untied_opt() if name == "opt" else build(name)


def zeroed(model, removed):
    """Channels taken out of the stream and of everything that reads it."""
    residual = find_residual(model, find_decoder(model))
    for reader in residual.readers:
        matrix = reader.matrix(torch.float64)
        matrix[:, : reader.columns][:, removed] = 0.0
        reader.write(matrix)
    if not residual.tied:
        with torch.no_grad():
            residual.head.weight[:, removed] = 0.0
    zero_channels(residual, removed)
    return residual


@pytest.mark.parametrize("name", [*NAMES, "opt"])
def test_zero_channels_and_channels_removed_agree(name, tmp_path):
    model = model_of(name).double()
    removed = torch.zeros(32, dtype=torch.bool)
    removed[[1, 2, 7, 9, 15, 20, 30, 31]] = True
    residual = zeroed(model, removed)
    before, parameters = logits(model), sum(p.numel() for p in model.parameters())
    remove_channels(model, find_decoder(model), residual, removed)
    # RMS norms compute in float32.
    torch.testing.assert_close(logits(model), before, rtol=0.0, atol=1e-5)
    assert model.config.hidden_size == 24 and sum(p.numel() for p in model.parameters()) < 0.8 * parameters
    assert bool(torch.isfinite(before).all()) and float(before.std()) > 0.0
    model.save_pretrained(tmp_path)
    own = hasattr(model, "is_pruned")
    assert own == (name in ("opt", "gpt_neox"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, trust_remote_code=own)
    torch.testing.assert_close(logits(loaded), before, rtol=0.0, atol=1e-5)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(TOKENS, **options), loaded.generate(TOKENS, use_cache=False, **options))


def test_a_head_tied_to_the_embedding_keeps_its_logits():
    """The embedding is scaled where the stream is written, and with it the head: the last norm takes that back."""
    config = build("llama").config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    removed = torch.arange(32) % 4 == 1
    residual = zeroed(model, removed)
    assert residual.tied
    before = logits(model)
    remove_channels(model, find_decoder(model), residual, removed)
    torch.testing.assert_close(logits(model), before, rtol=0.0, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.shape == (VOCABULARY, 24)


def test_every_reader_writer_and_norm_is_found():
    model = build("llama")
    residual = find_residual(model, find_decoder(model))
    assert {x.kind.rpartition(".")[2] for x in residual.readers} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
    }
    assert {x.kind.rpartition(".")[2] for x in residual.writers} == {"o_proj", "down_proj"}
    assert len(residual.norms) == 5 and residual.final_norm is model.model.norm
    assert residual.embeddings == [model.model.embed_tokens]


@pytest.mark.parametrize("name", [*NAMES, "opt"])
def test_whole_runs_report_what_they_removed(name):
    model = model_of(name)
    before = sum(x.rows * x.columns for x in find_decoder(model).linears)
    report = prune(model, TOKENS, structure="width", sparsity=0.2, shots=2)
    after = sum(x.rows * x.columns for x in find_decoder(model).linears)
    assert (report.weights, report.removed) == (before, before - after)
    assert report.sparsity == pytest.approx(0.25)  # 24 is the widest multiple of four heads within 0.8 * 32
    assert [shot.predicted_increase > 0.0 for shot in report.shots] == [True, True]


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance_narrows(importance):
    model = build("llama")
    prune(model, TOKENS, structure="width", sparsity=0.25, importance=importance)
    assert model.config.hidden_size == 24


def test_compensation_helps():
    dense, distances = logits(build("llama")), []
    for update in ("none", "joint"):
        model = build("llama")
        prune(model, TOKENS, structure="width", sparsity=0.25, shots=1, update=update)
        distances.append(float((logits(model) - dense).norm()))
    assert distances[1] < distances[0]


def test_widths_divide_by_heads_and_rounding():
    model = build("llama")
    residual = find_residual(model, find_decoder(model))
    assert kept_width(residual, 0.3, 1, 4, 0.02) == 20
    assert kept_width(residual, 0.3, 8, 4, 0.02) == 16
    with pytest.raises(InputError, match="multiple of 64"):
        kept_width(residual, 0.3, 64, 4, 0.02)
    with pytest.raises(InputError, match=r"at least 0\.5"):
        kept_width(residual, 0.45, 1, 12, 0.5)


@pytest.mark.parametrize(
    "name, error, words", [("gemma", NumericalError, "keep its width"), ("gpt2", InputError, "tied")]
)
def test_what_cannot_be_narrowed_is_refused_and_left_as_it_was(name, error, words, monkeypatch):
    if error is NumericalError:  # a model whose narrower self computes something else
        monkeypatch.setattr(
            "llm_surgeon.structures.remove.channels.probe_logits", lambda model: 2.0 * probe_logits(model)
        )
    model = build(name)
    state, before = copy.deepcopy(model.state_dict()), logits(model)
    with pytest.raises(error, match=words):
        prune(model, TOKENS, structure="width", sparsity=0.25, shots=1)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), before) and not hasattr(model, "is_pruned")


def test_blocks_cannot_be_skipped():
    with pytest.raises(InputError, match="skip_layers has no meaning for structure 'width'"):
        PruneConfig(structure="width", skip_layers="0")


def small(prefix, **options):
    """A random model of a class of transformers with the usual sizes, norms included."""
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("prefix", ["Gemma2", "Nemotron"])
def test_norms_behind_writers_and_weights_with_one_added(prefix, tmp_path):
    """Gemma 2 norms what it adds to the stream, multiplies its embedding by the root of the width and its norms by
    ``1 + weight``; Nemotron does the last with layer norms."""
    model = small(prefix)
    residual = find_residual(model, find_decoder(model))
    assert set(residual.offsets.values()) == {1.0} and residual.centred == (prefix == "Nemotron")
    assert (len(residual.norms), len(residual.output_norms)) == ((5, 4) if prefix == "Gemma2" else (5, 0))
    removed = torch.arange(32) % 4 == 1
    residual = zeroed(model, removed)
    before = logits(model)
    remove_channels(model, find_decoder(model), residual, removed)
    torch.testing.assert_close(logits(model), before, rtol=0.0, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert model.config.hidden_size == 24 and not hasattr(model, "is_pruned")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize(
    "prefix, words",
    [("Olmo2", r"layers\.0\.self_attn\.q_proj reads the residual stream without a norm"), ("Cohere", "is tied to the")],
)
def test_streams_that_cannot_be_narrowed_are_refused_before_anything_is_done(prefix, words):
    model = small(prefix)
    with pytest.raises(InputError, match=words):
        find_residual(model, find_decoder(model))


def test_a_model_that_could_not_be_loaded_again_is_left_as_it_was():
    """Its configuration cannot tell that the norms of a head keep their width."""
    config = PersimmonConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = PersimmonForCausalLM(config).eval()
    before = logits(model)
    with pytest.raises(UnsupportedModelError, match=r"cannot be loaded again: its class builds .*layernorm"):
        prune(model, TOKENS, structure="width", sparsity=0.25, shots=1)
    assert torch.equal(logits(model), before) and model.config.hidden_size == 32
