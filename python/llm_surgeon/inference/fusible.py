"""Models that decode by :class:`~llm_surgeon.inference.fused_passes.FusedPasses`, found by trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from llm_surgeon.formats.packed_linear import PackedLinear
from llm_surgeon.models.fused_pointwise import has_own_forward
from llm_surgeon.models.trial import numbers, shallow_copy, small_linear
from surgeon_kernels.block_ops.decode_attention import decode_attention_reference

if TYPE_CHECKING:  # it would bring transformers' models, which bring this: see _registration.py
    from transformers import PreTrainedModel

_TRUNK = {"embed_tokens", "layers", "norm", "rotary_emb"}
_BLOCK = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
# Of scaled products with an additive mask, the same for all: other kernels have masks of their own.
_ATTENTIONS = ("eager", "sdpa")
# Angles that depend on how long the sequence has become.
_MOVING_ANGLES = ("dynamic", "longrope")
# Where attention that is scaled by its position would show it: angles alone tell of positions in the equations.
_FAR = 10_000_000
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
Norm = Callable[[Tensor], Tensor]


def unfused_part(model: PreTrainedModel, length: int) -> str | None:
    """Name what keeps ``model`` from fused passes over up to ``length`` tokens; None where nothing does.

    A block whose modules are replaced by small linears must compute the equations of
    :mod:`~llm_surgeon.inference.fused_passes`, and the model without its blocks what embedding, norm and head compute
    one after the other. So models are left out that take norms after a layer or of all heads at once, scale their
    residuals or logits, rotate a part of each head, route to experts with more than one result, or look through a
    sliding window; and modules that somebody hooked or whose ``forward`` somebody replaced.
    """
    trunk: Any = model.base_model
    if trunk is model or set(trunk._modules) != _TRUNK or trunk._parameters:
        return "the model's parts"
    if len({tensor.device for tensor in (*model.parameters(), *model.buffers())}) != 1:
        return "weights on several devices"
    if model.config._attn_implementation not in _ATTENTIONS:
        return f"attention by {model.config._attn_implementation}"
    for index, block in enumerate(trunk.layers):  # of one class, they may still differ
        if not _is_plain_block(block) or _sizes(block) != _sizes(trunk.layers[0]):
            return f"block {index}"
    layers = StaticCache(config=model.config, max_cache_len=length).layers
    if len(layers) != len(trunk.layers) or any(
        not isinstance(layer, StaticLayer) or layer.max_cache_len < length for layer in layers
    ):
        return "a sliding window"  # that is shorter
    if getattr(trunk.rotary_emb, "rope_type", "default") in _MOVING_ANGLES:
        return "rotary angles that depend on the length"
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    cos, _ = trunk.rotary_emb(torch.zeros(1, dtype=model.dtype, device=model.device), ids)
    if cos.shape[-1] != head_shape(trunk.layers[0].self_attn)[2]:
        return "rotary angles of a part of each head"
    return None if _is_plain_outside(model, trunk) else "what is computed before and after the blocks"


def _sizes(block: Any) -> tuple[float, ...]:
    return *head_shape(block.self_attn), block.self_attn.scaling


def head_shape(attention: Any) -> tuple[int, int, int]:
    """Query heads, heads of keys and values, and the dimension of each, of a module that :func:`unfused_part`
    allows."""
    dim = attention.head_dim
    return attention.q_proj.out_features // dim, attention.k_proj.out_features // dim, dim


def _is_plain_block(block: Any) -> bool:
    if set(block._modules) != _BLOCK or block._parameters or has_own_forward(block) or _hooked(block):
        return False
    attention = block.self_attn
    normed = set(attention._modules) == _LINEARS | _HEAD_NORMS
    if not (normed or set(attention._modules) == _LINEARS) or attention._parameters:
        return False
    if has_own_forward(attention) or _hooked(attention):
        return False
    if any(not isinstance(attention._modules[name], (nn.Linear, PackedLinear)) for name in _LINEARS):
        return False
    if not isinstance(getattr(attention, "scaling", None), float) or not hasattr(attention, "head_dim"):
        return False
    heads, kv_heads, dim = head_shape(attention)
    if kv_heads == 0 or heads % kv_heads or dim % 2:
        return False
    if normed and any(_width(attention._modules[name]) != dim for name in _HEAD_NORMS):
        return False
    return _computes_the_equations(block, heads // kv_heads, dim, normed)


def _width(norm: nn.Module) -> int:
    weight = norm._parameters.get("weight")
    return 0 if weight is None else weight.numel()


@torch.no_grad()
def _computes_the_equations(block: Any, group: int, dim: int, normed: bool) -> bool:
    width, length, kv_heads = 6, 3, 2
    sizes = {"q_proj": group * kv_heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
    linears = {name: small_linear(width, rows, 0.7 + 0.1 * i) for i, (name, rows) in enumerate(sizes.items())}
    o = small_linear(group * kv_heads * dim, width, 0.3)
    head_norms = {name: small_linear(dim, dim, 0.4) for name in _HEAD_NORMS if normed}
    attention = shallow_copy(block.self_attn, _modules={**linears, "o_proj": o, **head_norms})
    first, second, mlp = (small_linear(width, width, scale) for scale in (0.5, 0.6, -0.4))
    norms = {"input_layernorm": first, "post_attention_layernorm": second}
    probe = shallow_copy(block, _modules={**norms, "self_attn": attention, "mlp": mlp})
    h = 2.0 * numbers(2, length, width)
    cos, sin = 1.5 * numbers(length, dim), 0.3 - numbers(length, dim)
    theirs = type(block).forward(
        probe,
        h,
        attention_mask=torch.full((length, length), float("-inf")).triu(1)[None, None],
        position_ids=torch.arange(length)[None] + _FAR,
        past_key_values=None,
        use_cache=False,
        position_embeddings=(cos[None], sin[None]),
    )
    if not isinstance(theirs, Tensor):
        return False
    keys, values = torch.zeros(2, 2, kv_heads, length, dim)
    for position in range(length):
        ours = h[:, position : position + 1]
        qkv = torch.cat([linear(first(ours)) for linear in linears.values()], dim=-1)
        if normed:
            qkv = norm_heads(qkv, head_norms["q_norm"], head_norms["k_norm"], kv_heads, dim)
        at = torch.tensor([position])
        ours = ours + o(decode_attention_reference(qkv, cos, sin, keys, values, at, block.self_attn.scaling))
        ours = ours + mlp(second(ours))
        if not torch.allclose(theirs[:, position : position + 1], ours, rtol=1e-4, atol=1e-5):
            return False
    return True


def norm_heads(qkv: Tensor, q_norm: Norm, k_norm: Norm, kv_heads: int, dim: int) -> Tensor:
    """``qkv`` ``[batch, T, (heads + 2 kv_heads) · dim]`` with a norm of every query and every key."""
    heads = qkv.view(*qkv.shape[:2], -1, dim)
    q, k, v = heads.split([heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    return torch.cat([q_norm(q), k_norm(k), v], dim=2).view(qkv.shape)


@torch.no_grad()
def _is_plain_outside(model: PreTrainedModel, trunk: Any) -> bool:
    head = model.get_output_embeddings()
    name = next((name for name, module in model._modules.items() if module is trunk), None)
    if head is None or name is None or _hooked(trunk) or _hooked(model):
        return False
    bare = shallow_copy(trunk, _modules={**trunk._modules, "layers": nn.ModuleList()})
    probe = shallow_copy(model, _modules={**model._modules, name: bare})
    ids = torch.tensor([[1, 2], [3, 0]], device=trunk.embed_tokens.weight.device) % model.config.vocab_size
    theirs = type(model).forward(probe, input_ids=ids, use_cache=False).logits
    return torch.equal(theirs, head(trunk.norm(trunk.embed_tokens(ids))))


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)
