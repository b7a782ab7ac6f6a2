"""Draw the README's figure from rows of `bench/results`: perplexity by method, tokens per second dense and packed.

python -m bench.figure          # writes docs/assets/figure.svg
"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

RESULTS, OUT = Path(__file__).parent / "results", Path(__file__).parents[1] / "docs" / "assets" / "figure.svg"
TEXTS = {"wt_test": "WikiText-2", "c4_test": "C4"}
# The default has rows of its own name, and those of seeds whose run named it in full.
METHODS = {
    "dense": ("dense",),
    "SparseGPT": ("sparsegpt",),
    "Surgeon, sweep": ("surgeon sequential",),
    "Surgeon": ("surgeon", "surgeon sequential, gradient_steps 4"),
}
COLOURS = ("#9aa5b1", "#d98e48", "#6aa3c8", "#1f5f8b")


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def perplexities() -> dict[str, list[float]]:
    """Mean over the seeds at 2:4, of every text."""
    found = {}
    trials = [row for row in rows("real_model_trials.csv") if row["structure"] in ("2:4", "none") and not row["error"]]
    for label, names in METHODS.items():
        own = {row["seed"]: row for row in trials if row["method"] in names}.values()
        found[label] = [mean(float(row[text]) for row in own) for text in TEXTS]
    return found


def speeds() -> dict[str, list[float]]:
    """Tokens per second of the latest rows by fused passes, at batch 1 and 16."""
    latest = {(row["weights"], row["batch_size"]): row for row in rows("generate.csv") if _is_step(row)}
    return {
        weights: [float(latest[weights, batch]["decode_tokens_per_s"]) for batch in ("1", "16")]
        for weights in ("dense", "packed")
    }


def _is_step(row: dict[str, str]) -> bool:
    return row["decoding"] == "fused" and row["parts"] == "passes" and row["new_tokens"] != "0"


def main() -> None:
    plt.rcParams |= {"font.size": 9, "svg.hashsalt": "surgeon-kernels", "svg.fonttype": "none"}
    figure, (left, *right) = plt.subplots(1, 3, figsize=(8.6, 2.7), width_ratios=(3.4, 1, 1), layout="constrained")
    for index, (label, values) in enumerate(perplexities().items()):
        places = [text + 0.2 * (index - 1.5) for text in range(len(TEXTS))]
        bars = left.bar(places, values, 0.19, label=label, color=COLOURS[index])
        left.bar_label(bars, fmt="%.0f", padding=1)
    left.set_xticks(range(len(TEXTS)), TEXTS.values())
    left.set_title("Perplexity of SmolLM2-135M, half of its weights zero (2:4)\n", fontsize=9)
    left.legend(frameon=False, ncols=2)
    left.set_ylim(top=175)
    of_step = speeds()
    for axes, place, batch in zip(right, (0, 1), ("batch 1", "batch 16"), strict=True):
        values = [each[place] for each in of_step.values()]
        bars = axes.bar(["dense", "2:4"], values, 0.6, color=(COLOURS[0], COLOURS[3]))
        axes.bar_label(bars, fmt="%.0f", padding=1)
        axes.set_ylim(top=1.2 * max(values))
        axes.set_title(f"7B, tokens/s\n{batch}", fontsize=9)
    for axes in (left, *right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_yticks([])
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, metadata={"Date": None}, facecolor="white")
    print(OUT)


if __name__ == "__main__":
    main()
