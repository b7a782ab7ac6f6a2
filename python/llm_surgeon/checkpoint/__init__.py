"""Load checkpoints without trusting their files, and write them whole or not at all."""

from llm_surgeon.checkpoint.folder import require_model
from llm_surgeon.checkpoint.load import load_model
from llm_surgeon.checkpoint.output import Output, claimed_output
from llm_surgeon.checkpoint.output_checks import check_output
from llm_surgeon.checkpoint.save import checkpoint_bytes, save_checkpoint, weights_bytes
from llm_surgeon.checkpoint.stored_form import StoredForm

__all__ = [
    "Output",
    "StoredForm",
    "check_output",
    "checkpoint_bytes",
    "claimed_output",
    "load_model",
    "require_model",
    "save_checkpoint",
    "weights_bytes",
]
