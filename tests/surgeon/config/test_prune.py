"""Options are validated, and defaults resolved, when a configuration is built."""

import dataclasses
import math

import pytest

from llm_surgeon.config.methods import names
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.config.structure import Structure
from llm_surgeon.errors import InputError


@pytest.mark.parametrize(
    "text, expected",
    [
        ("unstructured", ("unstructured", None, 0, 0, True)),
        ("rows-columns", ("rows-columns", None, 0, 0, False)),
        ("2:4", ("2:4", 0.5, 2, 4, True)),
        ("1:2", ("1:2", 0.5, 1, 2, True)),
        ("8:32", ("8:32", 0.75, 8, 32, True)),
    ],
)
def test_structure_is_parsed(text, expected):
    found = Structure.parse(text)
    assert (found.name, found.sparsity, found.n, found.m, found.single_weights) == expected
    assert PruneConfig(structure=text).structure_record == found


@pytest.mark.parametrize("text", ["", "2-4", "2:4:8", " 2:4", "2:4\n", "-2:4", "2.0:4", "rows", "Unstructured"])
def test_unknown_structure_is_named(text):
    with pytest.raises(InputError, match="unknown structure") as error:
        PruneConfig(structure=text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("value", [124, None, 0.5, ["2:4"]])
def test_structure_that_is_no_text_is_an_input_error(value):
    with pytest.raises(InputError, match=r"unknown structure .* or N:M, such as '2:4'"):
        PruneConfig(structure=value)


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "0:0"])
def test_pattern_must_keep_some_and_remove_some(text):
    with pytest.raises(InputError, match=rf"structure '{text}' keeps .* needs 0 < N < M"):
        PruneConfig(structure=text)


@pytest.mark.parametrize(
    "text, sparsity",
    [
        ("2:4", 0.5),
        ("1:4", 0.75),
        ("3:4", 0.25),
        ("2:3", 1 / 3),
        ("unstructured", 0.5),
        ("rows-columns", 0.3),
    ],
)
def test_sparsity_left_out_is_resolved(text, sparsity):
    assert PruneConfig(structure=text).sparsity == pytest.approx(sparsity, abs=1e-12)


def test_structure_states_the_sparsity_it_implies():
    assert Structure.parse("1:4").sparsity == 0.75
    assert Structure.parse("unstructured").sparsity is None
    assert Structure.parse("rows-columns").sparsity is None


def test_sparsity_given_is_kept():
    assert PruneConfig(structure="unstructured", sparsity=0.7).sparsity == 0.7
    assert PruneConfig(structure="rows-columns", sparsity=0.2).sparsity == 0.2
    assert PruneConfig(structure="1:3", sparsity=2 / 3).sparsity == 2 / 3


@pytest.mark.parametrize("sparsity", [0.4, 0.6, 0.75])
def test_sparsity_must_agree_with_the_pattern(sparsity):
    with pytest.raises(InputError, match=rf"'2:4' removes 0\.5 .* sparsity {sparsity}"):
        PruneConfig(structure="2:4", sparsity=sparsity)


@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
@pytest.mark.parametrize("sparsity", [0, 1, 0.0, 1.0, -0.1, 1.5, math.nan, math.inf, "0.5", True, False])
def test_sparsity_must_be_a_fraction(structure, sparsity):
    with pytest.raises(InputError, match=r"sparsity must be a number in \(0, 1\)"):
        PruneConfig(structure=structure, sparsity=sparsity)


@pytest.mark.parametrize("option", ["method", "fisher", "update"])
@pytest.mark.parametrize("value", ["best", "", 1, ["joint"]])
def test_unknown_choice_is_named(option, value):
    with pytest.raises(InputError, match=rf"unknown {option} .*: choose one of ") as error:
        PruneConfig(**{option: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_method_without_rows_and_columns(method):
    with pytest.raises(InputError, match=f"method '{method}' has no definition for rows and columns"):
        PruneConfig(structure="rows-columns", method=method)


@pytest.mark.parametrize("method", names())
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_every_method_has_single_weights(method, structure):
    assert PruneConfig(structure=structure, method=method).method == method


@pytest.mark.parametrize("method", ["surgeon", "k-obd", "l-obd", "magnitude"])
def test_methods_with_rows_and_columns(method):
    assert PruneConfig(structure="rows-columns", method=method).structure_record.name == "rows-columns"


@pytest.mark.parametrize("structure", ["2:4", "1:4", "unstructured"])
def test_update_left_out_is_sequential_for_single_weights(structure):
    assert PruneConfig(structure=structure).update == "sequential"
    for options in ({"kron_rank": 2}, {"lora_rank": 4}):
        assert PruneConfig(structure=structure, **options).update == "joint"
    assert PruneConfig(structure="rows-columns").update == "joint"


@pytest.mark.parametrize("method", [method for method in names() if method != "surgeon"])
def test_other_methods_have_no_update(method):
    assert PruneConfig(structure="unstructured", method=method).update == "none"
    assert PruneConfig(structure="unstructured", method=method, update="none").update == "none"
    for update in ("joint", "chunked", "independent"):
        with pytest.raises(InputError, match=f"update '{update}' needs method 'surgeon', not '{method}'"):
            PruneConfig(structure="unstructured", method=method, update=update)


@pytest.mark.parametrize("update", ["joint", "chunked", "independent", "none"])
def test_surgeon_has_every_update_but_chunked_rows_and_columns(update):
    assert PruneConfig(update=update).update == update
    if update == "chunked":
        with pytest.raises(InputError, match="update 'chunked' has no meaning for rows-columns"):
            PruneConfig(structure="rows-columns", update=update)
    else:
        assert PruneConfig(structure="rows-columns", update=update).update == update


@pytest.mark.parametrize(
    "options, shots",
    [
        ({}, 1),
        ({"update": "joint"}, 5),
        ({"structure": "unstructured"}, 5),
        ({"structure": "unstructured", "sparsity": 0.9}, 5),
        ({"method": "k-obd"}, 5),
        ({"method": "magnitude"}, 1),
        ({"method": "wanda"}, 1),
        ({"method": "l-obd"}, 1),
        ({"method": "sparsegpt"}, 1),
        ({"structure": "rows-columns"}, 24),
        ({"structure": "rows-columns", "sparsity": 0.5}, 40),
        ({"structure": "rows-columns", "sparsity": 0.1}, 8),
        ({"structure": "rows-columns", "sparsity": 0.001}, 1),
        ({"structure": "rows-columns", "method": "magnitude"}, 1),
        ({"shots": 3}, 3),
        ({"update": "sequential"}, 1),
        ({"schedule": 2.0}, 5),
        ({"update": "sequential", "structure": "unstructured", "lora_rank": 2}, 1),
        ({"update": "sequential", "structure": "unstructured"}, 5),
        ({"method": "magnitude", "shots": 2}, 2),
        ({"method": "sparsegpt", "shots": 1}, 1),
    ],
)
def test_shots_left_out_are_resolved(options, shots):
    assert PruneConfig(**options).shots == shots


@pytest.mark.parametrize(
    "options, swaps",
    [
        ({}, 4),
        ({"structure": "unstructured"}, 4),
        ({"structure": "unstructured", "sparsity": 0.7}, 8),
        ({"structure": "1:4"}, 8),
        ({"swaps": 0}, 0),
        ({"update": "sequential"}, 4),
        ({"update": "chunked"}, 0),
        ({"kron_rank": 2}, 0),
        ({"structure": "rows-columns"}, 0),
        ({"structure": "groups"}, 0),
        ({"method": "wanda"}, 0),
    ],
)
def test_swaps_left_out_are_resolved(options, swaps):
    assert PruneConfig(**options).swaps == swaps


@pytest.mark.parametrize(
    "options, needed",
    [
        ({"swaps": 2, "method": "wanda"}, "swaps needs method 'surgeon', update 'sequential' or 'joint' and a"),
        ({"gradient_steps": 1, "structure": "groups", "reconstruct": False}, "of single weights, or reconstruct$"),
        ({"kron_rank": 2, "update": "chunked"}, "kron_rank 2 needs method 'surgeon', update 'joint' and a structure"),
    ],
)
def test_what_needs_the_joint_solver_names_the_updates_that_have_it(options, needed):
    with pytest.raises(InputError, match=needed):
        PruneConfig(**options)


def test_gradient_steps_go_towards_the_dense_model_after_a_sequential_update():
    joint = {"update": "joint"}
    assert PruneConfig(gradient_steps=1, **joint).gradient_target == "labels"
    assert PruneConfig(gradient_steps=1).gradient_target == "dense"
    assert (
        PruneConfig(gradient_steps=1, gradient_target="dense", gradient_samples=4, **joint).gradient_target == "dense"
    )
    for options in ({"gradient_target": "dense"}, {"gradient_samples": 4}):
        with pytest.raises(InputError, match=f"{next(iter(options))} means nothing without gradient_steps"):
            PruneConfig(**options, **joint)


@pytest.mark.parametrize("options", [{"gradient_samples": 2}, {"gradient_target": "labels"}])
def test_options_of_steps_that_a_model_has_not_are_refused_with_the_reason(options):
    assert PruneConfig(**options).settled(1000).gradient_steps == 4
    for config, weights in ((PruneConfig(**options, samples=7), 1000), (PruneConfig(**options), 2_000_000_001)):
        with pytest.raises(
            InputError, match=f"^{next(iter(options))} means nothing without gradient_steps, which are 0"
        ):
            config.settled(weights)
    offloaded = PruneConfig(**options).settled(1000).offloaded()
    assert (offloaded.offload, offloaded.gradient_steps, offloaded.gradient_target) == ("cpu", 0, "dense")


def test_a_config_of_another_class_is_refused():
    with pytest.raises(InputError, match=r"^config must be a PruneConfig, not "):
        PruneConfig.given({"structure": "2:4"}, {})


@pytest.mark.parametrize(
    "options, steps",
    [
        ({}, 4),
        ({"structure": "unstructured"}, 4),
        ({"structure": "groups"}, 4),
        ({"gradient_steps": 1}, 1),
        ({"gradient_steps": 0}, 0),
        ({"samples": 7}, 0),
        ({"update": "joint"}, 0),
        ({"structure": "groups", "reconstruct": False}, 0),
        ({"structure": "rows-columns"}, 0),
        ({"structure": "layers"}, 0),
        ({"method": "sparsegpt", "update": "sequential"}, 0),
        ({"method": "wanda"}, 0),
        ({"offload": "cpu"}, 0),
        ({"lora_rank": 2}, 0),
        ({"kron_rank": 2, "swaps": 0}, 0),
    ],
)
def test_gradient_steps_depend_on_what_they_go_towards_and_on_the_models_size(options, steps):
    config = PruneConfig(**options)
    assert config.settled(2_000_000_000).gradient_steps == steps
    assert config.settled(2_000_000_001).gradient_steps == options.get("gradient_steps", 0)
    assert dataclasses.replace(config.settled(1), gradient_steps=config.gradient_steps) == config


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"offload": "cpu"}, "need the gradients of all weights on one device: leave offload out"),
        ({"kron_rank": 2, "swaps": 0}, "need a curvature with an inverse, one Kronecker product: leave kron_rank out"),
        ({"lora_rank": 2, "shots": 1}, "move the weights that low-rank corrections train: leave lora_rank out"),
    ],
)
def test_what_gradient_steps_do_not_go_with_is_told_with_its_reason(options, reason):
    with pytest.raises(InputError, match=f"^gradient_steps {reason}$"):
        PruneConfig(gradient_steps=1, **options)
    assert PruneConfig(gradient_steps=1, checkpoint_activations=True).checkpoint_activations


@pytest.mark.parametrize(
    "options", [{"update": "chunked"}, {"structure": "rows-columns"}, {"lora_rank": 4}, {"shots": 1}]
)
def test_later_joint_updates_of_single_weights_go_back_to_the_dense_ones(options):
    joint = {"update": "joint"}
    assert PruneConfig(**joint).around_dense_weights and not PruneConfig(**joint | options).around_dense_weights


def test_the_sequential_update_has_options_of_its_own():
    config = PruneConfig(update="sequential")
    assert (config.target_damping, config.residual_damping) == (0.3, 0.1)
    assert (config.residual_weight, config.token_weights) == (1.0, None)
    assert PruneConfig(structure="groups").target_damping == 0.1
    config = PruneConfig(update="sequential", target_damping=0.5, residual_weight=0.0, token_weights=False)
    assert (config.target_damping, config.residual_weight, config.token_weights) == (0.5, 0.0, False)
    assert not config.around_dense_weights


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shots": 2, "lora_rank": 4}, r"begins at the dense weights: with lora_rank it takes one shot"),
        ({"structure": "rows-columns"}, r"has no meaning for rows-columns"),
        ({"structure": "groups"}, r"has no meaning for groups"),
        ({"method": "wanda"}, r"needs method 'surgeon' or 'sparsegpt'.*, not 'wanda'"),
        ({"kron_rank": 2, "swaps": 0}, r"update 'sequential' does not go with kron_rank 2"),
        ({"method": "sparsegpt", "gradient_steps": 1}, r"gradient_steps needs method 'surgeon'"),
        ({"target_damping": 0.0}, r"target_damping must be a number .* 0.0"),
        ({"residual_weight": -1.0}, r"residual_weight must be a number of at least 0"),
        ({"token_weights": 1}, r"token_weights must be true or false"),
    ],
)
def test_what_the_sequential_update_does_not_go_with(options, message):
    with pytest.raises(InputError, match=message):
        PruneConfig(**{"update": "sequential", **options})


