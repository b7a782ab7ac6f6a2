"""Folders that a checkpoint may be written to: some are refused, and nothing that is not ours is deleted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_surgeon import InputError, pack_checkpoint, prune_checkpoint
from llm_surgeon.checkpoint import check_output, checkpoint_bytes, claimed_output, save_checkpoint
from llm_surgeon.cli import main
from llm_surgeon.demo import run_demo
from llm_surgeon.jobs.compact import compact_checkpoint
from llm_surgeon.jobs.recover import recover_checkpoint
from tests.surgeon.checkpoints import edit_json, save_folder, tokenizer_of_words, tree
from tests.surgeon.tiny_models import build

ROOT = Path(__file__).parents[3]


def model_folder(path: Path, content: str = "weights") -> Path:
    """Files that :func:`check_output` takes for a model."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_text(content)
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


def test_output_may_be_new_or_empty(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "a" / "b", tmp_path / "empty"):
        check_output(out, overwrite=False, model=source)
        check_output(str(out), overwrite=False, model="some/model", calibration="wikitext2", lora_data=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model"]


@pytest.mark.parametrize(
    "files",
    [
        ["thesis.tex"],
        [".git/HEAD", ".git/objects/00/1"],
        ["src/main.js", "package.json"],
        ["model.safetensors.bak"],
        ["pytorch_model.bin"],
        ["notes.txt"],
        ["modeling_mine.py"],
        ["additional_chat_templates/tool.jinja", "additional_chat_templates/poem.md"],
        ["additional_chat_templates/more/tool.jinja"],
        ["1155.safetensors/precious"],
    ],
)
def test_what_is_no_part_of_a_model_is_never_deleted(files: list[str], tmp_path: Path) -> None:
    out = save_folder(tmp_path / "out", build("llama"))
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    before = tree(tmp_path)
    first = files[-1] if files[0].startswith("additional") else files[0].split("/")[0]
    if first.startswith("additional_chat_templates/more"):
        first = "additional_chat_templates/more"
    with pytest.raises(InputError, match="holds what is no part of a model and would be deleted") as caught:
        check_output(out, overwrite=True)
    assert repr(first) in str(caught.value)
    with pytest.raises(InputError, match="no part of a model"):
        save_checkpoint(build("opt"), tokenizer_of_words(), out, dtype=torch.float32, extra_files={}, overwrite=True)
    assert tree(tmp_path) == before


def test_everything_that_a_model_folder_holds_may_be_replaced(tmp_path: Path) -> None:
    out = save_folder(tmp_path / "out", build("llama"), max_shard_size="20KB")
    (out / "additional_chat_templates").mkdir()
    names = (
        "README.md",
        "LICENSE", "LICENSE.txt", "USE_POLICY.md", "NOTICE", ".gitattributes", "generation_config.json",
        "vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
        "cl100k.tiktoken",
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja", "surgeon_report.json", "surgeon_recovery.json", "report.html",
        "modeling_pruned.py", "modeling_mine.py", "layers_of_mine.py",
    )  # fmt: skip
    for name in names:
        (out / name).write_text("x")
    edit_json(out / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine", "AutoConfig": 3})
    (out / "modeling_mine.py").write_text("from .layers_of_mine import Layer\n")
    check_output(out, overwrite=True)
    edit_json(out / "config.json", auto_map=None)
    with pytest.raises(InputError, match=r"deleted: 'layers_of_mine\.py', 'modeling_mine\.py'; choose"):
        check_output(out, overwrite=True)


@pytest.mark.parametrize("left", [["config.json"], ["config.json", "README.md"], ["model.safetensors"], ["README.md"]])
def test_a_folder_without_configuration_or_weights_is_no_model(left: list[str], tmp_path: Path) -> None:
    for name in left:
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(InputError, match="holds something other than a model"):
        check_output(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("out", ["model", "model/inside/deep", ".", "link", "link/inside", "model/../model"])
@pytest.mark.parametrize("kind", ["model", "teacher"])
def test_output_must_not_overlap_a_model(out: str, kind: str, tmp_path: Path) -> None:
    source = model_folder(tmp_path / "here" / "model")
    (tmp_path / "here" / "link").symlink_to(source)
    with pytest.raises(InputError, match=f"overlaps the {kind}"):
        check_output(tmp_path / "here" / out, overwrite=True, **{kind: source})
    with pytest.raises(InputError, match=f"overlaps the {kind}"):
        check_output(source, overwrite=True, **{kind: tmp_path / "here" / "link"})


@pytest.mark.parametrize("kind", ["calibration", "lora_data", "data", "config_file"])
def test_output_must_not_hold_any_input(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = model_folder(tmp_path / "out")
    (out / "vocab.txt").write_text("to calibrate on")
    (tmp_path / "link.txt").symlink_to(out / "vocab.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (out / "vocab.txt", tmp_path / "link.txt", "~/out/vocab.txt"):
        with pytest.raises(InputError, match=f"overlaps the {kind.replace('_', ' ')} '"):
            check_output(out, overwrite=True, **{kind: given})
        with pytest.raises(InputError, match="overlaps"):
            check_output(given, overwrite=True, **{kind: given})
    check_output(tmp_path / "beside", overwrite=True, **{kind: out / "vocab.txt"})


def test_output_must_not_hold_what_links_in_the_model_s_folder_lead_to(tmp_path: Path) -> None:
    out = model_folder(tmp_path / "out")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").symlink_to(out / "model.safetensors")
    with pytest.raises(InputError, match="overlaps the model"):
        check_output(out, overwrite=True, model=tmp_path / "model")


def test_what_an_interrupted_run_left_is_no_input(tmp_path: Path) -> None:
    for name in (".out.previous-00ff00ff", ".out.partial-00ff00ff"):
        source = model_folder(tmp_path / name)
        with (
            pytest.raises(InputError, match=r"is what an interrupted run left of .*: rename it first"),
            claimed_output(tmp_path / "out", False, model=source),
        ):
            pass
        assert source.is_dir()


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A model to read, ``in``, one to overwrite, ``out``, and text beside them."""
    model = build("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[:40] = 0.0  # for compact
    save_folder(tmp_path / "in", model)
    save_folder(tmp_path / "out", build("llama"))
    (tmp_path / "words.txt").write_text(" ".join(f"w{i % 61 + 1}" for i in range(2000)))
    return tmp_path


def run_verb(verb: str, folders: Path, **inputs: Any) -> None:
    source, out, text = folders / "in", folders / "out", str(folders / "words.txt")
    if verb == "prune":
        options = {"calibration": text, "method": "magnitude", "samples": 2, "seqlen": 16} | inputs
        prune_checkpoint(source, out, overwrite=True, **options)
    elif verb == "recover":
        options = {"data": text, "steps": 1, "seqlen": 16, "batch_size": 2} | inputs
        recover_checkpoint(source, out, overwrite=True, **options)
    elif verb == "pack":
        pack_checkpoint(source, out, overwrite=True)
    elif verb == "compact":
        compact_checkpoint(source, out, overwrite=True)
    else:
        run_demo(out, overwrite=True)


@pytest.mark.parametrize(
    ("verb", "kind", "options"),
    [
        ("prune", "calibration", {}),
        ("prune", "lora_data", {"lora_rank": 2}),
        ("recover", "data", {}),
        ("recover", "teacher", {}),
    ],
)
def test_no_verb_deletes_what_it_reads(verb: str, kind: str, options: dict[str, Any], folders: Path) -> None:
    given = folders / "out" if kind == "teacher" else folders / "out" / "vocab.txt"
    if kind != "teacher":
        shutil.copy(folders / "words.txt", given)
    before = tree(folders)
    with pytest.raises(InputError, match=f"overlaps the {kind.replace('_', ' ')}"):
        run_verb(verb, folders, **{kind: str(given)}, **options)
    assert tree(folders) == before


def test_the_config_file_is_not_deleted(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folders / "out" / "vocab.json"  # YAML as well
    config.write_text("{method: magnitude, overwrite: true}")
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as exit:
            main(["prune", str(folders / "in"), str(folders / "out"), "--config", str(config), *more])
        assert exit.value.code == 2
        assert "overlaps the config file" in capsys.readouterr().err
    assert config.is_file()


@pytest.mark.parametrize("verb", ["prune", "recover", "pack", "compact", "demo"])
def test_every_verb_asks_for_the_disk_that_it_needs(verb: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(folders)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(InputError, match=r"about .*B of disk are needed for .*out' and 10 kB are available"):
        run_verb(verb, folders)
    assert tree(folders) == before


def test_a_small_model_fits_a_small_disk(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000))
    run_verb("prune", folders)
    assert (folders / "out" / "surgeon_report.json").is_file()


def test_a_card_or_report_that_is_no_text_loses_no_work(folders: Path) -> None:
    latin = "Über".encode("latin-1")
    (folders / "in" / "README.md").write_bytes(latin)
    for verb in ("recover", "compact"):
        run_verb(verb, folders)
        assert "\ufffdber" in (folders / "out" / "README.md").read_text(encoding="utf-8")
    (folders / "in" / "surgeon_report.json").write_bytes(latin)
    before = tree(folders)
    for verb in ("recover", "compact", "pack"):
        with pytest.raises(InputError, match=r"surgeon_report\.json' cannot be read"):
            run_verb(verb, folders)
    assert tree(folders) == before


def test_outputs_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model_folder(tmp_path / "model")
    other = shutil.copytree(source, tmp_path / "other")
    with pytest.raises(InputError, match=r"is not empty: .* pass --overwrite"):
        check_output(other, overwrite=False, model=source)
    check_output(other, overwrite=True, model=source)
    with pytest.raises(InputError, match="overwrite must be true or false, not 'no'"):
        check_output(other, overwrite="no", model=source)  # type: ignore[arg-type]
    file = source / "config.json"
    with pytest.raises(InputError, match="is a file"):
        check_output(file, overwrite=True)
    with pytest.raises(InputError, match="not a writable folder"):
        check_output(file / "below", overwrite=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match=f"'{tmp_path}' is not a writable folder"):
        check_output(tmp_path / "a" / "b", overwrite=False)
    monkeypatch.undo()
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(InputError, match="is a mount point"):
        check_output(tmp_path / "a", overwrite=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="another user is another process")
def test_folders_that_this_user_may_not_write_in_are_refused(tmp_path: Path) -> None:
    """Not a pretence: permissions of folders, as a user who is not root."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    model_folder(tmp_path / "closed" / "out")
    (tmp_path / "closed").chmod(0o555)
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            for name in ("closed/out", "closed/new", "closed/new/deep"):
                try:
                    with claimed_output(tmp_path / name, True):
                        pass
                except InputError as error:
                    os.write(write, f"{error}\n".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    lines = os.read(read, 10_000).decode().splitlines()
    os.close(read)
    (tmp_path / "closed").chmod(0o755)
    assert len(lines) == 3 and all("closed' is not a writable folder" in line for line in lines), lines
    assert [path.name for path in (tmp_path / "closed").iterdir()] == ["out"]


@pytest.mark.parametrize("out", [".", "..", "../..", "inside/.."])
def test_the_current_folder_is_not_replaced(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(InputError, match="is or holds the current folder"):
        check_output(out, overwrite=False)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(InputError, match=r"cannot be written: .*No such file"):
        check_output(out, overwrite=False)
    check_output(tmp_path / "out", overwrite=False)


def test_names_that_cannot_be_written(tmp_path: Path) -> None:
    limit = os.pathconf(tmp_path, "PC_NAME_MAX")
    fits = "x" * (limit - len(".") - len(".previous-00000000"))
    check_output(tmp_path / fits, overwrite=False)
    save_checkpoint(build("llama"), tokenizer_of_words(), tmp_path / fits, dtype=torch.float32, extra_files={})
    for name in (fits + "x", "é" * (limit // 2), "x" * 300, "x" * 300 + "/out", "/".join(["x" * 200] * 21)):
        with pytest.raises(InputError, match="its name is too long"):
            check_output(tmp_path / name, overwrite=True)
    with pytest.raises(InputError, match="not valid UTF-8"):
        check_output(tmp_path / os.fsdecode(b"\xff"), overwrite=False)
    with pytest.raises(InputError, match=r"model .* cannot be used: its path is not valid UTF-8"):
        check_output(tmp_path / "out", overwrite=False, model=os.fsdecode(b"m\xff"))
    with pytest.raises(InputError, match="null"):
        check_output("a\0b", overwrite=False)


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    for out in ("dangling", "dangling/out", "one", "two", "one/out"):
        with pytest.raises(InputError, match="is a link that leads nowhere"):
            check_output(tmp_path / out, overwrite=True)
    assert not (tmp_path / "missing").exists()


def test_a_home_folder_in_quotes_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_checkpoint(build("llama"), tokenizer_of_words(), "~/out", dtype=torch.float32, extra_files={})
    assert (tmp_path / "out" / "config.json").is_file() and not Path("~").exists()


def test_the_disk_that_a_checkpoint_takes_is_that_of_its_files(tmp_path: Path) -> None:
    model, tokenizer = build("opt"), tokenizer_of_words()
    numbers = sum(parameter.numel() for parameter in model.parameters())  # the head is tied
    half, own = (checkpoint_bytes(model, tokenizer, dtype) for dtype in (torch.bfloat16, None))
    assert own - half == 2 * numbers
    save_checkpoint(
        model, tokenizer, tmp_path / "out", dtype=torch.bfloat16, extra_files={"report.html": "x" * 500_000}
    )
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert written < half < written + 2_000_000
