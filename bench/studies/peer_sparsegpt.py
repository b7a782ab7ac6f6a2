"""SparseGPT as llm-compressor does it: the peer of ``bench.end_to_end.prune --runs 2:4/llm-compressor``.

``pip install 'llmcompressor==0.14.*'`` first. Only its public API is called, with its own defaults.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import time

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def version() -> str:
    return f"llm-compressor {importlib.metadata.version('llmcompressor')} SparseGPT"


def prune(model: PreTrainedModel, ids: Tensor, structure: str) -> float:
    """Prune every linear of the decoder to ``structure`` on windows ``[samples, seqlen]``; the seconds it took."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    recipe = SparseGPTModifier(sparsity=0.5, mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"])
    data = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=1)  # type: ignore[arg-type]
    # It reads the model's configuration from where the model was loaded, and wants a tokenizer even for token ids.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.config._name_or_path = model.name_or_path = folder
        samples, seqlen = ids.shape
        begun = time.perf_counter()
        oneshot(
            model=model,
            recipe=recipe,
            dataset=data,
            processor=tokenizer,
            num_calibration_samples=samples,
            max_seq_length=seqlen,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - begun
