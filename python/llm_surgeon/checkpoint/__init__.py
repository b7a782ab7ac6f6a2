"""Load checkpoints without trusting their files, and write them whole or not at all."""

from llm_surgeon.checkpoint.load import load_model
from llm_surgeon.checkpoint.save import check_output, pruning_records, save_checkpoint

__all__ = ["check_output", "load_model", "pruning_records", "save_checkpoint"]
