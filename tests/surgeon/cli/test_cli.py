"""The surgeon command as a user types it: files written, exit codes, and a clear sentence for every bad input."""

import hashlib
import json
import os
import re
import shutil
from importlib.resources import files
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_surgeon import InputError, PruneConfig, prune_checkpoint
from llm_surgeon.cli import main
from llm_surgeon.cli.views import _verdict
from llm_surgeon.report.schema import PruneReport

ASSETS = Path(str(files("llm_surgeon.demo"))) / "assets"
MODEL = ASSETS / "model"
TEXT = ASSETS / "wikitext2-test-slice.txt"
SMALL = ["--calibration", str(TEXT), "--samples", "4", "--seqlen", "32", "--quiet"]


def surgeon(*arguments):
    """Exit code of the command."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code or 0


@pytest.fixture
def sentence(capsys):
    """The one line a failed command printed to stderr, beside those that name its phases."""

    def read():
        phases = ("surgeon: loading", "surgeon: packing", "surgeon: compacting", "surgeon: perplexity")
        lines = [line for line in capsys.readouterr().err.strip().splitlines() if line not in phases]
        assert len(lines) == 1, lines
        return lines[0]

    return read


def linear_weights(folder):
    weights = load_file(folder / "model.safetensors")
    return {name: w for name, w in weights.items() if name.endswith("_proj.weight")}


def test_prune_writes_a_model_that_loads_in_plain_transformers(tmp_path):
    out = tmp_path / "out"
    assert surgeon("prune", MODEL, out, *SMALL, "--shots", 2, "--max-iterations", 5) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 == AutoModelForCausalLM.from_pretrained(MODEL).dtype
    assert AutoTokenizer.from_pretrained(out)("surgery")["input_ids"]
    weights = linear_weights(out)
    assert len(weights) == 42
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert bool(((weight == 0).view(-1, 4).sum(dim=1) == 2).all()), name
    untouched = load_file(MODEL / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(load_file(out / "model.safetensors")["model.embed_tokens.weight"], untouched)
    report = PruneReport.from_json((out / "surgeon_report.json").read_text())
    assert report.config["shots"] == 2 and report.config["structure"] == "2:4"
    assert report.sparsity == 0.5
    assert len(report.shots) == 2 and report.shots[1].measured_increase is not None
    assert "<svg" in (out / "report.html").read_text()
    card = (out / "README.md").read_text()
    assert report.command[:4] == ["surgeon", "prune", str(MODEL), str(out)] and report.command[-2:] == [
        "--max-iterations",
        "5",
    ]
    assert f"\nsurgeon prune model out --calibration {TEXT.name} --samples 4" in card and str(tmp_path) not in card
    assert report.held_out.windows == 16 and f"**Perplexity on held-out text: {report.held_out.describe()}.**" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_config_file_gives_options_and_flags_win(tmp_path):
    options = {"structure": "unstructured", "sparsity": 0.3, "method": "wanda", "seed": 7, "calibration": str(TEXT)}
    config = tmp_path / "prune.yaml"
    config.write_text(yaml.safe_dump(options))
    flags = ["--config", config, "--sparsity", "0.25", "--samples", "2", "--seqlen", "16", "--quiet"]
    assert surgeon("prune", MODEL, tmp_path / "out", *flags) == 0
    resolved = json.loads((tmp_path / "out" / "surgeon_report.json").read_text())["config"]
    assert (resolved["structure"], resolved["sparsity"], resolved["method"]) == ("unstructured", 0.25, "wanda")
    assert (resolved["seed"], resolved["samples"], resolved["seqlen"]) == (7, 2, 16)


def test_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path, capsys):
    assert surgeon("prune", MODEL, tmp_path / "out", *SMALL[:-1], "--dry-run") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "would remove 1,179,648 of 2,359,296 weights" in text
    assert "memory" in text and "disk" in text and "nothing was written" in text
    assert list(tmp_path.iterdir()) == []


def test_options_for_a_gpu_alone_say_that_they_have_no_effect(tmp_path, capsys):
    options = [*SMALL, "--device", "cpu", "--offload", "cpu", "--gpu-memory", "24GB", "--shots", 1]
    assert surgeon("prune", MODEL, tmp_path / "out", *options, "--dry-run") == 0
    words = "has no effect: this runs on cpu, no GPU"
    assert capsys.readouterr().err.splitlines() == [f"surgeon: --offload {words}", f"surgeon: --gpu-memory {words}"]
    assert surgeon("prune", MODEL, tmp_path / "out", *SMALL, "--offload", "none", "--dry-run") == 0
    assert not capsys.readouterr().err


def test_eval_prints_the_perplexity(tmp_path, capsys):
    assert surgeon("eval", MODEL, "--data", TEXT, "--seqlen", 256, "--quiet") == 0
    # The model card's 22.86 is for windows without the beginning-of-text token in front.
    assert float(capsys.readouterr().out) == pytest.approx(22.795, abs=0.005)


def test_eval_of_a_few_windows_says_how_many(tmp_path, capsys):
    texts = TEXT.read_text()
    assert surgeon("eval", MODEL, "--data", TEXT, "--seqlen", 64, "--limit", 3) == 0
    value = capsys.readouterr().out.strip()
    assert value.startswith("perplexity ") and value.endswith(" over 3 windows")
    short = tmp_path / "short.txt"
    short.write_text(texts[:800])
    assert surgeon("eval", MODEL, "--data", short, "--seqlen", 64, "--limit", 1, "--quiet") == 0
    assert surgeon("eval", MODEL, "--data", TEXT, "--seqlen", 64, "--limit", 1, "--quiet") == 0
    first, again = capsys.readouterr().out.split()
    assert first == again  # the first window of both texts is the same


def test_conversations_are_read_and_what_was_read_is_recorded(tmp_path, capsys):
    turns = [{"from": "human", "value": "Who wrote it?"}, {"from": "gpt", "value": TEXT.read_text()[:2000]}]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps({"id": f"id-{i}", "conversations": turns}) + "\n" for i in range(2)))
    options = ["--calibration", chat, "--samples", 4, "--seqlen", 32, "--quiet", "--method", "magnitude"]
    assert surgeon("prune", MODEL, tmp_path / "out", *options) == 0
    said = capsys.readouterr().err.splitlines()
    how = "conversations as 'User: …' paragraphs, for the tokenizer has no chat template"
    assert said == [f"surgeon: {str(chat)!r} is read by its field 'conversations', {how}"]
    report = PruneReport.read(tmp_path / "out" / "surgeon_report.json")
    record = report.data["calibration"]
    assert (record.source, record.field, record.rendering) == (str(chat), "conversations", "plain")
    text = "\n\n".join(2 * [f"User: Who wrote it?\n\nAssistant: {turns[1]['value']}"])
    assert record.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert (record.windows, record.distinct_windows, record.seqlen, record.split) == (4, 4, 32, "calibration")
    assert report.revision is None and not any("distinct windows" in warning for warning in report.warnings)


def test_too_little_text_is_said_and_recorded(tmp_path, capsys):
    short = tmp_path / "short.csv"
    short.write_text('n,body\n1,"' + TEXT.read_text()[:300].replace('"', "") + '"\n2,end\n')
    options = ["--calibration", short, "--samples", 9, "--seqlen", 32, "--quiet", "--method", "magnitude"]
    assert surgeon("prune", MODEL, tmp_path / "out", *options, "--text-field", "body") == 0
    said = capsys.readouterr().err.splitlines()
    report = PruneReport.read(tmp_path / "out" / "surgeon_report.json")
    record = report.data["calibration"]
    assert record.field == "body" and 32 < record.tokens < 9 * 32
    sentence = (
        f"9 windows of 32 tokens are drawn from the {record.tokens} tokens of {str(short)!r}: "
        f"{record.distinct_windows} distinct windows, pass more text"
    )
    assert said[-1] == f"surgeon: {sentence}" and sentence in report.warnings
    config = tmp_path / "prune.yaml"
    config.write_text("text_field: nothing\nsamples: 2\nseqlen: 16")
    assert surgeon("prune", MODEL, tmp_path / "o", "--calibration", short, "--config", config) == 2
    assert "has no field 'nothing' (found body, n)" in capsys.readouterr().err


def test_samples_that_no_memory_holds_are_refused_before_they_are_drawn(tmp_path, sentence):
    for samples in (2_000_000_000, 2**31 - 1):
        options = ["--calibration", TEXT, "--samples", samples, "--seqlen", 512, "--method", "magnitude"]
        assert surgeon("prune", MODEL, tmp_path / "out", *options) == 2
        assert f"memory are needed on cpu for {samples} windows of 512 tokens" in sentence()


def test_a_model_that_does_not_exist_is_refused_before_the_text_is_asked_for(tmp_path, sentence, monkeypatch):
    def asked(*_, **__):
        raise AssertionError("the text was asked for")

    monkeypatch.setattr("llm_surgeon.data.documents.read_known", asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in (
        ["prune", "no/such-model", tmp_path / "b"],
        ["eval", "no such model"],
        ["recover", "no", tmp_path / "b"],
    ):
        assert surgeon(*command) == 2
        assert "no model folder 'no" in sentence()


def test_eval_refuses_windows_and_batches_of_no_size(capsys):
    for options in (("--seqlen", 1), ("--seqlen", -5), ("--batch-size", 0), ("--limit", 0)):
        assert surgeon("eval", MODEL, "--data", TEXT, *options) == 2
        assert f"Invalid value for '{options[0]}'" in capsys.readouterr().err


def test_an_interruption_leaves_what_is_done_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_surgeon.checkpoint.save.move_into_place", interrupted)
    assert surgeon("prune", MODEL, tmp_path / "out", *SMALL, "--method", "magnitude") == 130
    kept = tmp_path / ".out.pruning"
    told = f"surgeon: what is done is kept in {str(kept)!r}: the same command with --resume goes on"
    assert capsys.readouterr().err.splitlines()[-2:] == [told, "surgeon: interrupted"]
    assert list(tmp_path.iterdir()) == [kept]


def test_running_out_of_gpu_memory_is_one_sentence(tmp_path, sentence, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("llm_surgeon.jobs.prune.prune", exhausted)
    assert surgeon("prune", MODEL, tmp_path / "out", *SMALL) == 1
    assert "out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB. A smaller --batch-size" in sentence()
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_every_phase_is_a_line_and_quiet_prints_none(tmp_path, capsys):
    options = [*SMALL[:-1], "--method", "k-obd", "--structure", "unstructured", "--shots", 2]
    assert surgeon("prune", MODEL, tmp_path / "out", *options) == 0
    lines = capsys.readouterr().err.splitlines()
    lines = [re.sub(r", about \S+ left in all$", "", line) for line in lines]
    assert lines[:2] == ["surgeon: loading", "surgeon: held-out loss"] and lines[-1] == "surgeon: held-out loss"
    phases = lines[2:-1]
    assert len(set(phases)) == len(phases)
    assert [line.split(":")[1] for line in phases] == sorted(line.split(":")[1] for line in phases)
    assert {line.split(":")[1] for line in phases} == {" shot 1 of 2", " shot 2 of 2"}
    assert surgeon("eval", MODEL, "--data", TEXT, "--seqlen", 256, "--quiet") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["[/x]", "[bold]y[/bold]", ":smile:", "new\nline", "\x1b[31mred"])
def test_names_are_not_markup_and_stay_in_their_line(tmp_path, capsys, name, sentence):
    model, out = tmp_path / f"model {name}".replace("/", "_"), tmp_path / f"out {name}".replace("/", "_")
    shutil.copytree(MODEL, model)
    shown = repr(str(out))[1:-1]
    assert surgeon("prune", model, out, *SMALL[:-1], "--method", "magnitude", "--dry-run") == 0
    assert f"nothing was written to {shown}" in capsys.readouterr().out
    assert surgeon("prune", model, out, *SMALL[:-1], "--method", "magnitude") == 0
    text = capsys.readouterr().out
    assert f"written to {shown}: the model" in text and "\x1b" not in text
    assert f"surgeon pack {shown} {shown}-packed" in text
    for arguments in (("eval", name), ("prune", name, tmp_path / "x", *SMALL), ("recover", name, tmp_path / "x")):
        assert surgeon(*arguments) == 2
        assert "\x1b" not in sentence()


def test_what_may_not_be_read_and_what_is_not_utf8_is_one_sentence(tmp_path, sentence, monkeypatch):
    assert surgeon("prune", "mod\udcffel", tmp_path / "out", *SMALL) == 2
    assert sentence() == "surgeon: the argument 'mod\\udcffel' is not UTF-8: rename the file"

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", "/secret/model")

    monkeypatch.setattr("llm_surgeon.jobs.prune.require_model", refused)
    assert surgeon("prune", MODEL, tmp_path / "out", *SMALL) == 2
    assert sentence() == "surgeon: '/secret/model' cannot be read or written: Permission denied"


def test_info_and_summary_are_readable(tmp_path, capsys):
    assert surgeon("info") == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "nvcc" in text
    table, verdict = text.strip().rsplit("\n", 1)
    names = [row.split("│")[1].strip() for row in table.splitlines() if row.startswith("│")]
    names = [name for name in names if name]  # a cell that is broken into lines has its name in the first
    assert len(set(names)) == len(names) >= 9
    assert verdict.startswith("everything works here")
    assert surgeon("prune", MODEL, tmp_path / "out", *SMALL[:-1], "--method", "magnitude") == 0
    assert "50" in capsys.readouterr().out


@pytest.mark.parametrize(
    "accelerators, missing, words",
    [
        (
            [],
            ["triton", "extension"],
            "on the CPU: for models of billions of weights take a machine with an NVIDIA GPU",
        ),
        ([{}], [], "everything works here, with all kernels"),
        ([{}], ["extension"], "slower than it could: without CUDA kernels PyTorch's operations run"),
        ([{}], ["triton", "extension"], "without Triton kernels and CUDA kernels PyTorch's"),
    ],
)
def test_the_verdict_of_info(accelerators, missing, words):
    parts = {name: {"available": name not in missing} for name in ("cuda", "triton", "extension", "nvcc")}
    assert words in _verdict({"accelerators": accelerators, "parts": parts})


@pytest.mark.parametrize(
    "options, words",
    [
        (["--structure", "2-4"], "unknown structure '2-4'"),
        (["--structure", "2:5"], "widths divisible by 5"),
        (["--structure", "unstructured", "--sparsity", "1.2"], "sparsity must be a number in (0, 1)"),
        (["--structure", "2:4", "--sparsity", "0.6"], "removes 0.5"),
        (["--method", "obs"], "unknown method 'obs'"),
        (["--method", "wanda", "--update", "joint"], "update 'joint' needs method 'surgeon'"),
        (["--method", "wanda", "--structure", "rows-columns"], "no definition for rows and columns"),
        (["--seqlen", "100000"], "longer than the 512 positions"),
        (["--samples", "0"], "samples must be a whole number"),
        (["--calibration", "nowhere.txt"], "nowhere.txt"),
        (["--calibration", "wikitext2"], "pass a .txt, .jsonl, .json, .csv, .parquet, .gz or .zip file instead"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--config", "nowhere.yaml"], "config file 'nowhere.yaml' cannot be read"),
    ],
)
def test_bad_options_exit_with_2_and_one_sentence(tmp_path, sentence, options, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert surgeon("prune", MODEL, tmp_path / "out", *SMALL, *options) == 2
    assert words in sentence()
    assert list(tmp_path.iterdir()) == []


def test_unknown_flags_and_missing_arguments_are_usage_errors(capsys):
    assert surgeon("prune", MODEL) == 2
    assert surgeon("prune", MODEL, "out", "--sparse") == 2
    assert surgeon("operate") == 2


@pytest.mark.parametrize(
    "content, words",
    [
        ("sparsity: [", "line 1: an option is one value"),
        ("- 1", "must hold option: value"),
        ("sparsty: 0.5", "unknown option 'sparsty': do you mean 'sparsity'?"),
        ("dry-run: true", "unknown option 'dry_run': choose among allocation"),
        ("overwrite: 'no'", "overwrite must be true or false, not 'no'"),
        ("overwrite: 1", "overwrite must be true or false, not 1"),
        ("trust_remote_code: 'no'", "trust_remote_code must be true or false, not 'no'"),
        ("{structure: groups, skip_layers: a}", "skip_layers must be block numbers such as '0-3,30,31', not 'a'"),
        ("lora_rank: false", "lora_rank must be a whole number"),
        ("device: [cpu]", "line 1: an option is one value, not a list or a mapping"),
        ("seed: 2020-99-99", "seed must be a whole number of at least 0, not '2020-99-99'"),
        ("shot: 1", "unknown option 'shot': do you mean 'shots'?"),
        ("structure: group", "unknown structure 'group' (do you mean 'groups'?)"),
        ("shots: " + "9" * 5000, "shots must be a whole number of at least 1, not '999"),
        (f"seed: {2**63}", "seed must be at most 9223372036854765807, not 9223372036854775808"),
    ],
)
def test_bad_config_files(tmp_path, sentence, content, words):
    config = tmp_path / "prune.yaml"
    config.write_text(content)
    assert surgeon("prune", MODEL, tmp_path / "out", *SMALL, "--config", config) == 2
    assert words in sentence()


def test_the_calibration_in_a_config_file_is_text(tmp_path, sentence):
    config = tmp_path / "prune.yaml"
    config.write_text("calibration:")
    assert surgeon("prune", MODEL, tmp_path / "out", "--config", config) == 2
    assert "calibration must be text, not nothing" in sentence()


@pytest.mark.parametrize(
    "options, needs",
    [
        (["--temperature", 2], "a --teacher"),
        (["--method", "full", "--rank", 8], "--method lora"),
        (["--method", "full", "--alpha", 8, "--teacher", "m"], "--method lora"),
        (["--method", "full", "--dropout", 0.1], "--method lora"),
    ],
)
def test_options_of_a_training_that_is_not_done_are_refused(tmp_path, sentence, options, needs):
    assert surgeon("recover", MODEL, tmp_path / "out", "--data", TEXT, *options) == 2
    name = next(option for option in options if option in ("--temperature", "--rank", "--alpha", "--dropout"))
    assert sentence() == f"surgeon: {name} means nothing without {needs}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="another user is another process")
def test_a_model_that_this_user_may_not_read_is_one_sentence(tmp_path, sentence, capsys):
    """Not a pretence: permissions, as a user who is not root."""
    model = shutil.copytree(MODEL, tmp_path / "secret" / "model")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    command = ["--data", TEXT, "--quiet", "--device", "cpu"]
    assert surgeon("eval", tmp_path / "none", *command) == 2  # imports, which another user may not read
    assert "no model folder" in sentence()
    model.parent.chmod(0)
    said, code = tmp_path / "said", 1
    said.touch()
    said.chmod(0o666)
    if not (child := os.fork()):
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            code = surgeon("eval", model, *command)
            said.write_text(capsys.readouterr().err)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    model.parent.chmod(0o755)
    assert code == 2
    assert said.read_text() == f"surgeon: {str(model)!r} cannot be read or written: Permission denied\n"


def test_text_that_is_empty_or_too_short(tmp_path, sentence):
    text = tmp_path / "text.txt"
    for content, words in (("", "empty"), ("three short words", "32")):
        text.write_text(content)
        options = ["--calibration", text, "--samples", "4", "--seqlen", "32", "--quiet"]
        assert surgeon("prune", MODEL, tmp_path / "out", *options) == 2
        assert words in sentence()
    assert not (tmp_path / "out").exists()


def test_out_that_is_taken_needs_overwrite(tmp_path, sentence):
    out = tmp_path / "out"
    shutil.copytree(MODEL, out)
    before = (out / "model.safetensors").read_bytes()
    magnitude = [*SMALL, "--method", "magnitude"]
    assert surgeon("prune", MODEL, out, *magnitude) == 2
    assert "--overwrite" in sentence()
    assert (out / "model.safetensors").read_bytes() == before
    assert surgeon("prune", MODEL, out, *magnitude, "--overwrite") == 0
    assert (out / "surgeon_report.json").exists()
    assert (out / "model.safetensors").read_bytes() != before


def test_out_equal_to_the_model_is_refused_even_with_overwrite(tmp_path, sentence):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    assert surgeon("prune", model, model, *SMALL, "--overwrite") == 2
    assert "model" in sentence()
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_damaged_and_pickled_checkpoints(tmp_path, sentence):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert surgeon("prune", model, tmp_path / "out", *SMALL) == 2
    assert "damaged" in sentence()
    weights.rename(model / "pytorch_model.bin")
    assert surgeon("prune", model, tmp_path / "out", *SMALL) == 2
    assert "never loaded" in sentence()
    assert not (tmp_path / "out").exists()


def test_nan_weights_exit_with_1_and_name_the_layer(tmp_path, sentence):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    weights = load_file(MODEL / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert surgeon("prune", model, tmp_path / "out", *SMALL) == 1
    assert "model.layers.2.mlp.down_proj" in sentence()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("resource", ["memory", "disk"])
def test_too_little_memory_or_disk_is_found_before_the_work_starts(tmp_path, sentence, monkeypatch, resource):
    def started(*_, **__):
        raise AssertionError("the work has started")

    monkeypatch.setattr("llm_surgeon.pruning.run_shots", started)
    if resource == "memory":
        real = psutil.virtual_memory()
        monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=20_000_000))
    else:
        real_disk = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: real_disk._replace(free=1_000_000))
    assert surgeon("prune", MODEL, tmp_path / "out", *SMALL) == 2
    assert f"of {resource} are needed" in sentence()
    assert list(tmp_path.iterdir()) == []


def test_prune_checkpoint_takes_options_or_a_config_but_not_both(tmp_path):
    options = {"calibration": str(TEXT), "samples": 2, "seqlen": 16, "method": "magnitude"}
    report = prune_checkpoint(MODEL, tmp_path / "out", **options)
    assert report.config["method"] == "magnitude"
    with pytest.raises(InputError, match="not both"):
        prune_checkpoint(MODEL, tmp_path / "other", PruneConfig(), shots=2)
