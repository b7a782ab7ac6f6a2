"""The sequential update on a CUDA device."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_surgeon import Calibration, prune
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.writers import find_writers
from tests.surgeon.methods.test_sequential import DOUBLE, TOKENS, moments, relative_error
from tests.surgeon.tiny_models import NAMES, build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_moments_are_those_of_the_cpu(name, dtype, bound):
    for actual, expected in zip(moments(name, dtype, "cuda"), moments(name, DOUBLE), strict=True):
        assert relative_error(actual, expected) < bound


@pytest.mark.parametrize("name", NAMES)
def test_writers_are_those_of_the_cpu(name):
    found = []
    for device in ("cpu", "cuda"):
        model = build(name, torch.bfloat16).to(device)
        found.append(find_writers(model, find_decoder(model)))
    assert found[0].keys() == found[1].keys()
    assert list(found[1].values()) == pytest.approx(list(found[0].values()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "gpt2", "qwen2"])
def test_models_are_2_4_and_cost_what_they_do_on_the_cpu(name, dtype):
    predicted = []
    for device in ("cpu", "cuda"):
        model = build(name, dtype).to(device)
        report = prune(model, TOKENS, update="sequential", fisher="empirical")  # labels are drawn otherwise there
        predicted.append(report.shots[0].predicted_increase)
        for linear in find_decoder(model).linears:
            assert bool(((linear.weight == 0).unflatten(1, (-1, 4)).sum(dim=2) == 2).all()), linear.name
    # Of two weights that cost the same, rounding chooses.
    assert predicted[1] == pytest.approx(predicted[0], rel=0.1)


def test_single_weights_go_by_their_exact_number():
    model = build("opt").cuda()
    report = prune(model, TOKENS, structure="unstructured", sparsity=0.6, update="sequential")
    zeros = [int((linear.weight == 0).sum()) for linear in find_decoder(model).linears]
    assert zeros == [layer.removed for layer in report.layers]
    assert sum(zeros) == round(0.6 * sum(layer.weights for layer in report.layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_on_two_devices_become_what_they_do_on_one(dtype):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    dispatch_model = pytest.importorskip("accelerate").dispatch_model
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1}
    places |= {"model.rotary_emb": 1, "lm_head": 1}
    one, two = build("llama", dtype).cuda(), dispatch_model(build("llama", dtype), places)
    assert find_writers(two, find_decoder(two)).keys() == find_writers(one, find_decoder(one)).keys()
    options = {"update": "sequential", "batch_size": 4, "fisher": "empirical", "compute_dtype": "float32"}
    reports = [prune(model, TOKENS, **options) for model in (one, two)]
    assert {linear.weight.device.index for linear in find_decoder(two).linears} == {0, 1}
    # accelerate wraps every module, and fused kernels leave such alone: what is rounded to bfloat16 is other by a bit.
    close = {torch.float32: 1e-4, torch.bfloat16: 0.02}[dtype]
    assert reports[1].shots[0].predicted_increase == pytest.approx(reports[0].shots[0].predicted_increase, rel=close)
    for ours, theirs in zip(find_decoder(two).linears, find_decoder(one).linears, strict=True):
        assert int((ours.weight == 0).sum()) == int((theirs.weight == 0).sum()) == theirs.weight.numel() // 2
        if dtype == torch.float32:
            assert (ours.weight.cpu() - theirs.weight.cpu()).norm() < 1e-3 * theirs.weight.norm().cpu()


@pytest.mark.parametrize("options", [{}, {"gradient_steps": 1}, {"structure": "groups", "sparsity": 0.25}])
def test_a_run_repeats_to_the_bit(options):
    # Attention's kernels add up in any order only where a window has several of their blocks.
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": 2}
    ids, mask = torch.randint(0, 512, (4, 512)), torch.ones(4, 512, dtype=torch.bool)
    mask[1, 300:] = False
    for data in (Calibration(ids), Calibration(ids, mask)):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            config = LlamaConfig(vocab_size=512, max_position_embeddings=512, **sizes)
            models.append(LlamaForCausalLM(config).bfloat16().cuda())
            prune(models[-1], data, **options)
        for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(ours, theirs)
