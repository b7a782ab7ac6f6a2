"""Models that are wrapped, adapted, multimodal or headless: unwrapped, pruned in part, or refused by name."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group

from llm_surgeon import InputError, UnsupportedModelError, pack_model, perplexity, prune, unpack_model
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.wrappers import unwrapped
from llm_surgeon.progress import Progress
from llm_surgeon.recovery.recover import recover
from llm_surgeon.structures.remove.rows_columns import compact
from surgeon_kernels import is_2_4
from tests.surgeon.tiny_models import VOCABULARY, build, build_multimodal

TOKENS = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
QUICK = {"2:4": {"shots": 1}, "groups": {"sparsity": 0.3, "shots": 1}, "layers": {"sparsity": 0.5}}
RECOVERY = {"steps": 1, "batch_size": 2, "warmup_steps": 0, "eval_every": 1}


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def same(x, y):
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.fixture
def process_group():
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    destroy_process_group()


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def with_compiled_blocks(model):
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": compiled_in_place,
    "compiled blocks": with_compiled_blocks,
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize(
    "wrapper, structure",
    [
        ("compiled", "groups"),
        ("compiled in place", "2:4"),
        ("compiled blocks", "layers"),
        ("DataParallel", "groups"),
        ("both", "2:4"),
    ],
)
def test_wrappers_are_taken_off_and_show_the_pruned_model(wrapper, structure):
    plain, model = build("llama"), build("llama")
    wrapped = WRAPPERS[wrapper](model)
    dense = logits(wrapped)  # compiles
    assert unwrapped(wrapped) is model
    expected = prune(plain, TOKENS, structure=structure, **QUICK[structure])
    report = prune(wrapped, TOKENS, structure=structure, **QUICK[structure])
    assert same(model.state_dict(), plain.state_dict()) and type(model).__name__ == type(plain).__name__
    assert report.layers == expected.layers and report.model == expected.model
    torch.testing.assert_close(logits(wrapped), logits(plain), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(wrapped), dense)
    assert perplexity(wrapped, TOKENS) == pytest.approx(perplexity(plain, TOKENS), rel=1e-5)


@pytest.mark.parametrize("wrapper", ["compiled", "DataParallel"])
def test_wrapped_models_are_recovered_packed_and_compacted(wrapper):
    model = build("llama")
    wrapped = WRAPPERS[wrapper](model)
    prune(wrapped, TOKENS, method="magnitude")
    recover(wrapped, TOKENS, TOKENS, teacher=WRAPPERS[wrapper](build("llama")), **RECOVERY)
    assert all(is_2_4(linear.weight) for linear in find_decoder(model).linears)
    before = logits(model)
    assert len(pack_model(wrapped).modules) == 14
    unpack_model(wrapped)
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, :16] = 0.0
    assert compact(wrapped).neurons == 32


def test_distributed_models_keep_their_sizes(process_group):
    model, plain = build("llama"), build("llama")
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(InputError, match="DistributedDataParallel keeps the sizes of its parameters"):
        prune(wrapped, TOKENS, structure="groups", sparsity=0.3)
    assert same(model.state_dict(), plain.state_dict())
    prune(wrapped, TOKENS, shots=1)
    prune(plain, TOKENS, shots=1)
    assert same(model.state_dict(), plain.state_dict())


class FullyShardedDataParallel(nn.Module):  # stands for torch's, which wants a process group and an accelerator
    def __init__(self, module):
        super().__init__()
        self.module = module


def wrapped_block(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def with_adapter(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))


def with_native_adapter(model):
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["down_proj"]))
    return model


def with_ia3(model):
    return peft.get_peft_model(model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))


def with_prompt(model):
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


ADAPTED = {
    "lora": with_adapter,
    "a module that is saved": lambda model: with_adapter(model, modules_to_save=["lm_head"]),
    "native": with_native_adapter,
    "ia3": with_ia3,
    "prompt": with_prompt,
    "compiled": lambda model: torch.compile(with_adapter(model), backend="eager"),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_are_to_be_merged_first(kind):
    model = ADAPTED[kind](build("llama"))
    before = copy.deepcopy(model.state_dict())
    calls = {
        "find_decoder": lambda: find_decoder(unwrapped(model)),
        "prune": lambda: prune(model, TOKENS),
        "groups": lambda: prune(model, TOKENS, structure="groups", sparsity=0.3),
        "recover": lambda: recover(model, TOKENS, TOKENS, **RECOVERY),
        "pack": lambda: pack_model(model),
        "compact": lambda: compact(model),
    }
    for call in calls.values():
        with pytest.raises(UnsupportedModelError, match=r" holds an adapter: merge it first"):
            call()
    assert same(model.state_dict(), before)


def test_a_merged_adapter_is_pruned_with_the_weights():
    merged = with_adapter(build("llama")).merge_and_unload()
    assert len(find_decoder(merged).linears) == 14
    prune(merged, TOKENS, shots=1)
    assert all(is_2_4(linear.weight) for linear in find_decoder(merged).linears)


def short_head(model):
    model.lm_head = nn.Linear(32, VOCABULARY - 10, bias=False)
    return model


def under_inference_mode(_):
    with torch.inference_mode():
        return build("llama")


def with_inference_buffer(model):
    with torch.inference_mode():
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.clone()
    return model


def of_task(task):
    return lambda model: getattr(transformers, f"LlamaFor{task}")(model.config).eval()


REFUSED = {
    "token classifier": (of_task("TokenClassification"), r"^LlamaForTokenClassification has no output head over the"),
    "sequence classifier": (
        of_task("SequenceClassification"),
        r"^LlamaForSequenceClassification gives no logits for",
    ),
    "question answering": (of_task("QuestionAnswering"), r"^LlamaForQuestionAnswering gives no logits for every token"),
    "without a head": (lambda model: model.model, r"^LlamaModel gives no logits for every token: load a causal langua"),
    "short head": (short_head, r"63, (but the vocabulary|and the model's output head) has 54$"),
    "inference mode": (under_inference_mode, r"^model.embed_tokens.weight was made under torch.inference_mode"),
    "inference buffer": (with_inference_buffer, r"^model.rotary_emb.inv_freq was made under torch.inference_mode"),
    "meta": (lambda model: model.to("meta"), r"^parameter model.embed_tokens.weight is on the meta device: load the"),
    "no transformers model": (lambda model: nn.Sequential(nn.Linear(4, 4)), r"^Sequential is no model of transformers"),
    "sharded": (FullyShardedDataParallel, r"^the model is wrapped in a FullyShardedDataParallel: take the module out"),
    "wrapped block": (wrapped_block, r"^model\.layers\.1 is wrapped in a OptimizedModule: take the module out"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_causal_model_is_refused_in_a_sentence(kind):
    make, words = REFUSED[kind]
    model = make(build("llama"))
    tokens = torch.full((4, 12), VOCABULARY - 1)
    tokens[:, ::2] = TOKENS[:, ::2]
    calls = [
        lambda: prune(model, tokens),
        lambda: prune(model, tokens, structure="groups", sparsity=0.3),
        lambda: recover(model, tokens, tokens, **RECOVERY),
    ]
    if kind in ("token classifier", "sequence classifier", "question answering", "without a head", "short head"):
        calls.append(lambda: perplexity(model, tokens))
    if kind == "short head":
        del calls[1]  # nothing builds it smaller, which is found before
    for call in calls:
        with pytest.raises(InputError, match=words) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_models_built_under_inference_mode_have_a_perplexity():
    assert perplexity(under_inference_mode(None), TOKENS) == perplexity(build("llama"), TOKENS)


@pytest.mark.parametrize("family, prefix", [("gemma3", "model.language_model."), ("llava", "model.language_model.")])
@pytest.mark.parametrize("structure", ["2:4", "unstructured", "rows-columns"])
def test_the_decoder_of_a_multimodal_model_is_pruned_alone(family, prefix, structure):
    model = build_multimodal(family)
    parts = {name.split("layers")[0]: 0 for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parts[name.split("layers")[0]] += parameter.numel()
    assert max(parts, key=parts.get).startswith("model.vision_tower")
    before = copy.deepcopy(model.state_dict())
    report = prune(model, TOKENS, structure=structure, sparsity=None if structure == "2:4" else 0.2, shots=1)
    assert len(report.layers) == 14 and all(layer.name.startswith(f"{prefix}layers.") for layer in report.layers)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(f"{prefix}layers.") for name in changed)
    wanted = 0.5 if structure == "2:4" else 0.2
    assert report.sparsity == pytest.approx(wanted, abs=0.02)
    for layer in report.layers:
        assert int((model.get_submodule(layer.name).weight == 0).sum()) == layer.removed


@pytest.mark.parametrize("family, name", [("gemma3", "Gemma3"), ("llava", "Llava")])
def test_multimodal_models_keep_their_sizes(family, name):
    model = build_multimodal(family)
    before = copy.deepcopy(model.state_dict())
    words = f"^{name}ForConditionalGeneration wraps a language model with others: groups, width and layers cannot leave"
    for structure in ("groups", "width", "layers"):
        with pytest.raises(UnsupportedModelError, match=words):
            prune(model, TOKENS, structure=structure, sparsity=0.3)
    with pytest.raises(UnsupportedModelError, match=words):
        compact(model)
    assert same(model.state_dict(), before)


def test_a_model_that_scales_its_embeddings_in_place_is_pruned():
    model = build("ctrl")
    prune(model, TOKENS, shots=1)
    assert all(is_2_4(linear.weight) for linear in find_decoder(model).linears)


def test_the_true_reason_is_named_for_stacked_matrices():
    with pytest.raises(UnsupportedModelError, match="is a stack of 4 matrices: block-diagonal or otherwise stacked"):
        find_decoder(build("recurrent_gemma"))


class NoShots(Progress):
    def shot(self, index):
        raise AssertionError("a shot began")

    phase = shot


@pytest.mark.parametrize(
    "name, structure, words",
    [
        ("gemma4_text", "layers", "Gemma4ForCausalLM does not run at these sizes"),
        ("gpt2", "width", "GPT2LMHeadModel does not run at these sizes"),
    ],
)
def test_classes_that_do_not_run_at_smaller_sizes_are_refused_before_the_shots(name, structure, words):
    model = build(name)
    if name == "gpt2":  # a head of its own, for a tied one is refused for another reason
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    before, config = copy.deepcopy(model.state_dict()), model.config.to_json_string()
    with pytest.raises(UnsupportedModelError, match=words):
        prune(model, TOKENS, structure=structure, sparsity=0.3, progress=NoShots())
    assert same(model.state_dict(), before) and model.config.to_json_string() == config
    assert type(model).__name__ == {"gemma4_text": "Gemma4ForCausalLM", "gpt2": "GPT2LMHeadModel"}[name]


@pytest.mark.skipif(not hasattr(transformers, "Qwen3_5TextConfig"), reason="a newer architecture")
def test_attention_whose_queries_are_twice_as_wide_keeps_its_heads():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["full_attention"] * 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.Qwen3_5TextConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="Qwen3_5ForCausalLM does not run at these sizes"):
        prune(model, TOKENS, structure="groups", sparsity=0.3, progress=NoShots())
    assert same(model.state_dict(), before) and type(model) is transformers.Qwen3_5ForCausalLM
