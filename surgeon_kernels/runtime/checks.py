"""Checks of the tensors that describe one layer, by shape, dtype and device. Values are not read: no host sync."""

from __future__ import annotations

import torch
from torch import Tensor


def check_square(M: Tensor, name: str = "matrix") -> None:
    """Raise unless ``M`` is a floating-point matrix ``[n, n]``.

    Raises:
        ValueError: another shape; TypeError: another dtype.
    """
    if M.dim() != 2 or M.shape[0] != M.shape[1]:
        raise ValueError(f"{name} must be a square matrix, not {list(M.shape)}")
    if not M.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {M.dtype}")


def check_layer(weight: Tensor, pruned: Tensor | None = None, *others: Tensor, **factors: Tensor | None) -> None:
    """Raise unless the parts of a layer fit together.

    Args:
        weight: ``[R, C]``, floating point; pruned: bool ``[R, C]``; others: ``[R, C]``.
        factors: by name, of the weight's dtype: a G and its inverse ``[R, R]``, an A and its inverse ``[C, C]``.

    Raises:
        ValueError: shapes or devices that do not fit; TypeError: dtypes that do not.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix [R, C], not {list(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, not {weight.dtype}")
    R, C = weight.shape
    if pruned is not None:
        check_mask(pruned, weight.shape, "pruned")
        _check_device("pruned", pruned, weight)
    for other in others:
        if other.shape != weight.shape or other.dtype != weight.dtype:
            raise ValueError(f"{other.dtype} {list(other.shape)} is not of the weight's {weight.dtype} {[R, C]}")
        _check_device("a matrix of the weight's shape", other, weight)
    for name, factor in factors.items():
        if factor is None:
            continue
        n = R if name.startswith("G") else C
        if factor.shape != (n, n):
            raise ValueError(f"{name} must be {[n, n]} for a weight {[R, C]}, not {list(factor.shape)}")
        if factor.dtype != weight.dtype:
            raise TypeError(f"{name} is {factor.dtype}, the weight {weight.dtype}: they must be of one dtype")
        _check_device(name, factor, weight)


def check_mask(mask: Tensor, shape: torch.Size, name: str) -> None:
    """Raise unless ``mask`` is bool of this shape (ValueError, TypeError)."""
    if mask.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {list(mask.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, not {mask.dtype}")


def _check_device(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.device != weight.device:
        raise ValueError(f"{name} is on {tensor.device}, the weight on {weight.device}")
