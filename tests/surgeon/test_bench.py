"""The benches that also run on a CPU, on models of a few thousand weights: that their rows hold what they say."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def bench(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> ModuleType:
    """The script ``name`` as a module, after its ``main()`` where there are arguments."""
    monkeypatch.syspath_prepend(str(BENCH.parent))
    module = importlib.import_module(f"bench.{name}")
    if arguments:
        monkeypatch.setattr(sys, "argv", [f"bench/{name.replace('.', '/')}.py", *map(str, arguments)])
        module.main()
    return module


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("structure", ["groups", "rows-columns"])
def test_a_pruned_model_is_as_much_smaller_as_its_row_says(
    structure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.csv"
    small = ("--tiny", "--device", "cpu", "--layers", 2, "--samples", 2, "--seqlen", 32, "--prompt", 4, "--batches", 1)
    options = ("--structure", structure, "--round-to", 8, "--modes", "plain", "--out", out)
    bench("end_to_end.structured", monkeypatch, *small, *options)
    found = rows(out)
    assert [row["state"] for row in found] == ["dense", "pruned"]
    dense, pruned = (int(row["macs_per_token"]) - 64 * 128 for row in found)  # nothing is taken from the head
    # Of rows and columns, neurons that lose one of their three weights go altogether.
    assert (
        1 - pruned / dense >= 0.27
        if structure == "rows-columns"
        else 1 - pruned / dense == pytest.approx(0.3, abs=0.03)
    )
    assert float(found[-1]["sparsity"]) == pytest.approx(0.3, abs=0.03)


def test_methods_take_options(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = bench("end_to_end.trials", monkeypatch)
    assert trials.method_options("surgeon joint, swaps 2, schedule 1.5") == {
        "method": "surgeon",
        "update": "joint",
        "swaps": 2,
        "schedule": 1.5,
        "gradient_steps": 0,
    }
    for wrong in ("surgeons", "surgeon joint, swaps"):
        with pytest.raises(trials.argparse.ArgumentTypeError):
            trials.method_options(wrong)


def test_the_longest_trials_begin_first(monkeypatch: pytest.MonkeyPatch) -> None:
    quality, trials = bench("end_to_end.quality", monkeypatch), bench("end_to_end.trials", monkeypatch)
    weights = {
        (trial["structure"], trial["method"]): quality.weight(trial)
        for trial in trials.plan(["m"], quality.STRUCTURES, list(trials.METHODS), [0])
    }
    assert {method for _, method in weights} == {"dense", *trials.METHODS}

    def order(structure: str, *methods: str) -> list[str]:
        return sorted(methods, key=lambda method: -weights[structure, method])

    for structure in ("2:4", "unstructured 50%"):
        slow = ["surgeon chunked", "surgeon joint", "surgeon sequential", "magnitude"]
        assert order(structure, *reversed(slow[:2]), "magnitude") == [*slow[:2], "magnitude"]
        assert weights[structure, "surgeon sequential"] > weights[structure, "sparsegpt"]
    assert weights["rows-columns 30%", "surgeon joint"] == max(weights.values())
    assert min(weights.values()) == weights["none", "dense"]


def test_scripts_for_a_gpu_say_so_in_a_line_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    paths = [path for path in BENCH.glob("*/*.py") if "def main()" in path.read_text()]
    scripts = {f"{path.parent.name}.{path.stem}" for path in paths}
    on_a_cpu = {"studies.swaps", "studies.interleaved_lora", "studies.solver"}
    on_a_cpu |= {"end_to_end.quality", "end_to_end.real_model", "end_to_end.recover", "kernels.linear_2_4_fit"}
    assert len(scripts) >= 15 and on_a_cpu < scripts
    for name in scripts - on_a_cpu:
        with pytest.raises(SystemExit) as exit:
            bench(name, monkeypatch, "--out", "nowhere.csv")
        assert exit.value.code == 2
        assert capsys.readouterr().err == f"{name.split('.')[1]} measures an NVIDIA GPU, and torch finds none\n"
