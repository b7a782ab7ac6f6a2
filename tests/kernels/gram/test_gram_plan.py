import itertools

import pytest
import torch

from surgeon_kernels.gram.plan import (
    ADD,
    CONFIGS,
    IDLE,
    GramConfig,
    _number_of_blocks,
    blocks_in_order,
    choose,
    schedule,
)

ALL = sorted({config for choices in CONFIGS.values() for config in choices})


@pytest.mark.parametrize("n", [1, 128, 129, 2048, 2049, 4096, 5000])
@pytest.mark.parametrize("config", ALL)
def test_every_element_of_the_lower_triangle_is_in_one_block(n, config):
    blocks = blocks_in_order(n, config)
    assert len(set(blocks)) == len(blocks)
    r, c = torch.arange(n)[:, None], torch.arange(n)[None, :]
    covered = torch.zeros(n, n, dtype=torch.bool)
    for row, column in blocks:
        rows, columns = row * config.block_m, column * config.block_n
        assert rows < n and columns < n and columns < rows + config.block_m
        covered[rows : rows + config.block_m, columns : columns + config.block_n] = True
    assert covered[r >= c].all()


@pytest.mark.parametrize(
    ("n", "block_m", "block_n"), list(itertools.product([1, 129, 2048, 5000], [64, 128], [64, 128, 256]))
)
def test_blocks_are_counted_as_they_are_listed(n, block_m, block_n):
    config = ALL[0]._replace(block_m=block_m, block_n=block_n)
    assert _number_of_blocks(n, block_m, block_n) == len(blocks_in_order(n, config))


@pytest.mark.parametrize(
    ("n", "steps", "programs"), list(itertools.product([2048, 4096, 11008], [1, 2, 33, 256], [5, 132, 264]))
)
def test_units_partition_the_steps_of_every_block(n, steps, programs):
    config = GramConfig(128, 256, 64, 8, 3, 1, True)
    plan = schedule(n, steps, config, programs)
    parts = {}
    for index, unit in enumerate(plan.units):
        if unit.slot == IDLE:
            assert unit.first == unit.last
            continue
        assert unit.first < unit.last
        assert unit.last - unit.first <= config.longest
        parts.setdefault((unit.row, unit.column), []).append((index, unit))
    assert sorted(parts) == sorted(blocks_in_order(n, config))
    first_slots = {(row, column): slot for row, column, slot in plan.reductions}
    for block, indexed in parts.items():
        units = [unit for _, unit in indexed]
        assert [unit.first for unit in units] == [0, *(unit.last for unit in units[:-1])]
        assert units[-1].last == steps
        if block in first_slots:
            assert [unit.slot for unit in units] == list(range(first_slots[block], first_slots[block] + plan.splits))
        else:
            assert {unit.slot for unit in units} == {ADD}
            assert len({index % programs for index, _ in indexed}) == 1
    slots = [unit.slot for unit in plan.units if unit.slot >= 0]
    assert slots == list(range(len(plan.reductions) * plan.splits))


def test_a_last_round_of_few_blocks_is_split():
    # 272 blocks on 132 programs: two rounds and 8 blocks, which 132 programs share.
    plan = schedule(4096, 256, GramConfig(128, 256, 64, 8, 3, 1, True), 132)
    assert len(plan.reductions) == 8
    assert plan.splits == 16
    assert all(unit.slot == ADD for unit in plan.units[: 264 * 2])
    assert all(unit.slot >= 0 for unit in plan.units[264 * 2 :])


def test_full_rounds_are_not_split():
    plan = schedule(4096, 256, GramConfig(128, 128, 64, 8, 4, 1, True), 132)
    assert len(plan.units) == 528 * 2 and not plan.reductions


def test_a_second_launch_must_pay():
    # 136 blocks: the last four are split where a round of whole blocks takes longer than a launch.
    config = GramConfig(128, 128, 64, 8, 4, 1, True, step=0.36)
    assert schedule(2048, 128, config, 132).splits == 16
    assert schedule(2048, 2, config, 132).splits == 1


@pytest.mark.parametrize(
    ("columns", "tokens", "dtype", "out_dtype", "major", "block"),
    [
        (4096, 16384, torch.bfloat16, torch.float32, 9, (128, 128)),  # four full rounds
        (11008, 16384, torch.bfloat16, torch.float32, 9, (128, 256)),
        (11008, 64, torch.float16, torch.float32, 9, (128, 256)),
        (2048, 2048, torch.bfloat16, torch.float32, 9, (128, 256)),  # one round of blocks
        (2048, 16384, torch.bfloat16, torch.float32, 9, (128, 128)),
        (4096, 2048, torch.bfloat16, torch.float32, 9, (128, 128)),  # four full rounds
        (4096, 2048, torch.float32, torch.float32, 9, (128, 64)),
        (4096, 2048, torch.bfloat16, torch.float32, 8, (128, 128)),
        (11008, 16384, torch.bfloat16, torch.float32, 10, (128, 256)),
        (4096, 2048, torch.float32, torch.float32, 10, (128, 64)),
        (4096, 2048, torch.float16, torch.float32, 12, (128, 128)),
        (4096, 2048, torch.float32, torch.float32, 12, (128, 64)),
        (4097, 16384, torch.bfloat16, torch.float32, 9, (128, 128)),
        (4096, 63, torch.bfloat16, torch.float32, 9, None),
        (4096, 2048, torch.float64, torch.float32, 9, None),
        (4096, 2048, torch.bfloat16, torch.float64, 9, None),
        (4096, 2048, torch.bfloat16, torch.float32, 7, None),
    ],
)
def test_the_rule_for_packed_outputs(columns, tokens, dtype, out_dtype, major, block):
    config = choose(columns, tokens, dtype, out_dtype, major, packed=True)
    assert (config and (config.block_m, config.block_n)) == block
    if config:
        assert config.descriptors == (major == 9 or (major == 10 and dtype != torch.float32))


@pytest.mark.parametrize(
    ("columns", "tokens", "dtype", "kernel"),
    [
        (11008, 16384, torch.bfloat16, True),
        (2048, 4096, torch.bfloat16, True),
        (2048, 2048, torch.bfloat16, False),
        (1024, 16384, torch.bfloat16, True),
        (1016, 16384, torch.bfloat16, False),
        (1025, 4096, torch.bfloat16, True),
        (1023, 4096, torch.bfloat16, False),
        (1024, 4096, torch.float32, True),
        (1016, 4096, torch.float32, False),
    ],
)
def test_the_rule_for_dense_outputs(columns, tokens, dtype, kernel):
    config = choose(columns, tokens, dtype, torch.float32, 9, packed=False)
    assert (config is not None) == kernel
    assert config is None or config.block_n <= 128


@pytest.mark.parametrize(
    ("columns", "ones_column", "short"),
    [(4096, False, False), (4096, True, True), (4095, True, False), (1025, False, True)],
)
def test_widths_that_are_no_multiple_of_8_are_summed_in_short_runs(columns, ones_column, short):
    config = choose(columns, 4096, torch.bfloat16, torch.float32, 9, packed=columns > 2000, ones_column=ones_column)
    assert not short or (config.run == 16 and config.in_registers)


def test_parts_are_no_longer_than_a_run():
    config = GramConfig(128, 128, 64, 8, 4, 1, True, run=16)
    for steps in (17, 300, 1000):
        plan = schedule(2100, steps, config, 132)
        assert max(unit.last - unit.first for unit in plan.units) <= 16
