"""Recovery: training of what pruning left, which keeps every zero a zero."""

from llm_surgeon.recovery.config import PRESETS, RecoverConfig
from llm_surgeon.recovery.recover import RecoveryReport, recover, recover_checkpoint

__all__ = ["PRESETS", "RecoverConfig", "RecoveryReport", "recover", "recover_checkpoint"]
