"""The packed format on disk, version 1.

A packed model is an ordinary Hugging Face folder. ``config.json`` holds::

    "quantization_config": {
        "quant_method": "surgeon-2of4",
        "version": 1,
        "modules": ["model.layers.0.mlp.up_proj", ...],   the linear layers stored packed
        "ignored": ["lm_head", ...],                      the linear layers that are not 2:4, stored dense
        "sha256": {"lm_head.weight": "5d41...", ...}      checksums of all tensors in the files
    }

and the safetensors files hold, in place of the ``weight`` of each module ``NAME`` of ``modules``, ``W`` ``[R, C]``
(GPT-2's ``Conv1D`` stores ``Wᵀ``; here it is ``W`` all the same)::

    NAME.values    [R, C / 2]         the model's dtype
    NAME.indices   [R, ceil(C / 8)]   uint8

laid out as :mod:`surgeon_kernels.pack_2_4` says. Biases and everything else are stored as usual. A checksum is the
SHA-256 of dtype and shape, as in ``"BF16 [2, 3] "``, followed by the tensor's bytes; ``surgeon pack`` writes them, and
a model saved by transformers itself has none. A reader must refuse a version that it does not know.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from llm_surgeon.errors import InputError
from llm_surgeon.formats.safetensors_headers import StoredTensor, tensor_sha256

_logger = logging.getLogger(__name__)

QUANT_METHOD = "surgeon-2of4"
VERSION = 1

_FLOATS = ("F16", "BF16", "F32", "F64")


@register_quantization_config(QUANT_METHOD)
class Surgeon24Config(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed model.

    Args:
        modules: names of the packed linear layers.
        ignored: names of the linear layers that are not 2:4.
        sha256: checksums of the tensors in the files, by name; compared as the model loads, and not kept.

    Raises:
        InputError: the version is unknown, or an entry is missing or no list of names.
    """

    def __init__(
        self,
        modules: Sequence[str] = (),
        ignored: Sequence[str] = (),
        version: int = VERSION,
        sha256: Mapping[str, str] | None = None,
        **others: Any,
    ) -> None:
        if version != VERSION:
            raise InputError(
                f"the model is in version {version!r} of {QUANT_METHOD}, and this llm_surgeon reads version {VERSION}"
            )
        for name, value in (("modules", modules), ("ignored", ignored)):
            if not isinstance(value, list | tuple) or not all(isinstance(module, str) for module in value):
                raise InputError(f"{name} of the quantization_config must be a list of module names")
        if not modules:
            raise InputError(f"the quantization_config of a {QUANT_METHOD} model lists no modules")
        others.pop("quant_method", None)
        if others:
            raise InputError(f"unknown entry {min(others)!r} in the quantization_config of a {QUANT_METHOD} model")
        self.quant_method = QUANT_METHOD
        self.version = version
        self.modules = list(modules)
        self.ignored = list(ignored)
        if sha256 is not None:
            if not isinstance(sha256, dict):
                raise InputError("sha256 of the quantization_config must give a checksum for every tensor")
            self.sha256 = sha256


def check_sha256(expected: Mapping[str, str] | None, files: Sequence[str | Path]) -> None:
    """Refuse files whose tensors are not those that ``expected`` holds the checksums of; ``None``: say that once."""
    if expected is None:
        _say_unchecked()
        return
    found = tensor_sha256(files)
    for key in sorted(found.keys() | expected.keys()):
        if key not in found:
            raise InputError(f"the packed model lacks {key}")
        if found[key] != expected.get(key):
            raise InputError(f"{key} of the packed model is damaged: config.json lists another checksum")


@functools.cache
def _say_unchecked() -> None:
    _logger.warning("the packed model has no checksums: damage to it may pass unseen (surgeon pack writes them)")


def check_stored(stored: Mapping[str, StoredTensor], name: str, rows: int, columns: int) -> None:
    """Refuse files in which the packed weight of module ``name``, ``[rows, columns]``, is not as it must be."""
    for part, dtypes, shape in (
        ("values", _FLOATS, [rows, columns // 2]),
        ("indices", ("U8",), [rows, -(-columns // 8)]),
    ):
        key = f"{name}.{part}"
        if key not in stored:
            raise InputError(f"the packed model lacks {key}")
        found, found_shape = stored[key]
        if found not in dtypes or found_shape != shape:
            raise InputError(
                f"the packed model stores {key} as {found} {found_shape}, where {' or '.join(dtypes)} {shape} is needed"
            )
