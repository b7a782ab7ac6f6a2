"""surgeon pack, eval and bench generate, as a user types them."""

import contextlib
import csv
import dataclasses
import html
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from llm_surgeon import InputError
from llm_surgeon.cli import generate
from llm_surgeon.config.decoding import Decoding
from llm_surgeon.inference import decoding, pack_model
from llm_surgeon.inference.decoding import Decoder
from llm_surgeon.inference.speed import measure_speed, measure_speeds
from llm_surgeon.jobs.pack import pack_checkpoint
from llm_surgeon.report.schema import PruneReport
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.cli.test_cli import MODEL, SMALL, TEXT, sentence, surgeon  # noqa: F401 (sentence is a fixture)
from tests.surgeon.packed_models import IDS, build_2_4, continuation

ROOT = Path(__file__).parents[3]
FRESH = """
import json, sys, llm_surgeon
from transformers import AutoModelForCausalLM
from tests.surgeon.packed_models import continuation
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
print(json.dumps([sum(type(m).__name__ == "PackedLinear" for m in model.modules()), continuation(model)]))
"""


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "dense"
    assert surgeon("prune", MODEL, folder, *SMALL, "--method", "magnitude") == 0
    return folder


@pytest.fixture(scope="module")
def packed(pruned):
    folder = pruned.parent / "packed"
    assert surgeon("pack", pruned, folder, "--quiet") == 0
    return folder


def test_a_pruned_and_packed_model_generates_what_its_dense_twin_does(pruned, packed):
    done = subprocess.run([sys.executable, "-c", FRESH, packed], cwd=ROOT, capture_output=True, text=True, check=True)
    layers, tokens = json.loads(done.stdout.splitlines()[-1])
    assert layers == 42
    assert tokens == continuation(AutoModelForCausalLM.from_pretrained(pruned, dtype="float32"))


def test_what_pack_writes(pruned, packed, capsys):
    size, dense_size = ((folder / "model.safetensors").stat().st_size for folder in (packed, pruned))
    assert size < 0.7 * dense_size
    for name in ("tokenizer.json", "generation_config.json"):
        assert (packed / name).read_bytes() == (pruned / name).read_bytes()
    before, after = (PruneReport.read(folder / "surgeon_report.json") for folder in (pruned, packed))
    (told,) = after.history
    assert told.startswith("42 linear layers of this model have") and before.history == []
    assert dataclasses.replace(after, history=[]) == before
    assert html.escape(told, quote=False) in (packed / "report.html").read_text()
    card = (packed / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "surgeon-2of4" in front["tags"]
    assert "import llm_surgeon" in card and "report.html" in card and 'device_map="auto")' in card
    assert card.index("## Packed") < card.index("## What was removed") and card.count("## How to load it") == 1
    assert "How it is stored" not in card
    assert "surgeon pack" in (pruned / "README.md").read_text()
    assert surgeon("pack", pruned, packed, "--overwrite") == 0
    text = capsys.readouterr().out
    assert "packed 42 linear layers" in text and "not 2:4, stored dense: lm_head" in text


def test_a_structurally_pruned_model_is_packed_with_its_code(tmp_path):
    groups, sparse, out = (tmp_path / name for name in ("groups", "sparse", "packed"))
    options = ["--structure", "groups", "--sparsity", 0.3, "--round-to", 8]
    assert surgeon("prune", MODEL, groups, *SMALL, *options) == 0
    assert surgeon("prune", groups, sparse, *SMALL, "--method", "magnitude") == 0
    assert surgeon("pack", sparse, out, "--quiet") == 0
    assert 'device_map="auto", trust_remote_code=True)' in (out / "README.md").read_text()
    dense, packed = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=True)
        for folder in (sparse, out)
    )
    assert type(packed).__name__ == "PrunedLlamaForCausalLM" and continuation(packed) == continuation(dense)


def test_eval_takes_a_packed_folder(pruned, packed, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:8000])
    values = []
    for folder in (pruned, packed):
        assert surgeon("eval", folder, "--data", text, "--seqlen", 64, "--quiet") == 0
        values.append(capsys.readouterr().out)
    assert values[0] == values[1]


def test_what_pack_and_prune_refuse(pruned, packed, tmp_path, sentence):  # noqa: F811
    for model, words in (
        (MODEL, "no 2:4 weight to pack"),
        (packed, "is packed: take the dense checkpoint"),
        (tmp_path / "nowhere", "no model folder"),
    ):
        assert surgeon("pack", model, tmp_path / "out") == 2
        assert words in sentence()
    assert surgeon("pack", pruned, packed) == 2
    assert "--overwrite" in sentence()
    assert surgeon("pack", pruned, pruned, "--overwrite") == 2
    assert "overlaps" in sentence()
    assert surgeon("prune", packed, tmp_path / "out", *SMALL) == 2
    assert "is packed: take the dense checkpoint" in sentence()
    assert list(tmp_path.iterdir()) == []


