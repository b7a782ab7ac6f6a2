"""Load a checkpoint: safetensors only, every file checked first, and nothing filled in at random."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.checkpoint.config_checks import check_config, is_packed
from llm_surgeon.checkpoint.folder import check_files, model_folder, read_json, read_weights
from llm_surgeon.checkpoint.remote_code import check_tokenizer_class, own_class, refuse_code
from llm_surgeon.checkpoint.stored_form import StoredForm, stored_form
from llm_surgeon.errors import InputError, SurgeonError, UnsupportedModelError, first_line
from llm_surgeon.formats.safetensors_headers import StoredTensor
from llm_surgeon.models.decoder import check_finite
from llm_surgeon.resources import require_memory

_logger = logging.getLogger(__name__)

# Numbers that a model may lack, to be named one by one.
_SLACK = 10_000_000
# In the blocks of checkpoints that transformers wrote years ago.
_FORMER_BUFFERS = re.compile(r"\.(masked_bias|inv_freq|position_ids)$")


def load_model(
    path_or_id: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    *,
    packed: bool = False,
    processes: int = 1,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, StoredForm]:
    """A causal LM in ``dtype`` on ``device``, its tokenizer, and the form that it is stored in, for saving.

    Only safetensors are read, never pickles; the header and the length of every file are checked first. No code runs
    that comes with the checkpoint, unless ``trust_remote_code`` is set: models that this package made smaller are of
    its own classes, wherever they come from.

    Args:
        path_or_id: a folder, or a model id on the Hugging Face hub.
        dtype: of the weights in memory; ``None`` for the one that most of them are stored in.
        processes: so many load it into the main memory of this machine.
        packed: also take what ``surgeon pack`` wrote, with its packed layers.
        trust_remote_code: run model and tokenizer code that comes with the checkpoint.

    Raises:
        InputError: no such model; files missing or damaged; weights missing, of another shape than the configuration
            says, or of blocks that it does not have; an adapter beside the weights; no tokenizer; too little memory;
            remote code needed and not allowed.
        UnsupportedModelError: the checkpoint is quantized, or packed and ``packed`` is not set.
        NumericalError: a parameter or buffer holds NaN or infinity.
    """
    name = str(path_or_id)
    folder = model_folder(name, trust_remote_code)
    check_files(name, folder)
    config = read_json(folder / "config.json")
    if is_packed(name, config) and not packed:
        raise UnsupportedModelError(f"model {name!r} is packed: take the dense checkpoint it was made from")
    own = own_class(name, folder, config)
    if not trust_remote_code:
        refuse_code(name, folder, config)
    check_tokenizer_class(name, folder, config)
    files, stored = read_weights(name, folder)
    check_config(name, config, stored)
    form = stored_form(name, folder, stored)
    dtype = dtype or form.main
    numbers = sum(tensor.numbers for tensor in stored.values())
    if packed and torch.device(device or "cpu").type != "cuda":  # a dense weight will be kept beside a packed one
        numbers += 2 * sum(tensor.numbers for key, tensor in stored.items() if key.endswith(".values"))
    for place in {torch.device("cpu"), torch.device(device or "cpu")}:  # read into main memory, then moved
        require_memory(numbers * dtype.itemsize, place, processes=processes)
    tokenizer = _load_tokenizer(name, folder, trust_remote_code)  # before the weights, which may take minutes
    try:
        _check_size(name, folder, own, stored, trust_remote_code)
        model, info = (own or AutoModelForCausalLM).from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code and own is None,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
        _check_loaded(name, model, info, stored)
        check_finite(model)
        form.follow(model, files)
        if device is not None:
            model.to(device)
    except SurgeonError:
        raise
    # Readers of configurations and weights raise whatever they please, even plain Exception.
    except Exception as error:
        if "Unrecognized configuration class" in str(error):
            kind = config.get("model_type")
            raise UnsupportedModelError(f"model {name!r} is a {kind}, not a causal language model") from error
        raise InputError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
    if folder.parent.name == "snapshots":  # of the hub's cache, named for their commits
        model.config._commit_hash = folder.name
    model.config.name_or_path = name  # the hub id rather than the cache folder it lies in
    return model, tokenizer, form


def _check_size(
    name: str,
    folder: Path,
    own: type[PreTrainedModel] | None,
    stored: Mapping[str, StoredTensor],
    trust_remote_code: bool,
) -> None:
    """Refuse a configuration of a far larger model than the files hold: memory would be filled with random numbers."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code and own is None)
    with torch.device("meta"):
        if own is None:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        else:
            model = own(config)
    numbers = sum(tensor.numbers for tensor in stored.values())
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > 2 * numbers + _SLACK:  # packed weights are half as many numbers
        raise InputError(
            f"the configuration of model {name!r} describes {described:,} weights, and its files hold {numbers:,}"
        )


def _check_loaded(name: str, model: PreTrainedModel, info: dict[str, Any], stored: Mapping[str, StoredTensor]) -> None:
    """Refuse a model that lacks weights (transformers fills them with random numbers), or has no place for some."""
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"model {name!r} lacks weights: {missing[0]} ({len(missing)} in all)")
    if mismatched := sorted(info["mismatched_keys"]):
        key, found, expected = mismatched[0]
        raise InputError(
            f"model {name!r} stores {key} as {tuple(found)}, where its configuration says {tuple(expected)}"
        )
    unused = sorted(info["unexpected_keys"])
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    trunk = f"{model.base_model_prefix}."
    for key in unused:
        in_block = any(key.startswith((f"{path}.", f"{path.removeprefix(trunk)}.")) for path in lists)
        if in_block and not _FORMER_BUFFERS.search(key) and not (key.endswith(".bias") and _is_mask(key, stored)):
            raise InputError(
                f"model {name!r} stores weights of its blocks that its configuration has no place for: {key} "
                f"({len(unused)} in all)"
            )
    if unused:
        _logger.warning("model %r stores weights it does not use: %s (%d in all)", name, unused[0], len(unused))


def _is_mask(key: str, stored: Mapping[str, StoredTensor]) -> bool:
    """True where ``key`` is a causal mask, which old checkpoints store as a ``bias`` of their attention."""
    return any(len(tensor.shape) > 2 for name, tensor in stored.items() if name.endswith(key) or key.endswith(name))


def _load_tokenizer(name: str, folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the reader of that kind of tokenizer pleases to raise
        raise InputError(
            f"the tokenizer of model {name!r} is missing or cannot be loaded: {first_line(error)}"
        ) from error
    # A folder without the tokenizer's files can give a tokenizer that knows special tokens only.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise InputError(f"model {name!r} comes without a tokenizer")
    return tokenizer
