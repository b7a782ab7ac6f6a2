"""The HTML page and the model card: their words, and that they are safe to open and to publish."""

import dataclasses

import pytest
import yaml

from llm_surgeon.cli.config_file import read_options
from llm_surgeon.config.methods import method, names
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.data.record import DataRecord
from llm_surgeon.report import render
from llm_surgeon.report.schema import HeldOutLoss, Sample, ShotReport, SolverTrace
from tests.surgeon.reports import DOWN, QUERY, Page, magnitude_report, surgeon_report


@pytest.fixture(scope="module")
def html() -> str:
    return render.render_html(surgeon_report())


def test_html_tells_the_numbers(html):
    page = Page(html)
    for words in (
        "facebook/opt-125m",
        "50.0%",
        "27.65 → 34.00",
        "+0.207",
        "+0.065",
        "predicted were +0.058",
        "3 min 12 s",
    ):
        assert words in page.text
    assert "peak memory 1.61 GB" in page.text and "1.2 M parameters" in page.text
    assert ["1", "25.0%", "25.0%", "3.0000", "+0.0123", "+0.0150", "2.0 s", "0.5 s", "2.5 s"] in page.rows
    assert ["2", "50.0%", "50.0%", "3.0150", "+0.0456", "+0.0500", "2.5 s", "–", "2.5 s"] in page.rows
    assert [f"model.layers.1.{DOWN}", "10 × 30", "200", "66.7%"] in page.rows
    assert ["damp_g", "0.1"] in page.rows and "seqlen" not in html and ["torch", "2.13.0"] in page.rows
    assert f"model.layers.0.{DOWN} in shot 2 (0.0003)." in page.text
    assert f"(model.layers.0.{DOWN}) ended an estimated 2% above it." in page.text
    assert page.tags.index("section") < page.tags.index("svg") < page.tags.index("details")
    assert page.tags.count("svg") == 3 and page.tags.count("figcaption") == 3


def test_html_loads_nothing_and_runs_nothing(html):
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    outside = [(name, value) for name, value in page.attributes if "//" in value and not name.startswith("xmlns")]
    assert outside == []
    assert "@import" not in html and "url(h" not in html
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme: dark" in html


def test_html_escapes_names():
    report = surgeon_report()
    hostile = "<script>alert('$x^2$ & \"y\"')</script>"
    report.layers[0] = dataclasses.replace(report.layers[0], name=hostile, kind=hostile)
    report.shots[1].solver[1] = SolverTrace(hostile, [2.0, 1.0], gap=0.5)
    report.shots[1].jitter = {hostile: 0.1}
    report.model = report.device = report.started = report.versions["torch"] = report.config["method"] = hostile
    page = Page(render.render_html(report))
    assert "script" not in page.tags
    assert [hostile, "10 × 10", "20", "20.0%"] in page.rows
    assert page.text.count(hostile) >= 6  # method, device twice, figure, caption, tables
    assert "Pruning report: script>" in page.text and "script>, pruned" in page.text  # what follows the last slash


def test_low_rank_corrections_show_how_their_rank_grew():
    report = surgeon_report()
    card = render.render_model_card(report, "a/b")
    assert "corrections" not in render.render_html(report) and "corrections" not in card
    for shot, rank in zip(report.shots, (37, 74), strict=True):
        shot.correction_rank = rank
    html = render.render_html(report)
    assert html.count("<br>corrections</th>") == 1
    assert [html.count(f"<td>{rank}</td>") for rank in (37, 74)] == [1, 1]
    assert "- Low-rank corrections, of rank 74 in all, were trained" in render.render_model_card(report, "a/b")


def test_html_without_shots_or_passes():
    page = Page(render.render_html(magnitude_report()))
    assert page.tags.count("svg") == 1  # layers lost different shares of their weights
    assert "Perplexity" not in page.text and "Loss" not in page.text and "peak memory" not in page.text
    assert "2 of every 4 consecutive weights of a row" in page.text

    report = magnitude_report()
    report.shots = [ShotReport(1, 0.5, 0.5, seconds={"selection": 0.25})]
    page = Page(render.render_html(report))
    assert ["1", "50.0%", "50.0%", "0.2 s", "0.2 s"] in page.rows
    assert "Loss" not in page.text


def test_html_of_an_empty_report():
    report = magnitude_report()
    report.layers = []
    page = Page(render.render_html(report))
    assert "0 of 0 in 0 linear layers" in page.text and "svg" not in page.tags


