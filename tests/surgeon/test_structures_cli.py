"""What smaller models are refused for, as a user types it: one sentence, and nothing on the disk has changed."""

import pytest

from llm_surgeon.cli import main
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
        ("prune --structure layers --round-to 8", "llama", {}, "round_to has no meaning for layers"),
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
