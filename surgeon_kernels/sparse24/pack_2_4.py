"""2:4 weights packed to 9/16 of their dense bytes (bf16, fp16): the kept values and their 2-bit positions.

In every group of four consecutive columns ``4 g .. 4 g + 3`` of a row at most two weights are nonzero. With
``p_0 < p_1`` the two kept positions of the group::

    values[r, 2 g + k] = W[r, 4 g + p_k]        k = 0, 1
    nibble[r, g]       = p_0 + 4 p_1
    indices[r, j]      = nibble[r, 2 j] + 16 nibble[r, 2 j + 1]

so the even group has the low half of a byte; the last high half of an odd number of groups is 0. Kept are the nonzero
weights and, where there are fewer than two, the lowest other positions: the packed form is a function of the weight's
values. Zeros of either sign are the same zero and come back as +0.0; every other bit pattern, NaN with its payload
included, comes back as it was. This layout belongs to no library and no GPU; kernels rearrange it for themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_INVALID = 0xFF  # the nibble of a group with more than two nonzeros
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Weights handled at once (an estimate): the int64 indices that torch needs are four times as large as a bf16 weight.
_SLAB = 1 << 24


class Packed24(NamedTuple):
    """A packed 2:4 matrix ``[R, C]``: ``values`` ``[R, C / 2]`` and ``indices`` uint8 ``[R, ceil(C / 8)]``."""

    values: Tensor
    indices: Tensor

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    @property
    def columns(self) -> int:
        return 2 * self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.indices.nbytes


def pack_2_4(weight: Tensor) -> Packed24:
    """Pack a matrix of at most two nonzeros in every four consecutive columns.

    Args:
        weight: ``[R, C]``, float16, bfloat16, float32 or float64, ``C`` divisible by 4; any strides, any device.

    Returns:
        ``values`` in the weight's dtype and ``indices``, contiguous, on its device.

    Raises:
        ValueError: the shape is no matrix with ``C`` divisible by 4, or a group has more than two nonzeros; the
            message names the first.
        TypeError: another dtype.
    """
    _check_weight(weight)
    R, C = weight.shape
    values = weight.new_empty(R, C // 2)
    indices = weight.new_empty(R, -(-C // 8), dtype=torch.uint8)
    nibble_of, positions_of = _tables(weight.device)
    step = max(1, _SLAB // max(C, 1))
    for start in range(0, R, step):
        rows = slice(start, start + step)
        groups = weight[rows].unflatten(1, (C // 4, 4))  # [r, C / 4, 4]
        patterns = _pattern(groups)
        nibbles = _look_up(nibble_of, patterns)
        wrong = nibbles == _INVALID
        if wrong.any():
            r, g = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"the weight is not 2:4: row {start + r} has {int((groups[r, g] != 0).sum())} nonzeros "
                f"in columns {4 * g} to {4 * g + 3}"
            )
        kept = _bits(groups).gather(2, _look_up(positions_of, patterns)).flatten(1)
        _bits(values)[rows] = kept.masked_fill_(kept.view(weight.dtype) == 0, 0)
        if C % 8:
            nibbles = functional.pad(nibbles, (0, 1))
        indices[rows] = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return Packed24(values, indices)


def unpack_2_4(packed: Packed24) -> Tensor:
    """The dense weight ``[R, C]``, in the dtype of ``packed.values``, with +0.0 where nothing was kept.

    Raises:
        ValueError: the shapes do not belong together (positions are trusted: see :func:`check_packed_2_4`).
        TypeError: ``indices`` is not uint8.
    """
    values, indices = packed
    _check_shapes(values, indices)
    R, half = values.shape
    groups = values.new_zeros(R, half // 2, 4)
    kept = values.unflatten(1, (half // 2, 2))
    _bits(groups).scatter_(2, _positions(_nibbles(indices)[:, : half // 2]), _bits(kept))
    return groups.flatten(1)


def is_2_4(weight: Tensor) -> bool:
    """True if :func:`pack_2_4` takes ``weight``: ``[R, C]``, at most two nonzeros in every four consecutive columns.

    Any other tensor, of whatever shape and dtype, is not an error: False. One host sync for every 16 million weights.
    """
    if weight.dim() != 2 or weight.shape[1] % 4 or weight.dtype not in _DTYPES:
        return False
    valid = _tables(weight.device)[0] != _INVALID
    step = max(1, _SLAB // max(weight.shape[1], 1))
    groups = weight.unflatten(1, (weight.shape[1] // 4, 4))
    return all(bool(_look_up(valid, _pattern(part)).all()) for part in groups.split(step))


def check_packed_2_4(packed: Packed24) -> None:
    """Raise unless :func:`pack_2_4` can have written ``packed``: for tensors that come from a file.

    Raises:
        ValueError: the shapes do not belong together, two positions of a group are not ascending (the message names
            the first), or the unused half of the last byte is not 0.
        TypeError: another dtype.
    """
    values, indices = packed
    _check_shapes(values, indices)
    groups = values.shape[1] // 2
    nibbles = _nibbles(indices)
    wrong = (nibbles & 3) >= (nibbles >> 2)
    wrong[:, groups:] = nibbles[:, groups:] != 0
    if wrong.any():
        r, g = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"indices of row {r} are corrupt in columns {4 * g} to {4 * g + 3}: {int(nibbles[r, g]):#x} is not a pair "
            "of ascending positions"
        )


def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of the 16 patterns of nonzeros in a group: its nibble, and its two kept positions as int64."""
    nibbles, positions = [], []
    for pattern in range(16):
        nonzero = [p for p in range(4) if pattern >> p & 1]
        padding = [p for p in range(4) if p not in nonzero]
        first, second = sorted((nonzero + padding)[:2])
        nibbles.append(first + 4 * second if len(nonzero) <= 2 else _INVALID)
        positions.append((first, second))
    return torch.tensor(nibbles, dtype=torch.uint8, device=device), torch.tensor(positions, device=device)


