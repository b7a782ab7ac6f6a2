"""The former name of :mod:`llm_surgeon.inference`."""

import warnings

from llm_surgeon.inference import MergedPackedLinear as FusedLinear
from llm_surgeon.inference import PackedLinear, pack_model, to_torch_sparse, unpack_model, use_cusparselt
from llm_surgeon.inference import merge_packed_linears as fuse_linears

__all__ = [
    "FusedLinear",
    "PackedLinear",
    "fuse_linears",
    "pack_model",
    "to_torch_sparse",
    "unpack_model",
    "use_cusparselt",
]

warnings.warn("llm_surgeon.packed is llm_surgeon.inference now", DeprecationWarning, stacklevel=2)
