"""2:4 models stored and run packed: 9/16 of the bytes of their linears, in bf16 and fp16.

    surgeon pack MODEL OUT

    import llm_surgeon
    model = AutoModelForCausalLM.from_pretrained("OUT", device_map="cuda")
    model.generate(..., cache_implementation="static")   # compiled, in CUDA graphs: several times as fast as without

Importing this package registers the format with transformers (:mod:`~llm_surgeon.inference.quantizer`);
:mod:`llm_surgeon.formats.packed_2_4` says what is on disk, :mod:`surgeon_kernels.pack_2_4` what a packed weight is. Two
options for a packed model on a GPU: :func:`merge_packed_linears` makes decoding faster, :func:`use_cusparselt` long
prompts. Within :func:`llm_surgeon.models.fused_pointwise.fused_pointwise` both are, as they are for a dense model;
prompts gain the most. :func:`merge_linears` makes a dense model decode faster.
:class:`llm_surgeon.inference.decoding.Decoder` decodes fastest, packed or dense.
"""

from llm_surgeon.formats.packed_2_4 import Surgeon24Config
from llm_surgeon.formats.packed_linear import PackedLinear
from llm_surgeon.inference.merged_linears import MergedPackedLinear, merge_linears, merge_packed_linears
from llm_surgeon.inference.pack import pack_model, to_torch_sparse, unpack_model, use_cusparselt
from llm_surgeon.inference.quantizer import Surgeon24Quantizer

__all__ = [
    "MergedPackedLinear",
    "PackedLinear",
    "Surgeon24Config",
    "Surgeon24Quantizer",
    "merge_linears",
    "merge_packed_linears",
    "pack_model",
    "to_torch_sparse",
    "unpack_model",
    "use_cusparselt",
]
