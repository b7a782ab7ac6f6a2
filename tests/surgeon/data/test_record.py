"""The record of the text that windows were drawn from."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch

from llm_surgeon.data.calibration import calibration_windows
from llm_surgeon.data.documents import read_documents
from llm_surgeon.data.record import data_record
from llm_surgeon.data.tokens import token_stream, tokenize
from tests.surgeon.checkpoints import tokenizer_of_words


def test_what_windows_were_drawn_from_is_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"id": str(i), "messages": [{"role": "user", "content": f"w{i} w2"}]} for i in range(1, 31)]
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = tokenizer_of_words()
    tokenizer.chat_template = "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}"
    documents = read_documents(path, "calibration")
    text = documents.text(tokenizer)
    assert text == "".join(f"<s> w{i} w2 " for i in range(1, 31))
    with caplog.at_level(logging.INFO, "llm_surgeon"):
        ids, digest = token_stream(documents, tokenizer)
        windows = calibration_windows(ids, 3, 5, 0).input_ids
        record = data_record(documents, tokenizer, digest, ids, windows)
    assert caplog.messages == [f"{str(path)!r} is read by its field 'messages', conversations by the chat template"]
    assert torch.equal(ids, tokenize(text, tokenizer)) and len(ids) == 90  # one BOS in front, the template's
    assert (record.source, record.split, record.field) == (str(path), "calibration", "messages")
    assert record.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert (record.tokens, record.windows, record.distinct_windows, record.seqlen) == (90, 3, 3, 5)
    assert record.rendering == "chat template"
    tokenizer.chat_template = None
    caplog.clear()
    with caplog.at_level(logging.INFO, "llm_surgeon"):
        ids, digest = token_stream(documents, tokenizer)
        windows = calibration_windows(ids, 64, 80, 0).input_ids
        record = data_record(documents, tokenizer, digest, ids, windows)
    assert record.rendering == "plain" and record.tokens == 91
    assert "conversations as 'User: …' paragraphs, for the tokenizer has no chat template" in caplog.messages[0]
    distinct = len({tuple(row) for row in windows.tolist()})
    assert caplog.messages[1] == (
        f"64 windows of 80 tokens are drawn from the 91 tokens of {str(path)!r}: "
        f"{distinct} distinct windows, pass more text"
    )
    assert record.distinct_windows == distinct == 91 - 80 + 1  # every place there is
    assert data_record(documents, tokenizer, digest, ids, windows, passes=57).tokens == 91
    assert len(caplog.messages) == 2  # 64 × 80 tokens are 56.3 times 91
