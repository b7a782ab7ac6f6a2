"""Write a checkpoint whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.checkpoint.folder import read_json
from llm_surgeon.checkpoint.output import Output, claimed_output, move_into_place, partial_folder
from llm_surgeon.checkpoint.stored_form import StoredForm
from llm_surgeon.errors import InputError, first_line
from llm_surgeon.formats.packed_2_4 import Surgeon24Config
from llm_surgeon.formats.safetensors_headers import tensor_sha256
from llm_surgeon.interrupts import uninterrupted

# Of a tokenizer's files, its vocabulary and its merges in JSON and once more in their old forms; and of all others.
_TOKEN_BYTES, _OTHER_BYTES = 192, 2**20


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path | Output,
    *,
    dtype: torch.dtype | StoredForm,
    extra_files: Mapping[str, str | bytes],
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Write a folder that plain ``AutoModelForCausalLM`` and ``AutoTokenizer`` load: all of it, or nothing.

    Everything goes into a hidden folder beside ``out`` that takes its place, on disk, in one step when it is complete
    (see :func:`~llm_surgeon.checkpoint.output.move_into_place`). Numbers are cast to ``dtype``, or as
    :class:`StoredForm` says, in copies in main memory (the model is left as it is), and every zero is written as
    +0.0. Tied weights are stored once. With a :class:`StoredForm` go the files of its processor.

    Args:
        out: a folder, claimed here, or a claim of the caller's.
        extra_files: texts, or bytes as they are, by file name, such as ``README.md``.
        overwrite: replace the model that the folder ``out`` holds; a claim says so itself.

    Raises:
        InputError: see :func:`~llm_surgeon.checkpoint.output.claimed_output`; also where writing fails (a full disk,
            say). ``out`` is as before then.
    """
    with nullcontext(out) if isinstance(out, Output) else claimed_output(out, overwrite) as output:
        partial = partial_folder(output.path)
        try:
            partial.mkdir(parents=True)
            form = dtype if isinstance(dtype, StoredForm) else StoredForm(dtype)
            _write(model, tokenizer, partial, form, max_shard_size)
            for name, content in extra_files.items():
                (partial / name).write_bytes(content if isinstance(content, bytes) else content.encode())
            for path in partial.iterdir():
                shutil.copymode(partial / "config.json", path)  # safetensors makes files that only their owner can read
            move_into_place(partial, output.path, output.given, output.overwrite)
        except (OSError, SafetensorError) as error:
            raise InputError(f"output {str(output.given)!r} cannot be written: {first_line(error)}") from error
        finally:
            uninterrupted(lambda: shutil.rmtree(partial, ignore_errors=True))  # not there any more after success


def checkpoint_bytes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | StoredForm | None
) -> int:
    """Bytes that :func:`save_checkpoint` writes at most, about: weights, tokenizer, configuration and reports.

    Args:
        dtype: what floating-point tensors are cast to (``None``: each in its own).
    """
    return weights_bytes(model, dtype) + _TOKEN_BYTES * len(tokenizer) + _OTHER_BYTES


def weights_bytes(model: PreTrainedModel, dtype: torch.dtype | StoredForm | None) -> int:
    """Bytes of the tensors that :func:`save_checkpoint` writes."""
    others = dtype.others if isinstance(dtype, StoredForm) else {}
    main = dtype.main if isinstance(dtype, StoredForm) else dtype
    sizes = {}
    for name, tensor in model.state_dict().items():
        saved = others.get(name, main or tensor.dtype) if tensor.is_floating_point() else tensor.dtype
        sizes[tensor.device, tensor.data_ptr(), tensor.shape] = tensor.numel() * saved.itemsize
    return sum(sizes.values())


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, form: StoredForm, max_shard_size: str
) -> None:
    # Some published generation configs do not pass the validation that some versions of transformers do when saving.
    generation = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=_cast_state(model, form), max_shard_size=max_shard_size)
    finally:
        model.generation_config = generation
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")
    # save_pretrained notes the dtype that the model has in memory.
    path = folder / "config.json"
    config = _with_dtype(read_json(path), str(form.main).removeprefix("torch."))
    if isinstance(getattr(model.config, "quantization_config", None), Surgeon24Config):
        config["quantization_config"]["sha256"] = tensor_sha256(folder.glob("*.safetensors"))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    for name, content in form.processor.items():
        if not (folder / name).exists():  # the tokenizer has written the chat template
            (folder / name).write_bytes(content)


def _cast_state(model: PreTrainedModel, form: StoredForm) -> dict[str, Tensor]:
    """Copies of all tensors in main memory as they are to be saved; what is tied stays tied."""
    copies: dict[tuple[object, ...], Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if identity not in copies:
            copies[identity] = form.saved(name, tensor)
        state[name] = copies[identity]
    return state


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """``config`` with ``dtype`` at its top and wherever a part of it states one."""
    parts = {
        key: _with_dtype(part, dtype) for key, part in config.items() if isinstance(part, dict) and "dtype" in part
    }
    return {**config, **parts, "dtype": dtype}
