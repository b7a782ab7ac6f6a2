"""The form that a checkpoint is stored in, carried from loading to saving: its dtypes, and files of its processor."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.formats.safetensors_headers import StoredTensor

_logger = logging.getLogger(__name__)

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = ("BOOL", "U8", "I8", "I16", "I32", "I64")  # of masks and indices, never of weights


class _Origin(NamedTuple):
    """The place that a tensor in memory was read from."""

    file: Path
    key: str
    dtype: torch.dtype

    def read(self) -> Tensor:
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(self.key)


@dataclass(frozen=True)
class StoredForm:
    """The floating-point dtypes of a checkpoint and the files of its processor, and so of what is made from it.

    Every tensor is saved in the dtype that it was stored in. One that is as it was loaded is saved to the bit as it was
    stored, also where loading rounded it (float32 norms beside bfloat16 matrices, read as bfloat16); one that was
    changed or trained is saved as it is in memory, rounded to that dtype. Tensors of a new name are saved in ``main``.

    Attributes:
        main: the dtype of most numbers.
        others: the dtypes of tensors stored otherwise, by their names in the model.
        processor: files that say how images, sounds and chats become input, by name.
    """

    main: torch.dtype
    others: dict[str, torch.dtype] = field(default_factory=dict)
    processor: Mapping[str, bytes] = field(default_factory=dict)
    _origins: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary, repr=False, compare=False)

    def follow(self, model: PreTrainedModel, files: Iterable[Path]) -> None:
        """Note which tensors of the freshly loaded ``model`` are stored in a dtype that they would not be saved in."""
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        for file in files:
            with safe_open(file, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118 (not a mapping)
                    dtype = _FLOATS.get(stored.get_slice(key).get_dtype())
                    if dtype is None or (dtype == self.main and _holds(model.dtype, dtype)):
                        continue
                    origin = _Origin(file, key, dtype)
                    name = _name_in_model(origin, tensors, model.base_model_prefix, self.others)
                    if name is not None:
                        self._origins[tensors[name]] = origin
                        if dtype != self.main:
                            self.others[name] = dtype

    def saved(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` in main memory as it is to be saved: see above; zeros of floating point are +0.0."""
        if not tensor.is_floating_point():
            return tensor.detach().to("cpu", copy=True)
        origin = self._origins.get(tensor)
        dtype = self.others.get(name, self.main) if origin is None else origin.dtype
        values = tensor.detach().to("cpu")
        if origin is not None and not _holds(values.dtype, dtype):
            try:
                original = origin.read()
            except (OSError, SafetensorError) as error:
                _logger.warning("%s is saved rounded: %s cannot be read again (%s)", name, origin.file, error)
            else:
                if original.shape == values.shape and torch.equal(original.to(values.dtype), values):
                    values = original
        # Adding zero turns -0.0 (a tiny weight rounded, for one) into +0.0 and changes nothing else.
        return values.to(dtype) + 0.0


def stored_form(name: str, folder: Path, stored: Mapping[str, StoredTensor]) -> StoredForm:
    """The form of checkpoint ``name``; :class:`UnsupportedModelError` where dtypes are those of quantized weights."""
    numbers: Counter[str] = Counter()
    for tensor in stored.values():
        numbers[tensor.dtype] += tensor.numbers
    most = numbers.most_common(1)[0][0] if numbers else "no numbers"
    if most not in _FLOATS:
        raise UnsupportedModelError(f"model {name!r} is stored as {most}: only {', '.join(_FLOATS)} can be pruned")
    for key, tensor in stored.items():
        if tensor.dtype not in (*_FLOATS, *_INTEGERS) or (tensor.dtype in _INTEGERS and key.endswith(".weight")):
            raise UnsupportedModelError(
                f"model {name!r} stores {key} as {tensor.dtype}, and its configuration does not say how it is quantized"
            )
    return StoredForm(_FLOATS[most], processor=processor_files(folder))


def processor_files(folder: Path) -> dict[str, bytes]:
    """The files of a model folder that its processor is made of, besides the tokenizer's, by name."""
    names = ("*processor_config.json", "audio_tokenizer_config.json", "chat_template.json", "chat_template.jinja")
    return {path.name: path.read_bytes() for name in names for path in folder.glob(name) if path.is_file()}


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """True where every number of dtype ``other`` is one of ``dtype``."""
    return torch.promote_types(dtype, other) == dtype


def _name_in_model(
    origin: _Origin, tensors: Mapping[str, Tensor], prefix: str, taken: Mapping[str, torch.dtype]
) -> str | None:
    """Name that the model has for a stored tensor: its own with or without the trunk's, or where its numbers are.

    transformers renames the tensors of some architectures as it loads them.
    """
    for name in (origin.key, f"{prefix}.{origin.key}", origin.key.removeprefix(f"{prefix}.")):
        if name in tensors:
            return name
    original = origin.read()
    parts = origin.key.rsplit(".", 2)[-2:]
    for name, tensor in tensors.items():
        alike = name.rsplit(".", 2)[-2:] == parts and tensor.shape == original.shape and name not in taken
        if alike and torch.equal(original.to(tensor.dtype), tensor.detach()):
            return name
    return None
