"""Checkpoint folders and tokenizers for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.surgeon.tiny_models import VOCABULARY, build

IDS = torch.arange(12).view(2, 6) * 5
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<s>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", chat_template=CHAT)


def save_folder(folder: Path, model: PreTrainedModel, **options: Any) -> Path:
    """As a checkpoint of someone else's making."""
    model.save_pretrained(folder, **options)
    tokenizer_of_words().save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tree(folder: Path) -> dict[str, bytes]:
    """All files below ``folder``, hidden ones included, with their contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rounded(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The float32 model whose weights are those of ``build(name)`` rounded to ``dtype``."""
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits
