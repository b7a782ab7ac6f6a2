"""A structure that is registered from outside: a record and a small class prune a model."""

from contextlib import nullcontext

import pytest
import torch

from llm_surgeon import InputError, PruneConfig, prune, prune_checkpoint
from llm_surgeon.checkpoint.states import State
from llm_surgeon.config import structure as registry
from llm_surgeon.methods.select import Selection
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.report.render import describe_structure
from llm_surgeon.shots.run import Shots
from llm_surgeon.structures import Structure, register
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.tiny_models import VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))


class ColumnShots:
    """Removes the columns of least norm from every linear."""

    def __init__(self, run):
        self.run, self.selections, self.finished = run, [], False

    def removal(self):
        return "columns"

    def begin(self, resources):
        self.selections = [self._selection(linear, 0) for linear in self.run.decoder.linears]

    def pruned(self):
        return nullcontext()

    def measure(self, shot):
        return self.run.loss()

    def select(self, shot):
        self.selections = [
            self._selection(linear, round(shot.report.target_sparsity * linear.columns))
            for linear in self.run.decoder.linears
        ]

    def update(self, shot):
        for linear, selection in zip(self.run.decoder.linears, self.selections, strict=True):
            linear.write(linear.matrix().masked_fill(selection.with_bias(linear.columns + linear.has_bias), 0.0))

    def state(self):
        return State(self.run.weights(), {})

    def finish(self):
        self.finished = True

    @staticmethod
    def _selection(linear, count):
        norms = linear.matrix()[:, : linear.columns].norm(dim=0)
        columns = torch.zeros(linear.columns, dtype=torch.bool)
        columns[norms.argsort(stable=True)[:count]] = True
        return Selection.of_rows_columns(torch.zeros(linear.rows, dtype=torch.bool), columns)


COLUMNS = Structure("columns", f"{__name__}:ColumnShots", "whole columns", default_sparsity=0.25, updates=("none",))


@pytest.fixture
def columns(monkeypatch):
    """The structure of that name, for one test."""
    monkeypatch.setattr(registry._structures, "records", dict(registry._structures.records))
    register(COLUMNS)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_structure_from_outside_prunes_a_model(columns, name):
    model = build(name)
    before = {linear.name: linear.matrix() for linear in find_decoder(model).linears}
    report = prune(model, TOKENS, structure="columns", sparsity=0.25, update="none", shots=2)
    for linear in find_decoder(model).linears:
        old, new = (matrix[:, : linear.columns] for matrix in (before[linear.name], linear.matrix()))
        norms, gone = old.norm(dim=0), (new == 0.0).all(dim=0)
        assert int(gone.sum()) == round(0.25 * linear.columns)
        assert float(norms[gone].max()) <= float(norms[~gone].min())
        assert torch.equal(
            linear.matrix()[:, : linear.columns][:, ~gone], before[linear.name][:, : linear.columns][:, ~gone]
        )
    assert [shot.target_sparsity for shot in report.shots] == [0.125, 0.25]
    assert report.shots[-1].sparsity == report.sparsity == pytest.approx(0.25)
    assert report.shots[0].measured_increase == report.shots[1].loss_before - report.shots[0].loss_before
    assert list(report.shots[0].seconds) == ["curvature", "selection", "update"]


def test_a_structure_from_outside_prunes_a_checkpoint(columns, tmp_path):
    (tmp_path / "text.txt").write_text("w2 w3 w4 w5 " * 40)
    source = save_folder(tmp_path / "model", build("llama"))
    options = {"structure": "columns", "sparsity": 0.25, "update": "none", "shots": 1, "samples": 2, "seqlen": 8}
    report = prune_checkpoint(source, tmp_path / "out", calibration=str(tmp_path / "text.txt"), **options)
    assert report.config["structure"] == "columns" and report.sparsity == pytest.approx(0.25)
    assert "whole columns" in (tmp_path / "out" / "README.md").read_text()
    assert describe_structure("columns") == "whole columns"


def test_a_structure_comes_from_an_entry_point(monkeypatch, tmp_path):
    monkeypatch.setattr(registry._structures, "records", dict(registry._structures.records))
    information = tmp_path / "columns-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: columns\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[llm_surgeon.structures]\ncolumns = {__name__}:COLUMNS\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "columns" in registry.names() and "columns" not in registry._structures.records
    report = prune(build("llama"), TOKENS, structure="columns", update="none", shots=1)
    assert report.sparsity == pytest.approx(0.25) and Structure.parse("columns") is COLUMNS


def test_names_are_told_apart_and_meant(columns):
    register(COLUMNS)
    with pytest.raises(InputError, match=r"unknown structure 'colums' \(do you mean 'columns'\?\)"):
        PruneConfig(structure="colums")
    with pytest.raises(InputError, match="a structure 'groups' is registered already"):
        register(Structure("groups", ColumnShots))
    with pytest.raises(InputError, match=r"option of structure 'other' 'roundto' \(do you mean 'round_to'\?\)"):
        Structure("other", ColumnShots, options=frozenset({"roundto"}))
    assert "columns" in registry.names()


def test_a_class_that_cannot_be_imported_is_named():
    with pytest.raises(InputError, match=r"nowhere:Shots' of structure 'other' cannot be imported: No module named"):
        Structure("other", "llm_surgeon.nowhere:Shots").shot_class  # noqa: B018


@pytest.mark.parametrize("name", registry.names())
def test_every_record_names_what_there_is(name):
    structure = Structure.parse(name)
    members = [member for member in vars(Shots) if not member.startswith("_")]
    assert len(members) == 9 and structure.title
    assert all(callable(getattr(structure.shot_class, member)) for member in members)
    assert structure.default_shots(0.3) == {"rows-columns": 24, "layers": 1}.get(name, 5)
    assert Structure.parse("2:4").shot_class is Structure.parse("unstructured").shot_class
