import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon_kernels import quadratic_form
from tests.kernels.dense import FACTOR_KINDS, factor, random_weight, repeatable


@repeatable
@given(st.integers(1, 6), st.integers(1, 7), st.sampled_from(FACTOR_KINDS), st.integers(0, 2**31))
def test_is_the_form_of_every_row(rows, columns, kind, seed):
    x, S = random_weight(rows, columns, seed), factor(columns, kind, seed + 1)
    expected = torch.tensor([float(row @ S @ row) for row in x], dtype=torch.float64)
    torch.testing.assert_close(quadratic_form(x, S), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(quadratic_form(x.T.contiguous().T, S), expected, rtol=1e-12, atol=0)


def test_empty():
    assert quadratic_form(torch.empty(0, 3), torch.eye(3)).shape == (0,)
    assert quadratic_form(torch.empty(2, 0), torch.empty(0, 0)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shapes", [((3,), (3, 3)), ((2, 3), (2, 2)), ((2, 3), (3, 2))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="quadratic form"):
        quadratic_form(*map(torch.ones, shapes))