def _pattern(groups: Tensor) -> Tensor:
    """A number per group whose bit ``p`` tells whether position ``p`` is nonzero."""
    nonzero = (groups != 0).view(torch.uint8)
    return nonzero[..., 0] | nonzero[..., 1] << 1 | nonzero[..., 2] << 2 | nonzero[..., 3] << 3


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers: moving bfloat16 on a CPU may go through float32, which rewrites NaNs."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _nibbles(indices: Tensor) -> Tensor:
    return torch.stack((indices & 15, indices >> 4), dim=2).flatten(1)


def _positions(nibbles: Tensor) -> Tensor:
    """int64 ``[..., 2]``; by arithmetic, as a table would have to be copied to the device at every call."""
    return torch.stack((nibbles & 3, nibbles >> 2), dim=2).long()


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]``, for indices of any integer dtype; much faster on a CPU."""
    return table.index_select(0, index.flatten().int()).view(*index.shape, *table.shape[1:])


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] % 4:
        raise ValueError(f"2:4 needs a matrix whose width is divisible by 4, not {list(weight.shape)}")
    if weight.dtype not in _DTYPES:
        raise TypeError(f"2:4 weights are packed in {', '.join(map(str, _DTYPES))}, not {weight.dtype}")


def _check_shapes(values: Tensor, indices: Tensor) -> None:
    if indices.dtype != torch.uint8:
        raise TypeError(f"indices must be torch.uint8, not {indices.dtype}")
    if values.dtype not in _DTYPES:
        raise TypeError(f"values must be {', '.join(map(str, _DTYPES))}, not {values.dtype}")
    if values.dim() != 2 or values.shape[1] % 2:
        raise ValueError(f"values must be a matrix of an even width, not {list(values.shape)}")
    expected = [values.shape[0], -(-values.shape[1] // 4)]
    if list(indices.shape) != expected:
        raise ValueError(f"indices of values {list(values.shape)} must be {expected}, not {list(indices.shape)}")
