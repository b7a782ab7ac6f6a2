"""Options read from the fields of a class: their checks, choices, old names, and the list in its docstring."""

import logging
from dataclasses import dataclass
from typing import Literal

import pytest

from llm_surgeon import InputError, PruneConfig
from llm_surgeon.config.fields import check_options, count, number, option, options, options_of, present_names
from llm_surgeon.config.recover import RecoverConfig


@options
@dataclass(frozen=True)
class Cut:
    """A cut."""

    depth: int = option(3, "Layers cut through.", count(1, 9), aliases=("deep",))
    width: float | None = option(None, "Of the blade.", number(), panel="Blade")
    steel: Literal["blue", "grey"] = option("blue", "Colour")
    names: str = option("", "Who cut", choices=lambda: ("Ann", "Bo", ""))
    sewn: bool = option(False, "Sewn up again.")

    def __post_init__(self):
        check_options(self)


def test_a_field_says_all_about_its_option():
    depth, width, steel, names, sewn = options_of(Cut)
    assert [each.type for each in options_of(Cut)] == [int, float, str, str, bool]
    assert (depth.name, depth.default, depth.help, depth.aliases) == ("depth", 3, "Layers cut through.", ("deep",))
    assert (width.panel, width.default, steel.panel) == ("Blade", None, None)
    assert depth.choices is None and sewn.choices is None
    assert steel.choices() == ("blue", "grey") and names.choices() == ("Ann", "Bo", "")
    assert Cut.__doc__ == (
        "A cut.\n\nAttributes:\n    depth: Layers cut through.\n    width: Of the blade.\n"
        "    steel: Colour\n    names: Who cut\n    sewn: Sewn up again.\n"
    )


def test_values_are_checked_by_their_types_and_bounds():
    assert Cut(9, 0.5, "grey", "Bo", True) == Cut(depth=9, width=0.5, steel="grey", names="Bo", sewn=True)
    for given, words in (
        ({"depth": 10}, "depth must be at most 9, not 10"),
        ({"depth": None}, "depth must be a whole number of at least 1, not None"),
        ({"width": 0}, "width must be a number greater than 0, not 0"),
        ({"steel": "gray"}, "unknown steel 'gray' (do you mean 'grey'?): choose one of blue, grey"),
        ({"names": "Boo"}, "unknown names 'Boo' (do you mean 'Bo'?): choose one of Ann, Bo, "),
        ({"sewn": 1}, "sewn must be true or false, not 1"),
    ):
        with pytest.raises(InputError) as error:
            Cut(**given)
        assert str(error.value) == words


def test_unknown_options_are_asked_about_wherever_a_configuration_is_built():
    for build in (Cut, lambda **given: present_names(Cut, given)):
        with pytest.raises(InputError, match=r"^unknown option 'dept': do you mean 'depth'\?$"):
            build(dept=3)
    with pytest.raises(InputError, match=r"^unknown option 'sparsityy': do you mean 'sparsity'\?$"):
        PruneConfig(sparsityy=0.5)
    with pytest.raises(InputError, match=r"^unknown option 'step': do you mean 'steps'\?$"):
        RecoverConfig(step=3)


def test_an_old_name_is_taken_and_a_line_says_the_new_one(caplog):
    with caplog.at_level(logging.WARNING, "llm_surgeon"):
        assert Cut(deep=5) == Cut(depth=5)
        assert present_names(Cut, {"deep": 5, "sewn": True}) == {"depth": 5, "sewn": True}
    assert caplog.messages == 2 * ["the option 'deep' is called 'depth' now: its old name will go"]
    with pytest.raises(InputError, match=r"^deep is the old name of depth: give one of them$"):
        Cut(deep=5, depth=5)


def test_every_option_of_the_commands_has_a_help_text_that_its_docstring_lists():
    for config in (PruneConfig, RecoverConfig):
        for each in options_of(config):
            assert len(each.help) > 4 and f"    {each.name}: {each.help}\n" in config.__doc__
    assert [each.name for each in options_of(PruneConfig) if each.panel == "Research"] == [
        "schedule", "fisher", "dense_by", "kron_rank", "max_correlated", "tolerance", "max_iterations",
        "target_damping", "residual_damping", "residual_weight", "token_weights",
    ]  # fmt: skip


def test_exchanges_are_called_swaps(caplog):
    assert PruneConfig(exchanges=2) == PruneConfig.from_mapping({"exchanges": 2}) == PruneConfig(swaps=2)
    assert caplog.messages == 2 * ["the option 'exchanges' is called 'swaps' now: its old name will go"]