def test_a_method_without_gradients_cannot_weigh_tokens_by_them():
    given = {"method": "sparsegpt", "update": "sequential"}
    assert PruneConfig(**given).token_weights is False
    with pytest.raises(InputError, match=r"^method 'sparsegpt' knows no gradients: leave token_weights out$"):
        PruneConfig(**given, token_weights=True)


@pytest.mark.parametrize("options", [{"target_damping": 0.2}, {"residual_weight": 0.5}, {"token_weights": True}])
def test_other_updates_have_no_targets(options):
    with pytest.raises(InputError, match="means nothing without update 'sequential' or reconstruct"):
        PruneConfig(update="joint", **options)


def test_sparsegpt_has_one_shot():
    with pytest.raises(InputError, match=r"'sparsegpt' .* shots must be 1, not 2"):
        PruneConfig(method="sparsegpt", shots=2)


@pytest.mark.parametrize("structure, damp_g", [("2:4", 0.1), ("unstructured", 0.1), ("rows-columns", 0.01)])
def test_damping_left_out_is_resolved(structure, damp_g):
    config = PruneConfig(structure=structure)
    assert (config.damp_g, config.damp_a) == (damp_g, 0.01)
    assert PruneConfig(structure=structure, damp_g=0.3).damp_g == 0.3


@pytest.mark.parametrize("option", ["max_correlated", "max_iterations", "samples", "shots", "seqlen", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True, math.nan])
def test_counts_are_whole_numbers_from_one(option, value):
    with pytest.raises(InputError, match=rf"^{option} must be a whole number of at least 1, not "):
        PruneConfig(**{option: value})
    assert getattr(PruneConfig(**{option: 1}), option) == 1


@pytest.mark.parametrize("option", ["max_correlated", "max_iterations", "samples"])
def test_counts_with_a_default_cannot_be_none(option):
    with pytest.raises(InputError, match=rf"^{option} must be a whole number"):
        PruneConfig(**{option: None})


def test_window_and_batch_may_be_left_out():
    config = PruneConfig()
    assert config.seqlen is None and config.batch_size is None


@pytest.mark.parametrize("option", ["damp_g", "damp_a", "tolerance"])
@pytest.mark.parametrize("value", [0, -0.1, math.inf, math.nan, "0.1", True])
def test_positive_numbers(option, value):
    with pytest.raises(InputError, match=rf"^{option} must be a number greater than 0, not "):
        PruneConfig(**{option: value})
    assert getattr(PruneConfig(**{option: 2}), option) == 2


@pytest.mark.parametrize("value", [-0.01, -2, 1, 1.0, 3, math.nan, "0", True, False, None])
def test_min_kept_is_a_fraction(value):
    with pytest.raises(InputError, match=r"^min_kept must be a number in \[0, 1\), not "):
        PruneConfig(min_kept=value)


@pytest.mark.parametrize("value", [0, 0.0, 0.5])
def test_min_kept_may_be_zero(value):
    assert PruneConfig(min_kept=value).min_kept == value


@pytest.mark.parametrize("structure", ["unstructured", "rows-columns"])
def test_min_kept_must_leave_room_for_the_sparsity(structure):
    with pytest.raises(InputError, match=r"sparsity 0\.6 cannot be met while min_kept keeps 0\.5"):
        PruneConfig(structure=structure, sparsity=0.6, min_kept=0.5)


@pytest.mark.parametrize("min_kept, sparsity", [(0.02, 0.98), (0.9, 0.1), (0.3, 0.7), (0.0, 0.999)])
def test_min_kept_and_sparsity_may_add_up_to_one(min_kept, sparsity):
    # In floating point 1 - 0.9 < 0.1.
    assert PruneConfig(structure="unstructured", sparsity=sparsity, min_kept=min_kept).min_kept == min_kept


