"""Take whole decoder blocks out of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.models.decoder import Decoder
from llm_surgeon.structures.remove.verify import probe_logits, verified


def remove_blocks(model: PreTrainedModel, decoder: Decoder, removed: list[int]) -> None:
    """Take decoder blocks out of ``model``: the list, the blocks' own numbers, and the configuration.

    Raises:
        NumericalError: the shorter model computes something else than the model that skips the blocks.
        UnsupportedModelError: it does not run, or cannot be loaded. The model is as it was in both cases.
    """
    with skipped(decoder.blocks, removed):
        before = probe_logits(model)
    blocks = len(decoder.blocks)
    kept = [depth for depth in range(blocks) if depth not in removed]
    name = decoder.linears[0].name.removesuffix(f".{decoder.linears[0].depth}.{decoder.linears[0].kind}")
    numbers = _numbers(decoder.blocks)
    message = "the shorter model's logits differ from those of the model that skips the blocks"
    with verified(model, before, message):
        config: Any = model.config
        changes = [
            {key: getattr(config.per_layer_config[depth], key) for key in config.per_layer_attributes or ()}
            for depth in kept
        ]
        if config.per_layer_attributes:
            config.per_layer_config = None
        for key, value in list(vars(config).items()):
            # One entry for each block: their types.
            if isinstance(value, list) and len(value) == blocks and not key.endswith("_token_id"):
                setattr(config, key, [value[depth] for depth in kept])
        config.num_hidden_layers = len(kept)
        if any(changes):
            config.per_layer_config = dict(enumerate(changes))
        modules = getattr(config, "pruned_modules", {})
        if modules:
            config.pruned_modules = {str(n): modules[str(d)] for n, d in enumerate(kept) if str(d) in modules}
        for position, depth in enumerate(kept):
            for module in decoder.blocks[depth].modules():
                for key in numbers & vars(module).keys():
                    if vars(module)[key] == depth:
                        vars(module)[key] = position
        blocks_left: Any = model.get_submodule(name)
        for depth in sorted(removed, reverse=True):
            del blocks_left[depth]


def _numbers(blocks: list[nn.Module]) -> set[str]:
    """Names of attributes that hold a block's depth: transformers' own, and whole numbers that are it in all blocks."""
    found: dict[str, set[tuple[int, int]]] = {}
    for depth, block in enumerate(blocks):
        for module in block.modules():
            for key, value in vars(module).items():
                if type(value) is int:
                    found.setdefault(key, set()).add((depth, value))
    return {"layer_idx"} | {key for key, pairs in found.items() if pairs == {(n, n) for n in range(len(blocks))}}


@contextmanager
def skipped(blocks: list[nn.Module], removed: list[int]) -> Iterator[None]:
    """Context manager in which blocks pass their input on; restored on exit."""

    def forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return type(output)((hidden, *output[1:])) if isinstance(output, (tuple, list)) else hidden

    handles = [blocks[depth].register_forward_hook(forward, with_kwargs=True) for depth in removed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
