"""A dimension inside a decoder block that can be narrowed, and what goes when it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm_surgeon.models.decoder import PrunableLinear


@dataclass(frozen=True)
class SizeRule:
    """Attributes of configuration and modules that tell the code of a block the sizes of a dimension.

    Attributes:
        config: attribute of the configuration -> the quantity it holds (see :meth:`Dimension.quantities`).
        constants: attributes of the configuration that must be written down although they do not change.
        attributes: attribute of a module (``"self_attn.num_heads"``) -> quantity, where no configuration says it.
        stock: the configuration says it all, so that the model's own class builds blocks of these sizes.
        refused: sizes (groups, parts) that no configuration of the class may have for all blocks, such as numbers of
            heads that do not divide the width of the residual stream.
    """

    config: dict[str, str] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    stock: bool = True
    refused: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True, eq=False)
class Dimension:
    """The feed-forward neurons, or the attention heads, of one decoder block.

    A *group* is a set of input columns of one linear, the consumer, with the rows of its producers that reach nothing
    else: one neuron, or one key-value group of heads. Setting them to zero and removing them give the same block.
    Where several query heads share a key-value group, the *parts* of a group are those heads; attention code wants
    equally many in every group.

    Attributes:
        depth: index of the decoder block.
        consumer: the linear that reads the dimension.
        producers: by name inside the block.
        columns: int64 ``[groups, size]``, the consumer's columns.
        rows: producer -> int64 ``[groups, n]``, the rows that go with a whole group.
        part_columns: int64 ``[groups, parts, size / parts]``; ``parts = 1`` where a group is indivisible.
        part_producer, part_rows: the producer whose rows ``[groups, parts, n]`` go with a single part.
        rule: how the block's code is told the sizes.
    """

    depth: int
    consumer: PrunableLinear
    producers: dict[str, PrunableLinear]
    columns: Tensor
    rows: dict[str, Tensor]
    part_columns: Tensor
    part_producer: str | None = None
    part_rows: Tensor | None = None
    rule: SizeRule = field(default_factory=SizeRule)

    @property
    def kind(self) -> str:
        """The consumer's name inside the block."""
        return self.consumer.kind

    @property
    def groups(self) -> int:
        return self.columns.shape[0]

    @property
    def parts(self) -> int:
        return self.part_columns.shape[1]

    @property
    def is_heads(self) -> bool:
        """True where a group has several columns (attention), False where it has one (a neuron)."""
        return self.columns.shape[1] > 1

    def quantities(self, groups: int, parts: int) -> dict[str, int]:
        """Sizes by name when ``groups`` groups of ``parts`` parts each are left."""
        heads = groups * parts
        return {"groups": groups, "heads": heads, "repeats": parts, "width": heads * self.part_columns.shape[2]}

    def removed_columns(self, removed: Tensor) -> Tensor:
        """The consumer's columns that go, bool ``[C]``, when the parts ``removed``, bool ``[groups, parts]``, do."""
        mask = torch.zeros(self.columns.numel(), dtype=torch.bool, device=self.columns.device)
        mask[self.part_columns[removed]] = True
        return mask

    def removed_rows(self, removed: Tensor) -> Iterator[tuple[PrunableLinear, Tensor]]:
        """Each producer with the rows, bool ``[R]``, that go with the parts ``removed``."""
        whole = removed.all(dim=1)
        for kind, producer in self.producers.items():
            mask = torch.zeros(producer.rows, dtype=torch.bool, device=self.columns.device)
            mask[self.rows[kind][whole]] = True
            if kind == self.part_producer and self.part_rows is not None:
                mask[self.part_rows[removed]] = True
            yield producer, mask

    def weights(self, groups: int, parts: int) -> int:
        """Weights of consumer and producers that ``groups`` groups of ``parts`` parts take."""
        total = groups * parts * self.part_columns.shape[2] * self.consumer.rows
        for kind, producer in self.producers.items():
            rows = groups * self.rows[kind].shape[1]
            if kind == self.part_producer and self.part_rows is not None:
                rows -= groups * (self.parts - parts) * self.part_rows.shape[2]
            total += rows * producer.columns
        return total
