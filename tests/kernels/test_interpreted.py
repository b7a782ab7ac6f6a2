"""Triton kernels against their references on a CPU, by Triton's interpreter."""

import pytest

pytest.importorskip("triton", reason="needs Triton's interpreter")

from tests.kernels.interpreter import assert_agrees


@pytest.mark.parametrize(
    "checks",
    [
        "gram.interpreted_gram",
        "block_ops.interpreted_decoding",
        "gram.interpreted_gram_group",
        "block_ops.interpreted_pointwise",
        "linalg.interpreted_masked_cg",
        "linalg.interpreted_quadratic_form",
        "linalg.interpreted_sweep_inverse",
    ],
)
def test_the_kernels_are_right_in_the_interpreter(checks):
    """float32 and float16 only: the interpreter's bfloat16 products are wrong."""
    assert_agrees(checks)
