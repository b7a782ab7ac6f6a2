"""Refusals of smaller models, as a user types it: one sentence, and nothing on the disk has changed."""

import re

import pytest

from llm_surgeon.cli import main
from llm_surgeon.report.schema import PruneReport
from tests.surgeon.checkpoints import edit_json, save_folder, tree
from tests.surgeon.tiny_models import build

QUANTIZED = {"quantization_config": {"quant_method": "gptq"}}


@pytest.mark.parametrize(
    "command, name, changes, words",
    [
        ("prune --structure groups --sparsity 0.97", "llama", {}, "sparsity 0.97 would empty a layer"),
        ("prune --structure groups --sparsity 0.5 --round-to 64", "llama", {}, "widths are multiples of 64"),
        ("prune --structure width --round-to 32", "llama", {}, "a width below 32 must be a multiple of 32"),
        ("prune --structure layers --sparsity 0.9", "llama", {}, "would empty the model: one of 2 blocks must stay"),
        ("prune --structure groups", "llama", {"num_key_value_heads": 3}, "k_proj.weight as (16, 32), where"),
        ("prune --structure groups", "opt", {"num_attention_heads": 5}, "must be divisible by num_heads"),
        ("prune --structure width", "gpt2", {}, "tied to the token embedding"),
        ("prune --structure groups --lora-rank 2", "llama", QUANTIZED, "quantized"),
        ("recover", "llama", QUANTIZED, "quantized"),
        ("recover --steps 4 --warmup-steps 4", "llama", {}, "warmup_steps 4 leave nothing of the 4 steps"),
        ("recover --preset llm-pruner --steps 50", "llama", {}, "warmup_steps 100 leave nothing of the 50 steps"),
        ("prune --structure groups --skip-layers 1-0", "llama", {}, "skip_layers holds 1-0, which ends before it beg"),
        ("prune --structure layers --round-to 8", "llama", {}, "round_to has no meaning for structure 'layers'"),
        ("prune --structure groups --sparsity 0.97 --dry-run", "llama", {}, "sparsity 0.97 would empty a layer"),
        ("prune --structure width --dry-run", "gpt2", {}, "tied to the token embedding"),
        ("prune --structure layers --sparsity 0.9 --dry-run", "llama", {}, "one of 2 blocks must stay"),
    ],
)
def test_bad_input(command, name, changes, words, tmp_path, capsys):
    source = save_folder(tmp_path / "dense", build(name))
    if changes:
        edit_json(source / "config.json", **changes)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{1 + i * i % 60}" for i in range(4000)))
    before = tree(tmp_path)
    name, *options = command.split()
    data = "--calibration" if name == "prune" else "--data"
    arguments = [name, source, tmp_path / "out", *options, data, text, "--seqlen", "16", "--device", "cpu", "--quiet"]
    arguments += ["--samples", "4"] if name == "prune" else []
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(list(map(str, arguments)))
    line = capsys.readouterr().err.strip().splitlines()[-1]  # transformers reports what does not load before
    assert exit.value.code == 2 and line.startswith("surgeon: ") and words in line, line
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "options, promise",
    [
        ("--structure layers --sparsity 0.2", r"1 shot: would remove 1 of 2 blocks, ([\d,]+) of [\d,]+ weights, 50.0%"),
        ("--structure width --sparsity 0.3 --round-to 8 --shots 1", r"16 of 32 channels, ([\d,]+) of .*, 50.0%"),
        ("--structure groups --shots 1", r"at least ([\d,]+) of"),
        ("--structure rows-columns --sparsity 0.2 --shots 1", r"at least ([\d,]+) of"),
        ("--structure 2:4 --shots 1", r"would remove ([\d,]+) of"),
    ],
)
def test_a_dry_run_says_what_the_run_removes(options, promise, tmp_path, capsys):
    source = save_folder(tmp_path / "dense", build("llama"))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{1 + i * i % 60}" for i in range(4000)))
    arguments = ["prune", source, tmp_path / "out", *options.split(), "--calibration", text, "--seqlen", "16"]
    arguments = list(map(str, [*arguments, "--samples", "4", "--device", "cpu"]))
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--dry-run"])
    found = re.search(promise, " ".join(capsys.readouterr().out.split()))
    assert found is not None
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--quiet"])
    report = PruneReport.from_json((tmp_path / "out" / "surgeon_report.json").read_text())
    promised = int(found[1].replace(",", ""))
    assert report.removed == promised if "at least" not in promise else report.removed >= promised
