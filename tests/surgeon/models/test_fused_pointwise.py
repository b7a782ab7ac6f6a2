from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from llm_surgeon.inference import pack_model
from llm_surgeon.models.fused_pointwise import fused_pointwise, is_rms_norm, is_rotary, is_swiglu
from tests.surgeon.curvature.test_estimate import tokens
from tests.surgeon.packed_models import IDS, build_2_4, logits
from tests.surgeon.tiny_models import NAMES, build

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_the_same(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False

    def results() -> list[Tensor]:
        embeddings: list[Tensor] = []
        handle = model.get_input_embeddings().register_forward_hook(
            lambda _, args, y: embeddings.append(y.detach().requires_grad_()) or embeddings[0]
        )
        logits = model(input_ids=tokens(3, 7), attention_mask=mask, use_cache=False).logits
        handle.remove()
        return [logits, *torch.autograd.grad(logits.float().square().sum(), embeddings)]

    expected = results()
    with fused_pointwise(model):
        actual = results()
        swapped = replaced(model)
    # On a CPU these are the very operations of transformers.
    for theirs, ours in zip(expected, actual, strict=True):
        torch.testing.assert_close(ours, theirs)
    kinds = {part.rpartition(".")[2] for part in swapped}
    assert ("input_layernorm" in kinds) == (name in (*LLAMA_LIKE, "phi3"))
    assert ("mlp" in kinds) == (name in LLAMA_LIKE)
    assert not replaced(model)


def test_every_part_of_a_llama_is_replaced_and_put_back() -> None:
    model = build("llama")
    rotary = modeling_llama.apply_rotary_pos_emb
    with pytest.raises(RuntimeError, match="in between"), fused_pointwise(model):
        assert len(replaced(model)) == 2 * 3 + 1
        assert modeling_llama.apply_rotary_pos_emb is not rotary
        raise RuntimeError("in between")
    assert not replaced(model)
    assert modeling_llama.apply_rotary_pos_emb is rotary


def test_a_packed_model_has_the_same_parts() -> None:
    model = build_2_4("llama", torch.bfloat16)
    expected = logits(model)
    with fused_pointwise(model):
        dense = replaced(model)
    pack_model(model)
    with fused_pointwise(model):
        assert replaced(model) == dense
        assert torch.equal(logits(model), expected)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert torch.equal(compiled(IDS).logits, expected)


def test_hooks_fire_as_before_and_not_for_the_trial() -> None:
    model = build("llama")
    seen: list[str] = []
    for name, module in model.named_modules():
        if not name.endswith("layers.0.mlp.act_fn"):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(input_ids=tokens(2, 5), use_cache=False)
    expected, seen[:] = list(seen), []
    with fused_pointwise(model):
        assert not seen
        assert "model.layers.0.mlp" in replaced(model)
        assert "model.layers.1.mlp" not in replaced(model)  # its activation has a hook
        model(input_ids=tokens(2, 5), use_cache=False)
    assert seen == expected


def test_a_forward_of_somebody_else_is_left_alone() -> None:
    model = build("llama")
    norm = model.model.norm
    norm.forward = own = lambda x: 2.0 * x
    with fused_pointwise(model):
        assert norm.forward is own
    assert norm.forward is own


def test_random_numbers_are_not_drawn() -> None:
    model = build("llama")
    state = torch.get_rng_state()
    with fused_pointwise(model):
        assert torch.equal(torch.get_rng_state(), state)


class OffsetNorm(modeling_llama.LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 + self.weight) / self.weight


class NormPlusBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def test_norms_are_told_apart() -> None:
    assert is_rms_norm(modeling_llama.LlamaRMSNorm(16))
    assert is_rms_norm(nn.RMSNorm(16, eps=1e-5))
    assert is_rms_norm(modeling_llama.LlamaRMSNorm(16).bfloat16())
    assert not is_rms_norm(nn.RMSNorm(16))  # its epsilon is that of a dtype
    assert not is_rms_norm(OffsetNorm(16))
    assert not is_rms_norm(NormPlusBias())
    assert not is_rms_norm(nn.LayerNorm(16))
    assert not is_rms_norm(nn.LayerNorm(16, bias=False))
    assert not is_rms_norm(nn.Linear(4, 4, bias=False))


def test_feed_forward_layers_are_told_apart() -> None:
    model = build("llama")
    mlp = model.model.layers[0].mlp
    assert is_swiglu(mlp)
    mlp.act_fn = nn.GELU()
    assert not is_swiglu(mlp)
    mlp.act_fn = nn.SiLU()
    assert is_swiglu(mlp)
    mlp.extra = nn.Linear(2, 2)
    assert not is_swiglu(mlp)


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turn(x: Tensor) -> Tensor:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * cos.unsqueeze(1) + other * sin.unsqueeze(1)

    return turn(q), turn(k)


def test_rotary_embeddings_are_told_apart() -> None:
    assert is_rotary(modeling_llama.apply_rotary_pos_emb)
    assert not is_rotary(interleaved)
    assert not is_rotary(lambda q, k, cos, sin, positions: (q, k))
    assert not is_rotary(None)


def test_other_calls_of_a_rotary_embedding_go_to_the_original() -> None:
    q, k, angles = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8), torch.randn(2, 5, 8)
    source = sys.modules[modeling_llama.__name__]
    expected = source.apply_rotary_pos_emb(q, k, angles, angles, unsqueeze_dim=2)
    with fused_pointwise(build("llama")):
        actual = source.apply_rotary_pos_emb(q, k, angles, angles, unsqueeze_dim=2)
    for theirs, ours in zip(expected, actual, strict=True):
        assert torch.equal(ours, theirs)
