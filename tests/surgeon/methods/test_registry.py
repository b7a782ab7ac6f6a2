"""Methods that others add: by a call, or by an entry point of an installed distribution."""

import sys

import pytest
import torch

from llm_surgeon import InputError, PruneConfig, prune
from llm_surgeon.checkpoint import load_model
from llm_surgeon.config import methods
from llm_surgeon.methods import Method, register
from llm_surgeon.models.decoder import find_decoder
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.cli.test_cli import SMALL, surgeon
from tests.surgeon.tiny_models import VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
MODULE = """
import torch
from llm_surgeon.methods import Method

def leftmost(linear, factors):
    assert factors is None
    return torch.arange(linear.columns + linear.has_bias).float().expand(linear.rows, -1)

toy = Method("toy", "The leftmost columns", comparison="row", rows_columns=True, costs=leftmost)
misnamed = Method("another", costs=leftmost)
"""


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(methods._methods, "records", dict(methods._methods.records))


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """A function that installs a distribution with an entry point, ``name = value``."""

    def install(name, value):
        (tmp_path / "site" / "toys-1.0.dist-info").mkdir(parents=True)
        (tmp_path / "site" / "toys_of_others.py").write_text(MODULE)
        information = tmp_path / "site" / "toys-1.0.dist-info"
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[llm_surgeon.methods]\n{name} = {value}\n")
        monkeypatch.syspath_prepend(tmp_path / "site")

    yield install
    sys.modules.pop("toys_of_others", None)


def leftmost_half_is_gone(model, before):
    for linear, dense in zip(find_decoder(model).linears, before, strict=True):
        half = linear.columns // 2
        assert bool((linear.weight[:, :half] == 0.0).all()) and torch.equal(linear.weight[:, half:], dense[:, half:])


def dense_weights(model):
    return [linear.weight.clone() for linear in find_decoder(model).linears]


def test_a_registered_method_prunes_what_its_costs_say():
    seen = []

    def leftmost(linear, factors):
        seen.append((linear.name, factors))
        return torch.arange(linear.columns + linear.has_bias).double().expand(linear.rows, -1)

    register(Method("toy", "The leftmost columns", comparison="row", rows_columns=True, costs=leftmost))
    model = build("opt")
    before = dense_weights(model)
    report = prune(model, TOKENS, structure="unstructured", method="toy", sparsity=0.5)
    leftmost_half_is_gone(model, before)
    assert seen == [(linear.name, None) for linear in find_decoder(model).linears]
    assert report.sparsity == 0.5 and report.config["method"] == "toy" and report.config["update"] == "none"
    for structure, columns in (("2:4", [0, 1, 4, 5]), ("rows-columns", [0, 1, 2])):
        model = build("opt")
        prune(model, TOKENS, structure=structure, method="toy")
        for linear in find_decoder(model).linears:
            assert bool((linear.weight[:, columns] == 0.0).all())


def test_costs_as_products_see_the_factors_and_can_be_compensated_for():
    def from_the_right(linear, factors):
        g, a = factors.diagonals(linear)
        assert len(g) == linear.rows and bool((g > 0.0).all())
        return torch.ones_like(g), torch.arange(len(a), 0, -1.0) ** 8

    toy = Method("toy", needs="gradients", comparison="network", updates=("joint", "none"), costs=from_the_right)
    register(toy)
    zeros, kept = [], []
    for update in ("joint", "none"):
        model = build("llama")
        before = dense_weights(model)
        prune(model, TOKENS, structure="2:4", method="toy", update=update, shots=1, swaps=0)
        after = dense_weights(model)
        zeros.append([weight == 0.0 for weight in after])
        kept.append([torch.equal(w[w != 0.0], dense[w != 0.0]) for w, dense in zip(after, before, strict=True)])
    assert all(map(torch.equal, *zeros)) and not any(kept[0]) and all(kept[1])


