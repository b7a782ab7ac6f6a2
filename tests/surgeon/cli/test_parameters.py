"""Every command: parameters made of options, sections and examples of its help, completion, and usage errors."""

import shlex

import pytest
import typer.main

from llm_surgeon.cli import main
from llm_surgeon.cli.app import app
from llm_surgeon.cli.parameters import file_options
from llm_surgeon.cli.prune import prune
from llm_surgeon.config import methods
from llm_surgeon.config.fields import options_of
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.config.recover import RecoverConfig


def commands(group=None, path=("surgeon",)):
    """Every command by the words that call it."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


def test_the_commands():
    assert [" ".join(path[1:]) for path in COMMANDS] == [
        "prune", "sensitivity", "eval", "recover", "pack", "compact", "demo", "info", "bench generate",
    ]  # fmt: skip


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_ends_in_two_examples_that_the_command_understands(path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*path[1:], "--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    found = COMMANDS[path].epilog.split("\n\n")
    assert found[0] == "Examples:" and len(found) == 3
    assert " ".join(" ".join(lines).split()).endswith(" ".join(found))
    for example in found[1:]:
        words = shlex.split(example)
        assert tuple(words[: len(path)]) == path
        words = [word for word in words[len(path) :] if word not in (">", "machine.txt")]
        COMMANDS[path].make_context(path[-1], words)  # raises a usage error


@pytest.mark.parametrize("name, config", [("prune", PruneConfig), ("recover", RecoverConfig)])
def test_every_option_is_a_parameter(name, config):
    parameters = {each.name: each for each in COMMANDS["surgeon", name].params}
    for each in options_of(config):
        made = parameters[each.name]
        assert made.help.startswith(each.help) and made.rich_help_panel == each.panel and not made.hidden
        assert made.default is None and f"--{each.name.replace('_', '-')}" in made.opts
        for alias in each.aliases:
            assert parameters[alias].hidden


def test_research_is_the_last_section_of_the_help():
    panels = [each.rich_help_panel for each in COMMANDS["surgeon", "prune"].params if hasattr(each, "rich_help_panel")]
    assert list(dict.fromkeys(panels)) == [
        None, "Compensation and curvature", "Shots", "Smaller models (groups, width, layers)", "Calibration", "Memory",
        "Research",
    ]  # fmt: skip


def test_choices_are_completed_those_of_registered_methods_too(monkeypatch):
    records = {**methods._methods.records, "surprise": methods.Method("surprise", costs="builtins:abs")}
    monkeypatch.setattr(methods._methods, "records", records)
    context = COMMANDS["surgeon", "prune"].make_context("prune", ["model", "out"])
    parameters = {each.name: each for each in COMMANDS["surgeon", "prune"].params}

    def completed(name, beginning):
        return [item.value for item in parameters[name].shell_complete(context, beginning)]

    assert completed("method", "sur") == ["surgeon", "surprise"]
    assert completed("structure", "w") == ["width"]
    assert completed("update", "") == ["sequential", "joint", "chunked", "independent", "none"]
    assert completed("fisher", "s") == ["sampled"]


def test_a_file_holds_what_a_flag_can_but_what_the_command_itself_does():
    without = ("context", "model", "out", "config", "dry_run", "quiet")
    found = file_options(prune, without)
    assert {each.name for each in options_of(PruneConfig)} < found.keys() and not found.keys() & set(without)
    assert found["structure"] and found["calibration"] and found["gpu_memory"] and found["device"]
    assert not any(found[name] for name in ("shots", "overwrite", "damp_g", "uniform"))


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("prune model out --sparsty 0.5", "unknown option '--sparsty' (do you mean '--sparsity'?): see surgeon prune"),
        ("prune model", "Missing argument 'OUT': see surgeon prune"),
        ("prune model out --shots many", "Invalid value for '--shots': "),
        ("recover model out --stps 3", "unknown option '--stps' (do you mean '--steps'?): see surgeon recover"),
        ("prun model out", "No such command 'prun'. Did you mean 'prune'?: see surgeon"),
    ],
)
def test_bad_usage_is_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"surgeon: {sentence}") and line.endswith(" --help")


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("prune m out --method surgoen", "unknown method 'surgoen' (do you mean 'surgeon'?): choose one of surgeon, "),
        ("recover m out --method lorra", "unknown method 'lorra' (do you mean 'lora'?): choose one of lora, full"),
        ("recover m out --preset llm-prune", "unknown preset 'llm-prune' (do you mean 'llm-pruner'?)"),
        ("bench generate m --decoding grap", "unknown decoding 'grap' (do you mean 'graph'?): choose one of eager, "),
    ],
)
def test_a_choice_that_is_nearly_right_is_asked_about(words, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"surgeon: {sentence}")


def test_without_a_command_help_is_shown(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    said = capsys.readouterr()
    assert "Usage: surgeon" in said.out + said.err and "surgeon:" not in said.err
