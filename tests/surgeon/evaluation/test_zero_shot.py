"""Zero-shot scores through lm-eval, on a task of our own: no network."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from llm_surgeon.cli import main
from llm_surgeon.errors import InputError
from llm_surgeon.evaluation.zero_shot import TASK_PRESETS, TaskScore, _score, parse_tasks, zero_shot
from tests.surgeon.checkpoints import save_folder, tokenizer_of_words
from tests.surgeon.tiny_models import build

pytest.importorskip("lm_eval")

TASK = """
task: which_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""
CHOICES = ("w3", "w40", "w17")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A task whose right answer is the model's own for three questions of four."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer, model = tokenizer_of_words(), build("llama")
    rows = []
    for index in range(4):
        question = f"w{5 + index} w{9 + 2 * index}"
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(question)["input_ids"]])).logits[0, -1]
        best = max(range(3), key=lambda i: logits[tokenizer(CHOICES[i])["input_ids"][-1]])
        rows.append({"question": question, "choices": CHOICES, "label": best if index else (best + 1) % 3})
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "which_word.yaml").write_text(TASK.format(data=tmp_path / "rows.json"))
    return tasks


def test_the_score_counts_the_answers_the_model_prefers(folder):
    model = build("llama").train()
    (score,) = zero_shot(model, tokenizer_of_words(), ["which_word"], task_folder=folder)
    assert (score.task, score.metric, score.value) == ("which_word", "acc", 0.75)
    assert score.stderr == pytest.approx(0.25)  # sqrt(p (1 - p) / (n - 1))
    assert model.training
    (first,) = zero_shot(model, tokenizer_of_words(), ["which_word"], limit=1, task_folder=folder)
    assert first.value == 0.0


def test_the_command_prints_every_score_and_their_mean(folder, tmp_path, monkeypatch, capsys):
    asked = []

    def our_tasks(model, tokenizer, tasks, **options):
        asked.append(tasks)
        (score,) = zero_shot(model, tokenizer, ["which_word"], **options, task_folder=folder)
        return [replace(score, task=task) for task in tasks]

    monkeypatch.setattr("llm_surgeon.evaluation.zero_shot.zero_shot", our_tasks)
    source = save_folder(tmp_path / "model", build("llama"))
    with pytest.raises(SystemExit) as exit:
        main(["eval", str(source), "--tasks", "which_word,llm-pruner", "--device", "cpu", "--quiet"])
    assert not exit.value.code and asked == [["which_word", *TASK_PRESETS["llm-pruner"]]]
    lines = capsys.readouterr().out.splitlines()
    for name in (*asked[0], "mean"):
        (line,) = (line for line in lines if f" {name} " in line)
        assert "75.00" in line


@pytest.mark.parametrize(
    "option", [("--data", "x.txt"), ("--data", "wikitext2"), ("--text-field", "t"), ("--seqlen", 8)]
)
def test_options_of_perplexity_do_not_go_with_tasks(option, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["eval", "no/model", "--tasks", "which_word", *map(str, option)])
    assert exit.value.code == 2
    assert (
        capsys.readouterr().err == f"surgeon: {option[0]} means nothing with --tasks, which bring their own examples\n"
    )


def test_an_unknown_task_is_named(folder):
    with pytest.raises(InputError, match="lm-eval has no task 'which_wort'"):
        zero_shot(build("llama"), tokenizer_of_words(), ["which_word", "which_wort"], task_folder=folder)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"surgeon-kernels\[eval\]"):
        zero_shot(build("llama"), tokenizer_of_words(), ["boolq"])


def test_presets_and_lists():
    assert parse_tasks("llm-pruner, mmlu") == [*TASK_PRESETS["llm-pruner"], "mmlu"]
    with pytest.raises(InputError, match="no tasks"):
        parse_tasks(" , ")


def test_normalised_accuracy_comes_first():
    results = {
        "alias": "t",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "acc_norm,none": 0.6,
        "acc_norm_stderr,none": "N/A",
    }
    assert _score("t", results) == TaskScore("t", "acc_norm", 0.6, None)
    assert _score("t", {"alias": "t", "exact_match,strict": 0.25}) == TaskScore("t", "exact_match", 0.25, None)
