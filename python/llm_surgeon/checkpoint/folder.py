"""Files of a model folder, looked at before anything in it is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from llm_surgeon.errors import InputError, first_line
from llm_surgeon.formats.safetensors_headers import StoredTensor, read_headers
from llm_surgeon.resources import hub_reachable

# What a model needs from its hub repository: no pickles, and no other formats, which lie in subfolders.
_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_NOT_DOWNLOADED = ["*/*", "consolidated*"]
# Nested deeper, no configuration is read by transformers without a RecursionError.
_DEPTH = 64


def model_folder(name: str, trust_remote_code: bool = False) -> Path:
    """The local folder of a model, downloaded first where ``name`` is a hub id; its code only where that may run."""
    return _folder_of(name, [*_DOWNLOADED, "*.py"] if trust_remote_code else _DOWNLOADED)


def require_model(name: str) -> None:
    """Raise :class:`InputError` where there is no model ``name``: what else is asked of the user can wait till then."""
    read_json(_folder_of(name, ["config.json"]) / "config.json")


def _folder_of(name: str, files: list[str]) -> Path:
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
                allow_patterns=files,
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


def check_files(name: str, folder: Path) -> None:
    """Raise :class:`InputError` where ``folder`` holds a pipe or device, or an adapter, or shards of several processes.

    A pipe would be waited for without end; adapters and such shards transformers would load beside, or instead of, the
    weights files that are checked here.
    """
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"model {name!r} holds {path.name!r}, which is neither a file nor a folder")
        if path.name == "adapter_config.json" or path.name.startswith("adapter_model"):
            raise InputError(
                f"model {name!r} holds an adapter ({path.name}): merge it first (merge_and_unload of peft), "
                "or take its files away to use the model without it"
            )
        if re.match(r"shard-\d+-model-", path.name):
            raise InputError(f"model {name!r} is a distributed checkpoint ({path.name}): save it with save_pretrained")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder, or an :class:`InputError`."""
    if not path.is_file():
        raise InputError(f"model folder {str(path.parent)!r} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} is not a JSON object")
    if any(depth > _DEPTH for depth, _, _ in json_values(content)):
        raise InputError(f"{str(path)!r} cannot be read: it is nested deeper than {_DEPTH} levels")
    return content


def json_values(content: Any) -> Iterator[tuple[int, str, Any]]:
    """Every value in JSON ``content`` with its depth and the name that it, or the list around it, goes by."""
    parts: list[tuple[int, str, Any]] = [(0, "", content)]
    while parts:
        depth, name, value = parts.pop()
        yield depth, name, value
        if isinstance(value, dict):
            parts += [(depth + 1, key, part) for key, part in value.items()]
        elif isinstance(value, list):
            parts += [(depth + 1, name, part) for part in value]


def read_weights(name: str, folder: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
    """The safetensors files of a model, and what their headers say they hold.

    Raises:
        InputError: files are missing or damaged, or the index lists others than those.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single], read_headers([single])
    if not index.is_file():
        raise InputError(f"model {name!r} has no model.safetensors{_instead(folder)}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{str(index)!r} lists no weights")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{str(index)!r} must name files that lie beside it, not {file!r}")
        if not (folder / file).is_file():
            raise InputError(f"model {name!r} lacks the weights file {file!r} that its index lists")
    files = [folder / file for file in sorted(set(weight_map.values()))]
    stored = read_headers(files)
    if missing := sorted(set(weight_map) - set(stored)):
        raise InputError(f"model {name!r} lacks weights that its index lists: {missing[0]} ({len(missing)} in all)")
    return files, stored


def _instead(folder: Path) -> str:
    """Say what a folder without model.safetensors holds in its place."""
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if any(re.search(r"-\d+-of-\d+\.safetensors$", other) for other in others):
        return f" and no model.safetensors.index.json that would say how {others[0]!r} and the others belong together"
    if others:
        return f": rename {others[0]!r} to that if it holds the weights"
    if any(any(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt")):
        return ": pickled weights (.bin, .pt) are never loaded, convert them first"
    return ""


def read_files(folder: str | Path, *names: str) -> dict[str, bytes]:
    """The contents of those files that ``folder`` has; :class:`InputError` where one cannot be read."""
    paths = [Path(os.path.expanduser(folder), name) for name in names]
    try:
        return {path.name: path.read_bytes() for path in paths if path.is_file()}
    except OSError as error:
        raise InputError(f"model {str(folder)!r} cannot be read: {error}") from error
