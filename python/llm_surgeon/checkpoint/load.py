"""Load a checkpoint: safetensors only, every file checked first, and nothing filled in at random."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.errors import InputError, UnsupportedModelError
from llm_surgeon.packed.format import QUANT_METHOD
from llm_surgeon.resources import hub_reachable, require_memory
from llm_surgeon.stored import StoredTensor, read_headers
from llm_surgeon.structures import modeling_pruned

_REMOTE_CODE = "model {!r} needs the code that comes with it: read that code, then pass --trust-remote-code"
_logger = logging.getLogger(__name__)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What a model needs from its hub repository: no pickles, and no other formats, which lie in subfolders.
_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken"]
_NOT_DOWNLOADED = ["*/*", "consolidated*"]


def load_model(
    path_or_id: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    *,
    packed: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.dtype]:
    """A causal LM in ``dtype`` on ``device``, its tokenizer, and the dtype that most of its numbers are stored in.

    Only safetensors are read, never pickles; the header and the length of every file are checked first.

    Args:
        path_or_id: a folder, or a model id on the Hugging Face hub.
        dtype: of the weights in memory; ``None`` for the one they are stored in.
        packed: also take what ``surgeon pack`` wrote, with its packed layers.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        InputError: no such model; files missing or damaged; weights missing or of another shape than the
            configuration says; no tokenizer; too little memory; remote code needed and not allowed.
        UnsupportedModelError: the checkpoint is quantized, or packed and ``packed`` is not set.
    """
    name = str(path_or_id)
    folder = _folder_of(name)
    if "quantization_config" in (config := read_json(folder / "config.json")):
        quantization = config["quantization_config"]
        if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
            raise UnsupportedModelError(f"model {name!r} is quantized: take the checkpoint it was made from")
        if not packed:
            raise UnsupportedModelError(f"model {name!r} is packed: take the dense checkpoint it was made from")
    trust_remote_code = _trusted(name, folder, trust_remote_code)
    stored = read_headers(_weight_files(name, folder))
    own_dtype = _main_dtype(name, stored)
    dtype = dtype or own_dtype
    numbers = sum(tensor.numbers for tensor in stored.values())
    if packed and torch.device(device or "cpu").type != "cuda":  # a dense weight will be kept beside a packed one
        numbers += 2 * sum(tensor.numbers for key, tensor in stored.items() if key.endswith(".values"))
    for place in {torch.device("cpu"), torch.device(device or "cpu")}:  # read into main memory, then moved
        require_memory(numbers * dtype.itemsize, place)
    tokenizer = _load_tokenizer(name, folder, trust_remote_code)  # before the weights, which may take minutes
    model: PreTrainedModel
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
        if device is not None:
            model.to(device)
    # Readers of configurations and weights raise whatever they please, even plain Exception.
    except Exception as error:
        _refuse_remote_code(name, error, trust_remote_code)
        if "Unrecognized configuration class" in str(error):
            kind = config.get("model_type")
            raise UnsupportedModelError(f"model {name!r} is a {kind}, not a causal language model") from error
        raise InputError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
    # transformers fills what it does not find with random numbers.
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"model {name!r} lacks weights: {missing[0]} ({len(missing)} in all)")
    if mismatched := sorted(info["mismatched_keys"]):
        key, stored, expected = mismatched[0]
        raise InputError(
            f"model {name!r} stores {key} as {tuple(stored)}, where its configuration says {tuple(expected)}"
        )
    if unused := sorted(info["unexpected_keys"]):
        _logger.warning("model %r stores weights it does not use: %s (%d in all)", name, unused[0], len(unused))
    model.config.name_or_path = name  # the hub id rather than the cache folder it lies in
    return model, tokenizer, own_dtype


def _load_tokenizer(name: str, folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the reader of that kind of tokenizer pleases to raise
        _refuse_remote_code(name, error, trust_remote_code)
        raise InputError(
            f"the tokenizer of model {name!r} is missing or cannot be loaded: {first_line(error)}"
        ) from error
    # A folder without the tokenizer's files can give a tokenizer that knows special tokens only.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise InputError(f"model {name!r} comes without a tokenizer")
    return tokenizer


def _refuse_remote_code(name: str, error: Exception, trust_remote_code: bool) -> None:
    """Raise :class:`InputError` where ``error`` says that code which comes with the model would have to run."""
    if "trust_remote_code" in str(error) and not trust_remote_code:
        raise InputError(_REMOTE_CODE.format(name)) from error


def _trusted(name: str, folder: Path, trust_remote_code: bool) -> bool:
    """Whether the model code that comes with a checkpoint may run: when it is allowed to, or is this package's own."""
    auto_map = read_json(folder / "config.json").get("auto_map", {})
    if trust_remote_code or "AutoModelForCausalLM" not in auto_map:
        return trust_remote_code
    own, shipped = Path(modeling_pruned.__file__), folder / "modeling_pruned.py"
    named = all(str(value).startswith("modeling_pruned.") for value in auto_map.values())
    if named and shipped.is_file() and shipped.read_bytes() == own.read_bytes():
        return True
    raise InputError(_REMOTE_CODE.format(name))


def _folder_of(name: str) -> Path:
    """The local folder of a model, downloaded first where ``name`` is a hub id."""
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():  # the path of no name is the current folder
        return path
    if name and path.exists():
        raise InputError(f"model {name!r} is a file: pass the folder that holds it, with its config.json")
    try:
        huggingface_hub.utils.validate_repo_id(name)
        online = hub_reachable()
        return Path(
            huggingface_hub.snapshot_download(
                name,
                allow_patterns=_DOWNLOADED,
                ignore_patterns=_NOT_DOWNLOADED,
                local_files_only=not online,
            )
        )
    except HFValidationError as error:
        raise InputError(f"no model folder {name!r}") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"no model folder {name!r}, and no such model that you may read on the hub") from error
    except OSError as error:
        reason = first_line(error) if online else "the Hugging Face hub cannot be reached"
        raise InputError(f"no model folder {name!r}, and it cannot be downloaded: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder, or an :class:`InputError`."""
    if not path.is_file():
        raise InputError(f"model folder {str(path.parent)!r} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} is not a JSON object")
    return content


def _main_dtype(name: str, stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype of most numbers in the files of checkpoint ``name``."""
    numbers: Counter[str] = Counter()
    for tensor in stored.values():
        numbers[tensor.dtype] += tensor.numbers
    most = numbers.most_common(1)[0][0] if numbers else "no numbers"
    if most not in _DTYPES:
        raise UnsupportedModelError(f"model {name!r} is stored as {most}: only {', '.join(_DTYPES)} can be pruned")
    return _DTYPES[most]


def _weight_files(name: str, folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(
            f"model {name!r} has no model.safetensors: pickled weights (.bin, .pt) are never loaded, convert them first"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{str(index)!r} lists no weights")
    files = [folder / str(file) for file in sorted(set(weight_map.values()), key=str)]
    for path in files:
        if not path.is_file():
            raise InputError(f"model {name!r} lacks the weights file {path.name!r} that its index lists")
    return files


def first_line(error: Exception) -> str:
    """The first line of an error's message, with the second where that is only announced, or the error's name."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1])
