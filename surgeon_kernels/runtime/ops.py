"""Definitions of ``torch.ops.surgeon_kernels.*``, whose CUDA implementations are in csrc/.

Made in Python rather than in the extension, so that an exported graph that holds them loads before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("surgeon_kernels", "FRAGMENT")


def define(schema: str, *, fake: Callable[..., Any], cpu: Callable[..., Any] | None = None) -> None:
    """Define an op, by its schema in PyTorch's notation.

    Args:
        fake: results of the right shapes and dtypes, without data, for tracing; it takes the op's arguments.
        cpu: the implementation on a CPU.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    torch.library.register_fake(f"surgeon_kernels::{name}", fake, lib=_library)
    if cpu is not None:
        _library.impl(name, cpu, "CPU")