def test_damaged_packed_folders_exit_with_one_sentence(packed, tmp_path, sentence):  # noqa: F811
    folder = tmp_path / "model"
    shutil.copytree(packed, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    assert surgeon("eval", folder, "--data", TEXT) == 2
    assert "version 7" in sentence()


def test_weights_are_packed_in_their_own_dtype_to_the_bit(tmp_path):
    save_folder(tmp_path / "dense", build_2_4("opt", torch.float16))
    report = pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    assert len(report.modules) == 12 and report.ignored == ["lm_head"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert model.dtype == torch.float16
    model.dequantize()
    dense = build_2_4("opt", torch.float16).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, dense[name]), name


def test_bench_generate(pruned, packed, tmp_path, capsys):
    figures = tmp_path / "speed.csv"
    options = [
        "--prompt",
        8,
        "--new-tokens",
        4,
        "--batch-size",
        1,
        "--batch-size",
        3,
        "--repeats",
        1,
        "--fuse",
        "--cusparselt",
        "--fused-parts",
    ]
    options += ["--decoding", "generate", "--decoding", "eager"]
    if not torch.cuda.is_available():
        options += ["--device", "cpu"]
    assert surgeon("bench", "generate", pruned, "--packed", packed, *options, "--csv", figures, "--quiet") == 0
    text, notes = capsys.readouterr()
    assert "dense" in text and "packed" in text
    # Without a GPU both are the same dense layers, and their times compare nothing.
    assert ("×" in text) == torch.cuda.is_available()
    assert torch.cuda.is_available() or "packed layers run as dense ones" in " ".join(text.split())
    assert torch.cuda.is_available() or "--cusparselt has no effect on this model on cpu" in notes
    assert "packed with linears fused; packed with cuSPARSELt; both with fused parts" in " ".join(text.split())
    rows = list(csv.DictReader(figures.open()))
    assert [(row["weights"], row["decoding"], row["batch_size"]) for row in rows] == [
        (weights, way, size) for weights in ("dense", "packed") for way in ("generate", "eager") for size in "13"
    ]
    for row in rows:
        assert float(row["decode_tokens_per_s"]) == pytest.approx(
            4 * int(row["batch_size"]) / float(row["decode_seconds"]), rel=0.01
        )
        assert int(row["disk_bytes"]) <= (pruned / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "options, words",
    [
        (["--packed", "PRUNED", "--new-tokens", 1], "is not packed"),
        (["--prompt", 512], "more than the 512 positions"),
        (["--csv", "nowhere/speed.csv"], "there is no folder 'nowhere'"),
        (["--csv", "."], "'.' cannot be written: it is a folder, or"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(pruned, sentence, options, words):  # noqa: F811
    options = [pruned if option == "PRUNED" else option for option in options]
    assert surgeon("bench", "generate", pruned, "--quiet", "--device", "cpu", *options) == 2
    assert words in sentence()


def test_bench_refuses_a_dense_model_and_a_machine_without_a_gpu(pruned, sentence, monkeypatch):  # noqa: F811
    assert surgeon("bench", "generate", MODEL, "--quiet", "--device", "cpu", "--batch-size", 1) == 2
    assert "no 2:4 weight" in sentence()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert surgeon("bench", "generate", pruned, "--quiet") == 2
    assert sentence().startswith("surgeon: no NVIDIA GPU was found, on which packed layers are fast: --device cpu")


def test_what_keeps_a_model_from_fused_passes_is_said(tmp_path, capsys):
    save_folder(tmp_path, build_2_4("opt"))
    options = ["--prompt", 8, "--new-tokens", 2, "--batch-size", 1, "--repeats", 1, "--decoding", "fused"]
    assert surgeon("bench", "generate", tmp_path, *options, "--device", "cpu", "--quiet") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "fused: the models' own passes, because of the model's parts" in said


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_the_timed_decoding_is_greedy_decoding(name):
    model = build_2_4(name)
    expected = torch.tensor(continuation(model))[:, 6:]
    decoder = Decoder(model, IDS, 7)
    for _ in range(2):
        with torch.no_grad():
            decoder.restart()
            decoder.run()
        assert torch.equal(decoder.tokens, expected)


def test_the_time_of_generate_is_that_of_its_steps(monkeypatch):
    """A clock that counts the model's passes: 1 for the prompt, and then one a step."""
    model, passes = build_2_4("llama"), []
    model.register_forward_hook(lambda *_: passes.append(None))
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: float(len(passes)))
    assert decoding.generate_seconds(model, IDS, 5) == (1, 5) and len(passes) == 6
    assert decoding.generate_seconds(model, IDS, 0) == (1, 0)


@pytest.mark.parametrize("way", [Decoding.EAGER, Decoding.FUSED, Decoding.COMPILED, Decoding.GENERATE])
def test_speed_of_a_model(way, monkeypatch):
    compilations = []
    monkeypatch.setattr(torch, "compile", lambda model, **how: compilations.append(how) or model)
    model = build_2_4("llama")
    options = {"batch_size": 2, "prompt": 6, "new_tokens": 3, "repeats": 1, "decoding": way}
    speed = measure_speed(model, **options)
    assert speed.decoding is way and speed.peak_bytes == 0
    assert len(compilations) == (2 if way is Decoding.COMPILED else 0)  # the prompts' pass and the step
    assert speed.prefill_rate == pytest.approx(12 / speed.prefill_seconds)
    assert speed.decode_rate == pytest.approx(6 / speed.decode_seconds)
    weights = sum(p.nbytes for p in model.parameters())
    assert weights <= speed.weight_bytes <= weights + 100  # and a few frequencies
    linears = sum(module.weight.nbytes for name, module in model.named_modules() if "_proj" in name)
    pack_model(model)
    packed = measure_speed(model, **options)
    # float32: half the values and an eighth of a byte per weight, beside the dense weights that a CPU multiplies by
    assert packed.weight_bytes == speed.weight_bytes + linears // 2 + linears // 32


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("way", [Decoding.EAGER, Decoding.FUSED, Decoding.GENERATE])
def test_prefill_alone(way, name):
    speed = measure_speed(build_2_4(name), prompt=6, new_tokens=0, repeats=1, decoding=way)
    assert speed.prefill_seconds > 0 and speed.decode_seconds == 0 and math.isnan(speed.decode_rate)


def test_only_the_timed_runs_take_their_turn():
    model, passes = build_2_4("llama"), []
    model.register_forward_hook(lambda *_: passes.append(None))
    seen = []

    @contextlib.contextmanager
    def turn():
        seen.append(len(passes))
        yield
        seen.append(len(passes))

    measure_speed(model, prompt=6, new_tokens=3, repeats=2, turn=turn())
    before, after = seen
    # a pass of the prompt, timed, and another with the steps after it
    assert before >= 5 and after - before == 2 * 5 and len(passes) == after


@pytest.mark.parametrize("way", [Decoding.EAGER, Decoding.GENERATE])
def test_models_take_turns_at_being_timed(way, monkeypatch):
    """Whatever else a machine does more and more, it does to all of them."""
    models, passes, now = {"first": build_2_4("llama"), "second": build_2_4("llama")}, [], [0.0]
    seconds = {"first": 100.0, "second": 300.0}

    def run(name):
        passes.append(name)
        now[0] += seconds[name] + len(passes)

    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: run(name))
    monkeypatch.setattr("llm_surgeon.inference.decoding.time.perf_counter", lambda: now[0])

    @contextlib.contextmanager
    def turn():
        passes.clear()
        yield
        rounds.extend(name for name, _ in itertools.groupby(passes))

    rounds = []
    options = {"prompt": 6, "new_tokens": 2, "repeats": 3, "decoding": way}
    first, second = measure_speeds(list(models.values()), **options, turn=turn())
    assert rounds == ["first", "second"] * 3
    passes_of_a_run = 4 if way is Decoding.EAGER else 3  # the prompt alone, and with the steps
    middle = 2 * passes_of_a_run  # of the first's second run
    assert first.prefill_seconds == 100 + middle + 1
    assert second.prefill_seconds == 300 + middle + passes_of_a_run + 1
    assert second.decode_seconds - first.decode_seconds == 2 * (200 + passes_of_a_run)
    assert [speed.decoding for speed in (first, second)] == [way] * 2


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_bench_takes_turns_where_both_models_have_room(pruned, packed, room, given, monkeypatch, capsys):
    measured = []

    def speeds(models, **options):
        measured.append([generate._is_packed(model) for model in models])
        return measure_speeds(models, **options)

    monkeypatch.setattr(generate, "measure_speeds", speeds)
    monkeypatch.setattr(generate, "available_memory", lambda device: 10**12 if room else 0)
    options = ["--prompt", 8, "--new-tokens", 2, "--batch-size", 1, "--repeats", 1, "--device", "cpu"]
    assert surgeon("bench", "generate", pruned, *(["--packed", packed] if given else []), *options) == 0
    assert measured == ([[False, True]] if room else [[True], [False]])
    text = capsys.readouterr().out
    assert ("dense and packed, eager, batch size 1 …" in text) == room
    assert ("\npacked, eager, batch size 1 …" in f"\n{text}") != room


def test_the_room_for_both_models_is_counted(monkeypatch):
    model = pack_model_in_place(build_2_4("llama"))
    dense = sum(p.nbytes for p in build_2_4("llama").parameters())
    place = torch.device("cuda")
    for memory, room in ((2 * dense, False), (6 * dense, True)):
        monkeypatch.setattr(generate, "available_memory", lambda device, memory=memory: memory)
        assert generate._has_room(model, place) == room
        assert generate._has_room(model, torch.device("cpu")) or not room
    monkeypatch.setattr(generate, "available_memory", lambda device: 10**12 if device == place else dense)
    assert not generate._has_room(model, place)


def pack_model_in_place(model):
    pack_model(model)
    return model


def test_speed_that_cannot_be_measured():
    with pytest.raises(InputError, match="60 \\+ 5 tokens are more than the 64 positions"):
        measure_speed(build_2_4("llama"), prompt=60, new_tokens=5)
    with pytest.raises(InputError, match="CUDA graph needs a CUDA device"):
        measure_speed(build_2_4("llama"), prompt=6, new_tokens=5, decoding=Decoding.GRAPH)