def test_min_kept_does_not_stand_against_a_pattern():
    assert PruneConfig(structure="1:4", min_kept=0.5).sparsity == 0.75


@pytest.mark.parametrize("value", [-1, 0.0, "0", None, True])
def test_seed_is_a_whole_number_from_zero(value):
    with pytest.raises(InputError, match=r"^seed must be a whole number of at least 0, not "):
        PruneConfig(seed=value)


def test_seed_may_be_zero_or_more():
    assert PruneConfig(seed=0).seed == 0
    largest = 2**63 - 1 - 10_000  # later shots draw with the numbers after it
    assert PruneConfig(seed=largest).seed == largest
    with pytest.raises(InputError, match=rf"^seed must be at most {largest}, not {largest + 1}$"):
        PruneConfig(seed=largest + 1)


def test_from_mapping_builds_the_same_value():
    options = {"structure": "unstructured", "sparsity": 0.25, "method": "magnitude", "seed": 3}
    assert PruneConfig.from_mapping(options) == PruneConfig(**options)
    assert PruneConfig.from_mapping({}) == PruneConfig()


def test_from_mapping_names_the_unknown_option():
    with pytest.raises(InputError, match=r"unknown option 'sparsityy': do you mean 'sparsity'\?"):
        PruneConfig.from_mapping({"sparsityy": 0.5, "structure": "2:4"})
    with pytest.raises(InputError, match=r"unknown option 'colour': choose among .*\bsparsity\b"):
        PruneConfig.from_mapping({"colour": 0.5})
    for name in (None, 3):
        with pytest.raises(InputError, match=f"unknown option '{name}'"):
            PruneConfig.from_mapping({name: 0.5})


@pytest.mark.parametrize(
    "option, value, meant",
    [
        ("method", "surgoen", "surgeon"),
        ("structure", "group", "groups"),
        ("structure", "unstructred", "unstructured"),
        ("update", "join", "joint"),
        ("offload", "CPU ", None),
    ],
)
def test_a_choice_that_is_nearly_right_is_asked_about(option, value, meant):
    with pytest.raises(InputError) as error:
        PruneConfig(**{option: value})
    assert (f"unknown {option} {value!r} (do you mean {meant!r}?)" in str(error.value)) == (meant is not None)


COUNTS = {field.name for field in dataclasses.fields(PruneConfig) if str(field.type) in ("int", "int | None")} - {
    "seed"
}


def test_the_counts_are_those_that_the_limits_are_tested_for():
    assert len(COUNTS) == 14 and {"samples", "shots", "lora_rank", "max_iterations", "round_to"} <= COUNTS


@pytest.mark.parametrize("option", sorted(COUNTS))
@pytest.mark.parametrize("value", [2**31, 2**70, 10**5000], ids=["2**31", "2**70", "10**5000"])
def test_counts_have_a_limit(option, value):
    context = {"round_to": {"structure": "groups"}}.get(option, {})
    with pytest.raises(InputError, match=rf"^{option} must be at most \d+, not (\d+|a number of thousands of digits)$"):
        PruneConfig(**{option: value}, **context)


@pytest.mark.parametrize("option", sorted(COUNTS))
@pytest.mark.parametrize("value", [True, False, 1.0, "1", math.nan])
def test_counts_are_integers_and_no_truth_values(option, value):
    with pytest.raises(InputError, match=rf"^{option} must be a whole number of at least"):
        PruneConfig(**{option: value})


@pytest.mark.parametrize("option", ["damp_g", "damp_a", "tolerance", "schedule", "lora_learning_rate"])
def test_integers_that_no_float_holds_are_refused(option):
    with pytest.raises(InputError, match=rf"^{option} must be at most"):
        PruneConfig(**{option: 10**400})


def test_what_an_error_shows_of_a_value_is_short():
    with pytest.raises(InputError, match=r"^seed must be a whole number of at least 0, not 'x{90,}…$"):
        PruneConfig(seed="x" * 10**6)
    with pytest.raises(InputError, match=r"^unknown method 'x{90,}…: choose one of"):
        PruneConfig(method="x" * 10**6)


