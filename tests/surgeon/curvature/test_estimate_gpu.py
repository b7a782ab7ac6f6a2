"""Curvature on a CUDA device, where the Gram kernel runs in the hooks, against the CPU's."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from llm_surgeon.curvature.estimate import estimate_curvature
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.passes import compute_dtype, mean_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Of both kinds of storage.
SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 100}
LLAMA = LlamaConfig(intermediate_size=2180, **SIZES)
OPT = OPTConfig(ffn_dim=2048, word_embed_proj_dim=64, max_position_embeddings=128, **SIZES)
# Where rounding moves a ReLU's input past zero, a gradient changes altogether: on CPUs G of v_proj by 0.047 in bfloat16
# passes, and with this by 0.007.
SMOOTH = OPTConfig(
    activation_function="gelu", ffn_dim=2048, word_embed_proj_dim=64, max_position_embeddings=128, **SIZES
)


@pytest.mark.parametrize(("config", "padded"), [(LLAMA, False), (OPT, True)], ids=["llama", "opt, padded"])
def test_factors_are_those_of_the_cpu(config, padded):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    ids = torch.randint(3, 100, (6, 60))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[0, :40] = False
        mask[3, 50:] = False
    calibration = Calibration(ids, mask if padded else None)
    expected = estimate_curvature(model, find_decoder(model), calibration, batch_size=3)
    on_cpu = {linear.name: expected.factors(linear) for linear in find_decoder(model).linears}
    model.cuda()
    actual = estimate_curvature(model, find_decoder(model), calibration, batch_size=2)
    assert actual.tokens == expected.tokens
    assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
    for linear in find_decoder(model).linears:
        for computed, wanted in zip(actual.factors(linear), on_cpu[linear.name], strict=True):
            assert (computed.cpu() - wanted).norm() <= 1e-4 * wanted.norm(), linear.name


# A label that is drawn otherwise, where two were about as likely, changes the gradients of its token altogether.
@pytest.mark.parametrize(
    ("config", "padded", "fisher", "close"),
    [
        (LLAMA, False, "empirical", 0.03),
        (LLAMA, False, "sampled", 0.3),
        (SMOOTH, True, "empirical", 0.03),
        (SMOOTH, True, "sampled", 0.3),
    ],
)
def test_bfloat16_passes_of_a_float32_model(config, padded, fisher, close):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval().cuda()
    ids = torch.randint(3, 100, (6, 60))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[3, 50:] = not padded
    decoder, calibration = find_decoder(model), Calibration(ids, mask if padded else None)
    options = {"batch_size": 3, "fisher": fisher, "squared_norms": True}
    expected = estimate_curvature(model, decoder, calibration, **options)
    dtype = compute_dtype("auto", model, torch.device("cuda"))
    assert dtype == torch.bfloat16
    actual = estimate_curvature(model, decoder, calibration, **options, dtype=dtype)
    assert actual.loss == pytest.approx(expected.loss, rel=1e-3)
    assert mean_loss(model, calibration, 4, dtype) == pytest.approx(actual.loss, rel=1e-4)
    for linear in decoder.linears:
        for computed, wanted in zip(actual.factors(linear), expected.factors(linear), strict=True):
            assert computed.dtype == torch.float32 and not torch.equal(computed, wanted)
            assert (computed - wanted).norm() <= close * wanted.norm(), linear.name
        norms, wanted = actual.squared_norms[linear.name], expected.squared_norms[linear.name]
        assert (norms - wanted).norm() <= close * wanted.norm(), linear.name
