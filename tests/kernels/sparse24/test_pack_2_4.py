import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon_kernels import Packed24, check_packed_2_4, is_2_4, nm_select, pack_2_4, unpack_2_4
from surgeon_kernels.sparse24 import pack_2_4 as module
from tests.kernels.dense import repeatable

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def bits(x):
    return x.view(BITS[x.element_size()])


def random_2_4(rows, columns, dtype=torch.float32, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return weight.masked_fill(nm_select(weight.abs(), 2, 4), 0.0)


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def test_layout_by_hand(device):
    weight = torch.tensor(
        [
            [1, 2, 0, 0, 0, 0, 3, 4, 5, 0, 0, 6],  # pairs (0, 1), (2, 3) and (0, 3)
            [0, 0, 0, 0, 0, 0, 0, 7, 0, 8, 0, 0],  # padded to (0, 1), (0, 3) and (0, 1)
        ],
        dtype=torch.float16,
        device=device,
    )
    packed = pack_2_4(weight)
    assert packed.values.tolist() == [[1, 2, 3, 4, 5, 6], [0, 0, 0, 7, 0, 8]]
    assert packed.indices.tolist() == [[0b1110_0100, 0b1100], [0b1100_0100, 0b0100]]
    assert packed.values.dtype == torch.float16 and packed.indices.dtype == torch.uint8
    assert packed.values.device == packed.indices.device == weight.device
    assert (packed.rows, packed.columns, packed.nbytes) == (2, 12, 28)
    assert torch.equal(unpack_2_4(packed), weight)


@repeatable
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 4),
    groups=st.integers(0, 5),
    data=st.data(),
)
def test_every_bit_comes_back(dtype, rows, groups, data):
    """Values are arbitrary bit patterns: subnormals, infinities and NaNs of every payload."""
    size = torch.empty(0, dtype=dtype).element_size() * 8
    patterns = st.integers(-(2 ** (size - 1)), 2 ** (size - 1) - 1)
    weight = torch.zeros(rows, 4 * groups, dtype=dtype)
    for r, g in itertools.product(range(rows), range(groups)):
        for p in data.draw(st.lists(st.integers(0, 3), max_size=2)):
            bits(weight)[r, 4 * g + p] = data.draw(patterns)
    packed = pack_2_4(weight)
    assert packed.values.shape == (rows, 2 * groups) and packed.indices.shape == (rows, -(-groups // 2))
    check_packed_2_4(packed)
    assert is_2_4(weight)
    expected = bits(weight).masked_fill(weight == 0, 0)  # -0.0 becomes +0.0
    assert torch.equal(bits(unpack_2_4(packed)), expected)


def test_packing_is_a_function_of_the_values(device):
    """Every set of nonzeros has one packed form: signs of zeros do not matter, and packing again changes nothing."""
    nonzeros = [p for n in range(3) for p in itertools.combinations(range(4), n)]
    weight = torch.zeros(len(nonzeros), 4, device=device)
    for row, positions in zip(weight, nonzeros, strict=True):
        row[list(positions)] = torch.arange(1.0, len(positions) + 1, device=device)
    packed = pack_2_4(weight)
    kept = [(n & 3, n >> 2) for n in packed.indices[:, 0].tolist()]
    assert kept == [(0, 1), (0, 1), (0, 1), (0, 2), (0, 3), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for other in (torch.where(weight == 0, -0.0, weight), unpack_2_4(packed)):
        again = pack_2_4(other)
        assert torch.equal(bits(again.values), bits(packed.values)) and torch.equal(again.indices, packed.indices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (7, 8), (33, 52), (64, 256)])
def test_random_weights(rows, columns, dtype, device):
    weight = random_2_4(rows, columns, dtype).to(device)
    packed = pack_2_4(weight)
    assert packed.values.is_contiguous() and packed.indices.is_contiguous()
    assert torch.equal(unpack_2_4(packed), weight)
    strided = weight.T.contiguous().T
    assert torch.equal(pack_2_4(strided).values, packed.values)
    if columns % 8 == 0 and dtype == torch.bfloat16:
        assert packed.nbytes * 16 == weight.nbytes * 9


def test_slabs_of_rows(monkeypatch, device):
    weight = random_2_4(11, 16).to(device)
    whole = pack_2_4(weight)
    monkeypatch.setattr(module, "_SLAB", 33)
    packed = pack_2_4(weight)
    assert torch.equal(packed.values, whole.values) and torch.equal(packed.indices, whole.indices)
    weight[9, 4:7] = 1.0
    assert not is_2_4(weight)
    with pytest.raises(ValueError, match="row 9 has 3 nonzeros in columns 4 to 7"):
        pack_2_4(weight)


def test_a_weight_that_is_not_2_4_is_refused(device):
    weight = random_2_4(6, 24).to(device)
    weight[4, 8:12] = float("nan")
    weight[5, 0:4] = 1.0
    with pytest.raises(ValueError, match=r"not 2:4: row 4 has 4 nonzeros in columns 8 to 11"):
        pack_2_4(weight)
    assert not is_2_4(weight)


@pytest.mark.parametrize("shape", [(3, 6), (8,), (2, 2, 4)])
def test_a_shape_that_does_not_divide_is_refused(shape):
    with pytest.raises(ValueError, match="divisible by 4"):
        pack_2_4(torch.zeros(shape))
    assert not is_2_4(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        pack_2_4(torch.zeros(2, 8, dtype=dtype))
    assert not is_2_4(torch.zeros(2, 8, dtype=dtype))


def test_corrupt_indices_are_refused(device):
    packed = pack_2_4(random_2_4(5, 12).to(device))
    for nibble in set(range(16)) - {p + 4 * q for p, q in itertools.combinations(range(4), 2)}:
        broken = packed.indices.clone()
        broken[3, 0] = (broken[3, 0] & 15) | (nibble << 4)
        with pytest.raises(ValueError, match="row 3 are corrupt in columns 4 to 7"):
            check_packed_2_4(Packed24(packed.values, broken))
    broken = packed.indices.clone()
    broken[1, 1] |= 0x40
    with pytest.raises(ValueError, match="row 1 are corrupt"):
        check_packed_2_4(Packed24(packed.values, broken))


@pytest.mark.parametrize("check", [check_packed_2_4, unpack_2_4])
def test_tensors_that_do_not_belong_together_are_refused(check):
    values, indices = pack_2_4(random_2_4(5, 12))
    with pytest.raises(ValueError, match=r"must be \[5, 2\], not \[5, 1\]"):
        check(Packed24(values, indices[:, :1]))
    with pytest.raises(ValueError, match=r"must be \[4, 2\], not \[5, 2\]"):
        check(Packed24(values[:4], indices))
    with pytest.raises(ValueError, match="even width"):
        check(Packed24(values[:, :5], indices))
    with pytest.raises(TypeError, match=r"uint8, not torch\.int8"):
        check(Packed24(values, indices.view(torch.int8)))
    with pytest.raises(TypeError, match="int32"):
        check(Packed24(values.int(), indices))


def test_unpacking_compiles_without_graph_breaks():
    packed = pack_2_4(random_2_4(8, 12))
    compiled = torch.compile(unpack_2_4, fullgraph=True, backend="eager")
    assert torch.equal(compiled(packed), unpack_2_4(packed))