def test_measured_total_says_how_many_shots_it_covers():
    report = surgeon_report()
    report.layers, report.shots[1].solver = [], []
    report.shots[1].measured_increase = None
    page = Page(render.render_html(report))
    assert "rose by +0.015 nats per token in 1 of 2 shots; predicted were +0.012." in page.text
    report.shots[0].predicted_increase = None
    page = Page(render.render_html(report))
    assert "in 1 of 2 shots." in page.text and "; predicted" not in page.text


def front_matter(card: str) -> dict:
    start, front, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front)


def test_model_card_front_matter():
    assert front_matter(render.render_model_card(surgeon_report(), "facebook/opt-125m")) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "facebook/opt-125m",
        "tags": ["pruned", "sparse", "llm-surgeon"],
    }
    report = surgeon_report()
    report.held_out = HeldOutLoss(16, 2048, 3.3026, 3.7206)
    report.data = {
        "eval_data": DataRecord("/data/mine.txt", "evaluation", "ab" * 32, 243, 8, 8, 128),
        "calibration": DataRecord("wikitext2", "calibration", "cd" * 32, 243, 8, 8, 128),
    }
    (index,) = front_matter(render.render_model_card(report, "facebook/opt-125m"))["model-index"]
    assert index["name"] == "facebook/opt-125m, 50.0% pruned"
    assert [(result["dataset"]["name"], result["metrics"][0]["value"]) for result in index["results"]] == [
        ("mine.txt", pytest.approx(34.0)),
        ("wikitext2, held-out windows", pytest.approx(41.2892, abs=1e-3)),
    ]
    assert index["results"][0]["metrics"][0]["name"] == "perplexity, 27.65 before pruning"


def test_model_card_keeps_local_paths_to_itself(tmp_path, monkeypatch):
    card = render.render_model_card(surgeon_report(), f"{tmp_path}/my-model")
    assert "base_model" not in front_matter(card)
    assert "# my-model, 50.0% pruned" in card and str(tmp_path) not in card
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "small").mkdir(parents=True)
    assert "base_model" not in front_matter(render.render_model_card(surgeon_report(), "models/small"))


@pytest.mark.parametrize(
    "name, hub", [("gpt2", True), ("a/b", True), ("a/b/c", False), ("../b", False), ("x: y", False)]
)
def test_hub_ids(name, hub):
    assert render.is_hub_id(name) is hub


def test_model_card_body():
    card = render.render_model_card(surgeon_report(), "facebook/opt-125m")
    assert "# facebook/opt-125m, 50.0% pruned" in card
    assert "400 of 800 weights in 4 linear layers; the whole model has 1,234,567 parameters." in card
    assert f"| `{QUERY}` | 40.0% |\n| `{DOWN}` | 53.3% |" in card
    assert "**Perplexity on evaluation text: 27.65 → 34.00 (8 windows, 1,024 tokens).**" in card
    assert "- Increase of the loss on evaluation text: +0.2066 nats per token\n" in card
    words = "on the calibration windows: +0.0650 nats per token measured, +0.0579 predicted\n"
    assert f"- Increase of the training loss, {words}" in card
    assert 'AutoModelForCausalLM.from_pretrained(path, dtype="auto")' in card
    assert "Versions: python 3.11.7, torch 2.13.0.\n" in card
    assert "ICLR 2024" in card
    options = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert PruneConfig.from_mapping(options) == PruneConfig("unstructured", update="joint", shots=2)


def test_model_card_of_a_model_that_became_smaller():
    report = surgeon_report()
    report.config = dataclasses.asdict(PruneConfig("groups"))
    names = ("parameters", "macs", "bytes", "seconds")
    report.sizes = {
        "before": dict(zip(names, (2_000_000, 4_000_000, 8_000_000, 0.020), strict=True)),
        "after": dict(zip(names, (1_500_000, 2_000_000, 6_000_000, 0.010), strict=True)),
    }
    card = render.render_model_card(report, "facebook/opt-125m")
    assert "the whole model had 1,234,567 parameters.\n" in card
    assert "zeros" not in card and "were not pruned" not in card
    table = card[card.index("|  | before") :].splitlines()[:6]
    assert table == [
        "|  | before | after | ratio |",
        "|-|-:|-:|-:|",
        "| parameters | 2.0 M | 1.5 M | 0.75 |",
        "| MACs | 4.0 M | 2.0 M | 0.50 |",
        "| memory | 8 MB | 6 MB | 0.75 |",
        "| latency | 20.0 ms | 10.0 ms | 0.50 |",
    ]
    assert "\n\n\n" not in card


