"""Commands whose standard streams are closed, full, gone or of few letters."""

import io
import os
import subprocess
import sys

import pytest

from llm_surgeon.cli import main
from llm_surgeon.cli.streams import lasting_streams
from tests.surgeon.cli.test_cli import MODEL, SMALL, surgeon


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        self.write("")


@pytest.mark.parametrize("stderr", [None, Full()], ids=["closed", "full"])
def test_a_stderr_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    assert surgeon("prune", MODEL, tmp_path / "out", *SMALL[:-1], "--method", "magnitude") == 0
    assert sys.stderr is stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert surgeon("prune", tmp_path / "none", tmp_path / "out2", *SMALL) == 2


def test_letters_that_stdout_lacks_are_escaped(tmp_path, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert surgeon("prune", MODEL, tmp_path / "out", *SMALL[:-1], "--method", "magnitude") == 0
    stdout.flush()
    text = stdout.buffer.getvalue().decode()
    assert "written to" in text.replace("\n", "") and "\\u2192" in text


def test_a_stdout_that_is_full_is_one_sentence_after_the_model_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Full())
    assert surgeon("prune", MODEL, tmp_path / "out", *SMALL[:-1], "--method", "magnitude") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "surgeon: a file or standard output cannot be read or written: No space left on device"
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors of POSIX")
def test_files_do_not_get_the_numbers_of_closed_streams(tmp_path):
    code = (
        "import os, sys\n"
        "from llm_surgeon.cli.streams import lasting_streams\n"
        f"with lasting_streams(), open({str(tmp_path / 'file')!r}, 'w') as file:\n"
        "    os.write(2, b'of a library'); print('nobody'); print('nobody', file=sys.stderr)\n"
        "    file.write(str(file.fileno()))\n"
    )
    shell = f'exec "{sys.executable}" -c "$CODE" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", shell], env={**os.environ, "CODE": code}).returncode == 0
    number = (tmp_path / "file").read_text()
    assert int(number) > 2


def test_streams_are_put_back():
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit):
        main(["--version"])
    assert (sys.stdout, sys.stderr) == before
    with lasting_streams():
        assert sys.stderr.isatty() == before[1].isatty()
    assert (sys.stdout, sys.stderr) == before
