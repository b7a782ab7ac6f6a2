"""Find how the code of a block is told the sizes of a dimension, by trying and comparing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.models.probe import Stub, StubbedBlock, agree, random_outputs
from llm_surgeon.models.rebuild import adopt, build_block, layer_config, weight_shape
from llm_surgeon.structures.find.dimension import Dimension, SizeRule

# Most attributes that change together.
_MOST_ATTRIBUTES = 3


def find_size_rule(
    blocks: Sequence[StubbedBlock],
    linears: Sequence[PrunableLinear],
    hidden: Tensor,
    config: PreTrainedConfig,
    dimension: Dimension,
) -> SizeRule | None:
    """The smallest change under which the block's code computes without some groups what it does with zeros there.

    ``blocks`` are one block with different inputs: the change must do for all.

    First attributes of the configuration are tried (the block's class then builds the smaller block by itself), then
    attributes of the block's modules; ``None`` where nothing works.
    """
    checks = [_Check(block, linears, hidden, dimension, removed) for removed in _trials(dimension) for block in blocks]
    if not checks:
        return None
    full = dimension.quantities(dimension.groups, dimension.parts)
    derived = getattr(type(config), "head_dim", None)
    fixed = isinstance(derived, property) and derived.fset is None  # the configuration has its own way to tell it
    head = {"head_dim": dimension.part_columns.shape[2]} if dimension.is_heads and not fixed else {}
    plain = {name: value for name, value in vars(config).items() if type(value) is int}
    for constants in [{}] if getattr(config, "head_dim", None) else [{}, head]:
        for chosen in _subsets(plain, full):
            rule = SizeRule(chosen, constants)
            if all(check.of_config(config, rule) for check in checks):
                return rule
    inside = {
        f"{name}.{key}" if name else key: value
        for name, module in blocks[0].block.named_modules()
        if not isinstance(module, Stub)
        for key, value in vars(module).items()
        if type(value) is int
    }
    # Caches ask the configuration for the number of key-value heads and their width.
    told = {"num_key_value_heads": "groups"} if dimension.is_heads else {}
    for chosen in [{}, *_subsets(inside, full)]:
        if all(check.of_attributes(chosen) for check in checks):
            return SizeRule(told, head, chosen, stock=False)
    return None


def _trials(dimension: Dimension) -> Iterator[Tensor]:
    """Parts to remove, bool ``[groups, parts]``: one whole group; one part of every group."""
    removed = torch.zeros(dimension.groups, dimension.parts, dtype=torch.bool, device=dimension.columns.device)
    if dimension.groups > 1:
        whole = removed.clone()
        whole[dimension.groups // 2] = True
        yield whole
    if dimension.parts > 1:
        single = removed.clone()
        each = torch.arange(dimension.groups, device=removed.device)
        single[each, each % dimension.parts] = True
        yield single


def _subsets(values: Mapping[str, int], sizes: Mapping[str, int]) -> Iterator[dict[str, str]]:
    """Assignments of attributes to the quantities whose value they have, the smallest first."""
    candidates = []
    for attribute, value in values.items():
        seen: list[str] = []
        for quantity, size in sizes.items():
            # "groups" and "heads" are one where no group is divisible, and for neurons "width" too.
            alias = quantity == "heads" and sizes["repeats"] == 1
            alias |= quantity == "width" and sizes["width"] == sizes["groups"]
            if size == value and not alias and not (quantity == "repeats" and size == 1):
                seen.append(quantity)
        candidates += [(attribute, quantity) for quantity in seen]
    for count in range(1, _MOST_ATTRIBUTES + 1):
        for chosen in combinations(candidates, count):
            if len(dict(chosen)) == count:
                yield dict(chosen)


class _Check:
    """Compares a block that lacks the parts ``removed`` with one where they are zero."""

    def __init__(
        self,
        block: StubbedBlock,
        linears: Sequence[PrunableLinear],
        hidden: Tensor,
        dimension: Dimension,
        removed: Tensor,
    ) -> None:
        self._original, self._hidden, self._dimension = block, hidden, dimension
        groups, parts = (~removed).any(dim=1), (~removed).sum(dim=1)
        self._quantities = dimension.quantities(int(groups.sum()), int(parts.max()))
        outputs = random_outputs(linears, 0, hidden.device)
        self._smaller = dict(outputs)
        for producer, rows in dimension.removed_rows(removed):
            self._smaller[producer.kind] = outputs[producer.kind][..., ~rows]
            outputs[producer.kind] = outputs[producer.kind].masked_fill(rows, 0.0)
        seen, self._output = block.run(outputs, hidden)
        self._kept = ~dimension.removed_columns(removed)
        self._input = seen[dimension.kind][..., self._kept]
        self._shapes = {x.kind: (self._smaller[x.kind].shape[-1], x.columns) for x in linears}
        self._shapes[dimension.kind] = (dimension.consumer.rows, int(self._kept.sum()))

    def of_config(self, config: PreTrainedConfig, rule: SizeRule) -> bool:
        changes = {name: self._quantities[quantity] for name, quantity in rule.config.items()} | rule.constants
        smaller = build_block(self._original.block, layer_config(config, changes), 0)
        if smaller is None or any(
            weight_shape(smaller.get_submodule(kind)) != shape for kind, shape in self._shapes.items()
        ):
            return False
        trial = copy.deepcopy(self._original)
        adopt(trial.block, smaller)
        return self._same(trial)

    def of_attributes(self, chosen: Mapping[str, str]) -> bool:
        trial = copy.deepcopy(self._original)
        for path, quantity in chosen.items():
            name, _, attribute = path.rpartition(".")
            setattr(trial.block.get_submodule(name), attribute, self._quantities[quantity])
        return self._same(trial)

    def _same(self, trial: StubbedBlock) -> bool:
        try:
            seen, output = trial.run(self._smaller, self._hidden)
        except (RuntimeError, ValueError, IndexError):  # shapes that do not fit
            return False
        return agree(seen[self._dimension.kind], self._input) and agree(output, self._output)