def test_held_out_perplexity_and_warnings_come_first():
    report = surgeon_report()
    report.held_out = HeldOutLoss(16, 2048, 3.3026, 3.7206)
    report.warnings = ["Few <tokens>."]
    report.evaluation = None
    card = render.render_model_card(report, "facebook/opt-125m")
    assert card.index("**Perplexity on held-out text: 27.18 → 41.29 (16 windows, 2,048 tokens).**") < card.index(
        "## What"
    )
    assert card.index("> Warning: Few <tokens>.\n") < card.index("## What")
    assert "- Increase of the loss on held-out text: +0.4180 nats per token\n" in card
    assert "- Increase of the training loss, on the calibration windows: +0.0650 nats" in card
    assert "\n\n\n" not in card
    page = Page(render.render_html(report))
    words = " ".join(page.text.split())
    assert "Perplexity on held-out text 27.18 → 41.29 before and after; lower is better. Loss +0.418 nats" in words
    assert "The training loss, that of the calibration windows, rose by +0.065 nats per token" in words
    parts = ("Perplexity on held-out text", "Weights removed", "Few <tokens>", "The training loss")
    assert sorted(parts, key=words.index) == list(parts)


def test_what_was_not_measured_is_said():
    report = surgeon_report()
    card, page = render.render_model_card(report, "a/b"), Page(render.render_html(report)).text
    assert "did not see" not in card + page
    report.evaluation = None
    card, page = render.render_model_card(report, "a/b"), " ".join(Page(render.render_html(report)).text.split())
    assert "predicted\n- On text that pruning did not see nothing was measured\n" in card
    assert "predicted were +0.058. On text that pruning did not see nothing was measured." in page