@pytest.mark.parametrize("value", ["0-999999999", "0-99999999999999", "100000"])
def test_skipped_blocks_are_block_numbers(value):
    with pytest.raises(InputError, match=r"skip_layers (holds|must be block numbers)"):
        PruneConfig(structure="groups", skip_layers=value)


@pytest.mark.parametrize(
    "option, value, structures",
    [
        ("skip_layers", "0", "groups or layers"),
        ("round_to", 8, "groups or width"),
        ("uniform", True, "groups"),
    ],
)
def test_options_of_smaller_models_name_the_structures_that_take_them(option, value, structures):
    with pytest.raises(InputError, match=f"{option} has no meaning for structure '2:4': choose {structures}$"):
        PruneConfig(**{option: value})


def test_options_of_single_weights_name_patterns_too():
    for structure, option, value, choices in (
        ("layers", "gradient_steps", 1, "unstructured or N:M or groups"),
        ("width", "lora_rank", 2, "unstructured or N:M or rows-columns or groups"),
        ("groups", "offload", "cpu", "unstructured or N:M or rows-columns"),
    ):
        with pytest.raises(
            InputError, match=f"^{option} has no meaning for structure '{structure}': choose {choices}$"
        ):
            PruneConfig(structure=structure, **{option: value})
        assert getattr(PruneConfig(structure="3:7", **{option: value}), option) == value


@pytest.mark.parametrize(
    "option, value, method, others",
    [
        ("fisher", "empirical", "wanda", "surgeon or k-obd"),
        ("checkpoint_activations", True, "sparsegpt", "surgeon or k-obd"),
        ("curvature_layers", 2, "magnitude", "surgeon or wanda or l-obd or k-obd"),
        ("offload", "cpu", "sparsegpt", "surgeon or wanda or l-obd or k-obd"),
    ],
)
def test_options_without_effect_for_a_method_name_those_that_take_them(option, value, method, others):
    assert getattr(PruneConfig(method="k-obd", **{option: value}), option) == value
    with pytest.raises(InputError, match=f"^{option} has no meaning for method '{method}': choose {others}$"):
        PruneConfig(method=method, **{option: value})


def test_options_without_effect_are_refused():
    with pytest.raises(InputError, match=r"^allocation has no meaning for structure '2:4': choose groups$"):
        PruneConfig(allocation="local")
    with pytest.raises(InputError, match=r"^schedule has no meaning for one shot: choose more shots$"):
        PruneConfig(method="wanda", schedule=2.0)
    assert PruneConfig(method="wanda", shots=2, schedule=2.0).schedule == 2.0


@pytest.mark.parametrize("value", ["0GB", 0, -1, True, "9" * 400, "1e400", 2**64])
def test_memory_is_an_amount(value):
    with pytest.raises(InputError, match=r"gpu_memory must be|is no amount of memory"):
        PruneConfig(gpu_memory=value)


def test_from_mapping_validates():
    with pytest.raises(InputError, match="unknown method"):
        PruneConfig.from_mapping({"method": "best"})


def test_a_resolved_configuration_survives_the_round_trip():
    config = PruneConfig(structure="rows-columns", sparsity=0.4)
    assert PruneConfig.from_mapping(dataclasses.asdict(config)) == config


def test_the_options_of_a_report_from_before_can_be_given_again():
    written = dataclasses.asdict(PruneConfig(swaps=2))
    written["exchanges"] = written.pop("swaps")
    assert PruneConfig.from_mapping(written) == PruneConfig(swaps=2)


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PruneConfig().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_checkpoint_activations_is_true_or_false(value):
    with pytest.raises(InputError, match="checkpoint_activations must be true or false"):
        PruneConfig(checkpoint_activations=value)


def test_corrections_have_a_number_of_steps_that_ends():
    assert PruneConfig(lora_rank=1, lora_steps=10_000).lora_steps == 10_000
    with pytest.raises(InputError, match=r"^lora_steps must be at most 10000, not 10001$"):
        PruneConfig(lora_rank=1, lora_steps=10_001)


@pytest.mark.parametrize("option, value", [("lora_steps", 8), ("lora_learning_rate", 1e-3)])
def test_options_of_corrections_need_a_rank(option, value):
    assert getattr(PruneConfig(lora_rank=1, **{option: value}), option) == value
    with pytest.raises(InputError, match=rf"^{option} means nothing without lora_rank$"):
        PruneConfig(**{option: value})
