"""Compact a checkpoint into a new checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from llm_surgeon.checkpoint import claimed_output
from llm_surgeon.errors import InputError
from llm_surgeon.jobs.derived import Derived
from llm_surgeon.models.footprint import SizeComparison
from llm_surgeon.models.limits import choose_seqlen
from llm_surgeon.report.format import percent, plural
from llm_surgeon.structures.remove.rows_columns import Compacted, compact

_PROMPT = 64  # tokens that latency is measured with


def compact_checkpoint(
    source: str | Path, out: str | Path, *, overwrite: bool = False, trust_remote_code: bool = False
) -> Compacted:
    """Compact the checkpoint ``source`` into the new folder ``out``, in its own dtype.

    Raises:
        InputError: nothing in the model is zero by whole rows or columns, or ``source`` or ``out`` is at fault.
    """
    with claimed_output(out, overwrite, model=source) as output:
        made = Derived.load(source, output, dtype=None, trust_remote_code=trust_remote_code)
        tokens = torch.arange(min(_PROMPT, choose_seqlen(None, made.model)))[None]
        comparison = SizeComparison(made.model, tokens % made.model.get_input_embeddings().num_embeddings)
        comparison.keep(made.model)
        found = compact(made.model)
        if found.before == found.after:
            raise InputError(f"model {str(source)!r} has no zero rows or columns: prune it with structure rows-columns")
        made.require_disk()
        found = replace(found, sizes=comparison.sizes(made.model))
        made.save("compacted", _text(found), loading=_loading(made.custom_code))
    return found


def _text(found: Compacted) -> str:
    """Section of the model card on what compacting did."""
    from llm_surgeon.report.render import speed_sentence  # brings matplotlib: only where it is needed

    return (
        f"Zero rows and columns were taken out of the matrices of this model: {found.after:,} of {found.before:,} "
        f"weights of its linear layers are left ({percent(found.after / found.before)}), "
        f"{plural(found.neurons, 'neuron')} went altogether, and {plural(found.linears, 'linear layer')} gather inputs "
        f"or outputs. It computes the same as before. {speed_sentence(found.sizes) or ''}"
    )


def _loading(custom_code: bool) -> str:
    """Section of the model card on loading the compact model."""
    trust = ", trust_remote_code=True" if custom_code else ""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "path/to/this/model"  # the folder or hub id that holds this card
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto"{trust})
tokenizer = AutoTokenizer.from_pretrained(path)
```"""
