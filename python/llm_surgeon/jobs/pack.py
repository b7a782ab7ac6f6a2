"""Pack a 2:4 checkpoint into a new checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from llm_surgeon.checkpoint import claimed_output
from llm_surgeon.formats.packed_2_4 import QUANT_METHOD
from llm_surgeon.inference.pack import pack_model
from llm_surgeon.jobs.derived import Derived
from llm_surgeon.report.card import Records
from llm_surgeon.report.format import plural
from llm_surgeon.resources import human_bytes, require_disk


@dataclass(frozen=True)
class PackReport:
    """Result of packing: layer names, and the bytes of all weights before and after."""

    modules: list[str]
    ignored: list[str]
    dense_bytes: int
    packed_bytes: int

    def summary(self) -> str:
        lines = [
            f"packed {plural(len(self.modules), 'linear layer')}: {human_bytes(self.dense_bytes)} of weights became "
            f"{human_bytes(self.packed_bytes)} ({self.packed_bytes / self.dense_bytes:.0%})"
        ]
        if self.ignored:
            lines.append(f"not 2:4, stored dense: {', '.join(self.ignored)}")
        return "\n".join(lines)


def pack_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, layer: None,
) -> PackReport:
    """Pack the 2:4 linears of the checkpoint ``source`` (a folder or hub id) into the new folder ``out``.

    Weights keep their dtype and their values to the bit (a 2:4 matrix that is stored in another dtype than most stays
    dense), and the checksum of every tensor is written. After ``import llm_surgeon``,
    ``AutoModelForCausalLM.from_pretrained(out)`` loads it. ``out`` appears only when it is complete.

    Args:
        overwrite: replace an ``out`` that is not empty.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: called as ``progress(layers_done, layers, layer)``.

    Raises:
        InputError: the model has no 2:4 weight, or is packed or quantized already; also for what is wrong with
            ``source``, ``out``, memory or disk.
        NumericalError: a tensor holds NaN or infinity.
    """
    with claimed_output(out, overwrite, model=source) as output:
        made = Derived.load(source, output, dtype=None, trust_remote_code=trust_remote_code)
        dense_bytes = model_bytes(made.model)
        require_disk(output.path, dense_bytes // 2)  # no packed weight takes less
        # A matrix stored in a dtype of its own was rounded as it was loaded; dense it is saved as it was stored.
        config = pack_model(made.model, progress, [name.removesuffix(".weight") for name in made.form.others])
        made.require_disk()
        report = PackReport(config.modules, config.ignored, dense_bytes, model_bytes(made.model))
        tags, loading = ["2:4", QUANT_METHOD], _loading(made.custom_code)
        made.save("packed", _text(report, made.records), tags=tags, loading=loading)
    return report


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers that a checkpoint of the model holds, shared ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def _text(report: PackReport, records: Records) -> str:
    """Section of the model card on what packing did."""
    more = " How it was pruned, and what that cost, is in `report.html`." if records.report is not None else ""
    return (
        f"{plural(len(report.modules), 'linear layer')} of this model have at most two nonzero weights in every four "
        "consecutive ones of a row (2:4). They are stored packed, as the kept weights and their 2-bit positions, with "
        f"the same values: {human_bytes(report.packed_bytes)} instead of {human_bytes(report.dense_bytes)}. On NVIDIA "
        f"GPUs they run packed, too.{more}"
    )


def _loading(custom_code: bool) -> str:
    """Section of the model card on loading the packed model."""
    trust = ", trust_remote_code=True" if custom_code else ""
    return f"""With `surgeon-kernels` installed:

```python
import llm_surgeon  # teaches transformers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "path/to/this/model"  # the folder or hub id that holds this card
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map="auto"{trust})
tokenizer = AutoTokenizer.from_pretrained(path)
```

On a GPU `llm_surgeon.inference.merge_packed_linears(model)` and then
`model.generate(..., cache_implementation="static")` generate fastest.
`model.dequantize()` gives the dense model back, zeros included.
"""