def test_what_comes_next_and_what_is_the_same_everywhere():
    report = surgeon_report()
    report.config = dataclasses.asdict(PruneConfig("2:4"))
    report.layers = [dataclasses.replace(layer, removed=layer.weights // 2) for layer in report.layers]
    report.disk = {"before": 8_000_000, "after": 8_000_000}
    page = Page(render.render_html(report))
    assert page.tags.count("svg") == 2 and "weights removed" not in page.text.lower().split("details")[0][400:]
    assert ("class", "share") not in page.attributes
    assert (
        "8 MB of all weights, as before" in " ".join(page.text.split())
        and "packed, these layers take 9/16" in page.text
    )
    assert "surgeon recover OUT RECOVERED --teacher MODEL" in page.text and "surgeon pack OUT PACKED" in page.text
    assert "| kind of layer |" not in render.render_model_card(report, "a/b")
    report.config, report.disk["after"] = dataclasses.asdict(PruneConfig("rows-columns")), 6_000_000
    text = Page(render.render_html(report)).text
    assert "surgeon compact OUT SMALLER" in text and "8 MB → 6 MB" in text
    report.history = ["It was compacted."]
    assert "surgeon compact" not in render.render_html(report)


def test_samples_stand_side_by_side():
    report = surgeon_report()
    report.samples = [Sample("\n<b>The town", "of", "is")]
    words = " ".join(Page(render.render_html(report)).text.split())
    assert "<b>The town … before of after is" in words


def test_a_local_path_is_never_a_title(tmp_path):
    report = surgeon_report()
    report.model = str(tmp_path / "my-model")
    report.command = ["surgeon", "prune", report.model, str(tmp_path / "out")]
    html = render.render_html(report)
    assert "<title>Pruning report: my-model</title>" in html and "<h1>my-model, pruned</h1>" in html
    assert str(tmp_path) not in html and "<code>surgeon prune my-model out</code>" in html
    card = render.render_model_card(report, report.model)
    assert "```bash\nsurgeon prune my-model out\n```" in card and str(tmp_path) not in card
    assert report.model in report.to_json()


def test_the_data_are_told(tmp_path):
    report = surgeon_report()
    (tmp_path / "chat.jsonl").touch()
    source = str(tmp_path / "chat.jsonl")
    report.data = {
        "calibration": DataRecord("wikitext2", "calibration", "ab" * 32, 2_400_000, 128, 128, 2048),
        "lora_data": DataRecord(source, "calibration", "cd" * 32, 243, 64, 2, 128, "messages", "chat template"),
    }
    calibration = f"Calibration text: wikitext2: 128 windows of 2,048 tokens out of 2,400,000, sha256 {'ab' * 32}."
    corrections = (
        "Text of the low-rank corrections: chat.jsonl, field messages as chat template: 64 windows of 128 tokens "
        f"(2 distinct) out of 243, sha256 {'cd' * 32}."
    )
    card, page = render.render_model_card(report, "a/b"), Page(render.render_html(report))
    assert f"\n{calibration}\n\n{corrections}\n" in card and str(tmp_path) not in card
    assert calibration in page.text and corrections in page.text
    assert "\n\n\n" not in card


def test_the_options_of_a_card_name_its_data(tmp_path):
    """With which surgeon prune --config takes them, or says that they are not there."""
    report = surgeon_report()
    report.config = dataclasses.asdict(PruneConfig("2:4", lora_rank=2, samples=4))
    local = DataRecord(str(tmp_path / "chat.jsonl"), "calibration", "ab" * 32, 500, 4, 4, 128, "messages", "plain")
    hub = DataRecord("c4", "calibration", "cd" * 32, 500, 4, 4, 128)
    for data, expected in (
        ({"calibration": hub}, {"calibration": "c4"}),
        ({"calibration": local}, {"calibration": "chat.jsonl", "text_field": "messages"}),
        ({"calibration": hub, "lora_data": local}, {"calibration": "c4", "lora_data": "chat.jsonl"}),
        ({}, {}),
    ):
        report.data = data
        card = render.render_model_card(report, "a/b")
        (tmp_path / "prune.yaml").write_text(card.split("```yaml\n")[1].split("```")[0])
        names = {"calibration", "lora_data", "text_field"}
        options = read_options(tmp_path / "prune.yaml", {*report.config, *names}, {"structure", *names})
        assert {name: options.pop(name) for name in names & options.keys()} == expected
        assert PruneConfig.from_mapping(options) == PruneConfig(**report.config)


def test_the_revision_is_told():
    report = surgeon_report()
    assert "revision" not in render.render_model_card(report, "a/b").lower()
    report.revision = "0123abcd"
    assert "from revision `0123abcd`" in render.render_model_card(report, "a/b")
    assert "Revision of the model: <code>0123abcd</code>." in render.render_html(report)


def test_what_was_done_afterwards_stands_at_the_head_of_the_page():
    report = surgeon_report()
    report.history = ["It was recovered.", "It was packed."]
    words = " ".join(Page(render.render_html(report)).text.split())
    assert words.index("It was recovered.") < words.index("It was packed.") < words.index("Weights removed")


def timed(before: tuple[float, float, float], after: tuple[float, float, float]):
    names = ("seconds_low", "seconds", "seconds_high", "parameters", "macs", "bytes")
    states = {"before": before, "after": after}
    return {state: dict(zip(names, (*times, 2.0, 2.0, 2.0), strict=True)) for state, times in states.items()}


@pytest.mark.parametrize(
    "before, after, words",
    [
        ((1.9, 2.0, 2.1), (0.9, 1.0, 1.1), "It is faster here: a forward pass took 2.00× as long before."),
        ((0.9, 1.0, 1.1), (1.3, 1.5, 1.6), "It is slower here: a forward pass takes 1.50× as long as before."),
        ((0.9, 1.0, 1.3), (0.7, 0.8, 0.95), "No difference in latency was measured: it lies within the noise of the"),
    ],
)
def test_what_is_said_of_speed_follows_from_what_was_measured(before, after, words):
    report = surgeon_report()
    report.config, report.sizes = dataclasses.asdict(PruneConfig("groups")), timed(before, after)
    card, html = render.render_model_card(report, "a/b"), render.render_html(report)
    assert f"the model is smaller. {words}" in card and words in html
    assert "faster wherever" not in card
    for state in report.sizes.values():
        del state["seconds_low"]
    card = render.render_model_card(report, "a/b")  # of an older version
    assert "the model is smaller.\n" in card and words not in card


def test_model_card_without_measurements():
    card = render.render_model_card(magnitude_report(), "facebook/opt-125m")
    assert "What it cost" not in card and "ICLR" not in card and "peak memory" not in card
    assert "2 of every 4 consecutive weights of a row" in card and "Magnitude pruning" in card
    assert "\n\n\n" not in card


@pytest.mark.parametrize(
    "structure, words",
    [
        ("1:4", "3 of every 4 consecutive weights of a row"),
        ("rows-columns", "whole rows and columns of the weight matrices"),
        ("unstructured", "single weights, anywhere in a matrix"),
        ("something new", "something new"),
    ],
)
def test_structures_in_words(structure, words):
    assert render.describe_structure(structure) == words


def test_methods_in_words():
    assert all(render.describe_method(name) == (method(name).title, method(name).paper) for name in names())
    assert render.describe_method("wanda") == ("Wanda: magnitude times input norm", "Wanda (Sun et al., ICLR 2024)")
    assert render.describe_method("something new") == ("something new", "")