def test_an_entry_point_is_a_method_by_the_command_too(distribution, tmp_path):
    distribution("toy", "toys_of_others:toy")
    assert methods.names()[-1] == "toy" and "toys_of_others" not in sys.modules
    model = build("llama")
    before = dense_weights(model)
    folder = save_folder(tmp_path / "dense", model)
    options = [*SMALL, "--structure", "unstructured", "--sparsity", "0.5", "--method"]
    assert surgeon("prune", folder, tmp_path / "pruned", *options, "toy") == 0
    leftmost_half_is_gone(load_model(tmp_path / "pruned")[0], before)
    assert "The leftmost columns" in (tmp_path / "pruned" / "README.md").read_text()
    assert methods.method("toy") is methods.method("toy") is sys.modules["toys_of_others"].toy


def test_an_unknown_method_is_told_with_the_one_that_was_meant(distribution, capsys):
    distribution("toy", "toys_of_others:toy")
    with pytest.raises(InputError, match=r"unknown method 'toi' \(do you mean 'toy'\?\): choose one of surgeon, .*toy"):
        PruneConfig(method="toi")
    with pytest.raises(InputError, match=r"unknown method 'wnada' \(do you mean 'wanda'\?\)"):
        prune(build("llama"), TOKENS, method="wnada")
    assert surgeon("prune", "model", "out", *SMALL, "--method", "toi") == 2
    assert "do you mean 'toy'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:toy", "method 'toy' cannot be imported from no_such_module:toy: No module named"),
        ("toys_of_others:missing", "method 'toy' cannot be imported from toys_of_others:missing: .*no attribute"),
        ("toys_of_others:misnamed", "'toy' of llm_surgeon.methods is no Method of that name: toys_of_others:misnamed"),
        ("toys_of_others:leftmost", "'toy' of llm_surgeon.methods is no Method of that name: toys_of_others:leftmost"),
    ],
)
def test_a_broken_entry_point_is_told_when_it_is_asked_for(distribution, value, message):
    distribution("toy", value)
    assert PruneConfig(method="wanda").method == "wanda"
    with pytest.raises(InputError, match=message):
        PruneConfig(method="toy")


def test_records_that_cannot_be_are_refused():
    costs = "llm_surgeon.methods.costs:magnitude_costs"
    for options, message in (
        ({"costs": costs, "needs": "everything"}, "unknown needs of method 'toy' 'everything'"),
        ({"costs": costs, "comparison": "rows"}, r"unknown comparison of method 'toy' 'rows' \(do you mean 'row'\?\)"),
        ({"costs": costs, "updates": ("jiont",)}, r"unknown update of method 'toy' 'jiont' \(do you mean 'joint'\?\)"),
        ({"costs": costs, "updates": ("joint",)}, "updates of method 'toy' .* need gradients"),
        ({"costs": costs, "updates": ()}, "updates of method 'toy' must name one"),
        ({}, "method 'toy' must have either costs or a sweep"),
        ({"costs": costs, "sweep": costs}, "method 'toy' must have either costs or a sweep"),
    ):
        with pytest.raises(InputError, match=message):
            Method("toy", **options)
    register(Method("toy", costs=costs))
    register(Method("toy", costs=costs))
    with pytest.raises(InputError, match="a method 'toy' is registered already"):
        register(Method("toy", costs=costs, rows_columns=True))
    with pytest.raises(InputError, match=r"'llm_surgeon\.nowhere:costs' of method 'toy' cannot be imported"):
        Method("toy", costs="llm_surgeon.nowhere:costs").function("costs")
    with pytest.raises(InputError, match=r"'llm_surgeon\.methods' of method 'toy' is neither function nor class"):
        Method("toy", costs="llm_surgeon.methods").function("costs")


def test_functions_of_the_methods_that_come_along_are_there():
    for name in methods.names():
        record = methods.method(name)
        fields = [field for field in ("costs", "line_costs", "sweep") if getattr(record, field) is not None]
        assert fields and all(callable(record.function(field)) for field in fields)
