"""The checkpoint that a job derives from another: loaded, changed in memory, saved with the records of the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.checkpoint import Output, StoredForm, checkpoint_bytes, load_model, save_checkpoint
from llm_surgeon.report.card import Records
from llm_surgeon.resources import require_disk


@dataclass(frozen=True)
class Derived:
    """A model in memory, with what saving it takes.

    Attributes:
        source: the folder or hub id that it was loaded from.
        output: where it will be saved; ``None`` where another rank does that.
        records: what ``source`` says of its pruning.
        form: how ``source`` is stored, and so what is derived from it.
    """

    source: str
    output: Output | None
    records: Records
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    form: StoredForm

    @classmethod
    def load(
        cls,
        source: str | Path,
        output: Output | None,
        *,
        dtype: torch.dtype | None,
        device: torch.device | None = None,
        trust_remote_code: bool,
    ) -> Derived:
        """Read the records of ``source`` and load it, see :func:`~llm_surgeon.checkpoint.load_model`."""
        records = Records.read(source)
        loaded = load_model(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        return cls(str(source), output, records, *loaded)

    @property
    def custom_code(self) -> bool:
        """True where transformers writes the model's class beside the weights."""
        return self.model._auto_class is not None

    def require_disk(self, more: int = 0) -> None:
        """Raise :class:`InputError` where the disk has no room for the checkpoint and ``more`` bytes."""
        assert self.output is not None
        require_disk(self.output.path, checkpoint_bytes(self.model, self.tokenizer, self.form) + more)

    def save(
        self,
        what: str,
        text: str,
        *,
        tags: Iterable[str] = (),
        loading: str | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Write the checkpoint, ``text`` added to its records, see :meth:`Records.followed_by`.

        Args:
            files: further files, texts by name.
        """
        assert self.output is not None
        records = self.records.followed_by(what, text, name=self.source, tags=tags, loading=loading)
        save_checkpoint(
            self.model, self.tokenizer, self.output, dtype=self.form, extra_files={**(files or {}), **records}
        )
