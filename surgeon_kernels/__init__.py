"""Operations of curvature-based pruning on plain tensors, one module per op.

Conventions, fixed for the whole package: a linear layer is ``y = W a`` with ``W`` ``[R, C]``; its curvature is
``F ≈ G ⊗ A`` with ``G`` ``[R, R]`` and ``A`` ``[C, C]``, and ``vec`` is row-major, so
``(G ⊗ A) vec(X) = vec(G X A)``. ``pruned`` is a bool mask, True where a weight is (to be) zero. ``Δ`` (delta) is added
to ``W``. Costs and objectives are increases of the mean loss, in nats per token, when
``A = (1/N) Σ a aᵀ`` and ``G = (1/N) Σ g gᵀ``. Argument order everywhere: weight, pruned, G, A.
"""

import warnings
from typing import Any

from surgeon_kernels.block_ops.add_rms_norm import add_rms_norm
from surgeon_kernels.block_ops.decode_attention import DecodeAttention
from surgeon_kernels.block_ops.fill_cache import fill_cache
from surgeon_kernels.block_ops.rms_norm import rms_norm
from surgeon_kernels.block_ops.rotary import rotary
from surgeon_kernels.block_ops.swiglu import swiglu
from surgeon_kernels.gram.gram import GramProduct, gram_accumulate_, gram_accumulate_each_
from surgeon_kernels.gram.symmetric import SymmetricAccumulator
from surgeon_kernels.installation import build_info
from surgeon_kernels.linalg.chunked_solve import chunked_solve
from surgeon_kernels.linalg.low_rank import leading_vectors
from surgeon_kernels.linalg.quadratic_form import quadratic_form
from surgeon_kernels.linalg.spd_inverse import (
    DampedInverse,
    NotPositiveDefiniteError,
    cholesky_with_jitter,
    damp,
    inverse_and_diagonal,
    inverse_diagonal,
    mean_diagonal,
    spd_inverse,
    unchecked_inverse,
)
from surgeon_kernels.selection.costs import column_block_cost, column_cost, element_cost, row_cost, swap_cost
from surgeon_kernels.selection.k_cheapest import k_cheapest
from surgeon_kernels.selection.k_smallest import k_smallest, smallest_mask
from surgeon_kernels.selection.nm_select import nm_group_cost, nm_prune, nm_select
from surgeon_kernels.selection.weight_costs import WeightCosts
from surgeon_kernels.sparse24.linear_2_4 import Linear24Weight, linear_2_4, prepare_2_4
from surgeon_kernels.sparse24.linear_2_4_tune import tune_2_4
from surgeon_kernels.sparse24.pack_2_4 import Packed24, check_packed_2_4, is_2_4, pack_2_4, unpack_2_4
from surgeon_kernels.updates.chunked_update import ChunkedUpdate, chunked_update, independent_update
from surgeon_kernels.updates.joint_update import JointUpdate, joint_estimate, joint_update, objective
from surgeon_kernels.updates.rows_columns_update import rows_columns_update

__all__ = [
    "ChunkedUpdate",
    "DampedInverse",
    "DecodeAttention",
    "GramProduct",
    "JointUpdate",
    "Linear24Weight",
    "NotPositiveDefiniteError",
    "Packed24",
    "SymmetricAccumulator",
    "WeightCosts",
    "add_rms_norm",
    "build_info",
    "check_packed_2_4",
    "cholesky_with_jitter",
    "chunked_solve",
    "chunked_update",
    "column_block_cost",
    "column_cost",
    "damp",
    "element_cost",
    "fill_cache",
    "gram_accumulate_",
    "gram_accumulate_each_",
    "independent_update",
    "inverse_and_diagonal",
    "inverse_diagonal",
    "is_2_4",
    "joint_estimate",
    "joint_update",
    "k_cheapest",
    "k_smallest",
    "leading_vectors",
    "linear_2_4",
    "mean_diagonal",
    "nm_group_cost",
    "nm_prune",
    "nm_select",
    "objective",
    "pack_2_4",
    "prepare_2_4",
    "quadratic_form",
    "rms_norm",
    "rotary",
    "row_cost",
    "rows_columns_update",
    "smallest_mask",
    "spd_inverse",
    "swap_cost",
    "swiglu",
    "tune_2_4",
    "unchecked_inverse",
    "unpack_2_4",
]


def __getattr__(name: str) -> Any:
    if name == "exchange_cost":
        warnings.warn("surgeon_kernels.exchange_cost is called swap_cost now", DeprecationWarning, stacklevel=2)
        return swap_cost
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
