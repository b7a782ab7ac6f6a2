import pytest

from tests.surgeon.checkpoints import save_folder
from tests.surgeon.half_zero import half_zero, text_windows
from tests.surgeon.reports import surgeon_report


@pytest.fixture
def folders(tmp_path):
    """A pruned checkpoint with its records, an output beside it, and a text to train it on."""
    source = save_folder(tmp_path / "pruned", half_zero("llama"))
    (source / "surgeon_report.json").write_text(surgeon_report().to_json())
    (source / "README.md").write_text("# A model\n\nPruned.\n")
    words = " ".join(f"w{int(token)}" for token in text_windows(400).flatten())
    (tmp_path / "text.txt").write_text(words)
    return source, tmp_path / "out", str(tmp_path / "text.txt")
