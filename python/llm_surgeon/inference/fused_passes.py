"""Passes of a causal LM by few kernels: four products and four other kernels a block.

A block of a Llama-like decoder computes::

    h ← h + o(attention(R q, R k, v)),         [q, k, v] = W_qkv norm₁(h)
    h ← h + down(silu(gate) ∘ up),             [gate, up] = W_gu norm₂(h)

Here q, k and v are one product, and gate and up. In a step one kernel rotates, writes the cache and attends
(:class:`surgeon_kernels.DecodeAttention`), and one each adds to the residual stream and takes the norm that follows
(:func:`surgeon_kernels.add_rms_norm`); one is the gated activation. For a prompt rotation and cache are a kernel
(:func:`surgeon_kernels.fill_cache`) and attention is PyTorch's. Dense and packed weights go the same way.

Norms of queries and keys come after the product, by kernels of their own. Norms that are not RMS norms and feed-forward
layers that are no SwiGLU run as the model's own modules. What else keeps
a model from such passes :func:`~llm_surgeon.inference.fusible.unfused_part` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from llm_surgeon.inference.fusible import head_shape, norm_heads, unfused_part
from llm_surgeon.inference.merged_linears import merged_product
from llm_surgeon.models.fused_pointwise import epsilon, has_own_forward, is_rms_norm, is_swiglu
from surgeon_kernels import DecodeAttention, add_rms_norm, fill_cache, rms_norm, swiglu

if TYPE_CHECKING:  # it would bring transformers' models, which bring this: see _registration.py
    from transformers import PreTrainedModel


class FusedPasses:
    """A prompt of every sequence, then steps of one token of each, see the module's text.

    The weights that are multiplied together become views of one tensor, for good. A model that is moved or cast
    afterwards needs a new object.
    """

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        """With a cache for ``length`` tokens of ``batch`` sequences.

        Raises:
            ValueError: :func:`unfused_part` names a part.
        """
        reason = unfused_part(model, length)
        if reason is not None:
            raise ValueError(f"the model has no fused passes because of {reason}")
        trunk = model.base_model
        attention, blocks = trunk.layers[0].self_attn, trunk.layers
        heads, kv_heads, dim = head_shape(attention)
        device, self._scale = model.device, attention.scaling
        self._embed, self._head = trunk.embed_tokens, model.get_output_embeddings()
        self._attention = DecodeAttention(batch, heads, kv_heads, dim, length, self._scale, device)
        caches = torch.zeros(len(blocks), 2, batch, kv_heads, length, dim, dtype=model.dtype, device=device)
        with torch.no_grad():
            cos, sin = trunk.rotary_emb(caches, torch.arange(length, device=device)[None])
            self._angles = cos[0].contiguous(), sin[0].contiguous()
            self._first_norm = _norm(blocks[0].input_layernorm)
            norms = [*(block.input_layernorm for block in blocks[1:]), trunk.norm]
            self._blocks = [
                _Block(block, _add_norm(norm), *cache) for block, norm, cache in zip(blocks, norms, caches, strict=True)
            ]

    @torch.no_grad()
    def prompt(self, ids: Tensor) -> Tensor:
        """Logits ``[batch, 1, vocabulary]`` after the tokens ``[batch, T]``, with which the cache begins anew."""
        length = ids.shape[1]

        def attend(block: _Block, qkv: Tensor) -> Tensor:
            q = fill_cache(qkv, *self._angles, block.keys, block.values)
            k, v = block.keys[:, :, :length], block.values[:, :, :length]
            attended = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self._scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            return attended.transpose(1, 2).reshape(*ids.shape, -1)

        return self._head(self._pass(ids, attend)[:, -1:])

    @torch.no_grad()
    def step(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits ``[batch, 1, vocabulary]`` after ``token`` ``[batch, 1]``, which all stand at ``position`` ``[1]``."""
        return self._head(
            self._pass(
                token,
                lambda block, qkv: self._attention(qkv, *self._angles, block.keys, block.values, position),
            )
        )

    def _pass(self, ids: Tensor, attend: Callable[[_Block, Tensor], Tensor]) -> Tensor:
        h = self._embed(ids)
        x = self._first_norm(h)
        for block in self._blocks:
            h, x = block.attention_norm(block.o_proj(attend(block, block.qkv(x))), h)
            h, x = block.next_norm(block.mlp(x), h)
        return x


class _Block:
    def __init__(
        self, block: Any, next_norm: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], keys: Tensor, values: Tensor
    ) -> None:
        attention = block.self_attn
        self.qkv = _qkv(attention)
        self.o_proj = attention.o_proj
        self.attention_norm, self.next_norm = _add_norm(block.post_attention_layernorm), next_norm
        self.mlp = _mlp(block.mlp)
        self.keys, self.values = keys, values


def _qkv(attention: Any) -> Callable[[Tensor], Tensor]:
    product = merged_product([attention.q_proj, attention.k_proj, attention.v_proj])
    if not hasattr(attention, "q_norm"):
        return product
    _, kv_heads, dim = head_shape(attention)
    q_norm, k_norm = _norm(attention.q_norm), _norm(attention.k_norm)
    return lambda x: norm_heads(product(x), q_norm, k_norm, kv_heads, dim)


def _mlp(module: Any) -> Callable[[Tensor], Tensor]:
    if has_own_forward(module) or not is_swiglu(module):
        return module
    gate_up, down = merged_product([module.gate_proj, module.up_proj]), module.down_proj
    return lambda x: down(swiglu(*gate_up(x).chunk(2, dim=-1)))


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    if has_own_forward(module) or not is_rms_norm(module):
        return module
    return lambda x: rms_norm(x, module.weight, epsilon(module))


def _add_norm(module: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``(x, h) → (x + h, norm(x + h))``."""
    if not has_own_forward(module) and is_rms_norm(module):
        return lambda x, h: add_rms_norm(x, h, module.weight, epsilon(module))

    def add_norm(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h + x
        return h, module(h)

    return add_norm
