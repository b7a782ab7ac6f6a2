import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_surgeon import prune_checkpoint
from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.errors import InputError
from llm_surgeon.jobs.recover import _split, recover_checkpoint, recovery_text
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.recovery.recover import RecoveryReport
from llm_surgeon.report.schema import PruneReport
from tests.surgeon.checkpoints import save_folder, tree
from tests.surgeon.half_zero import OPTIONS
from tests.surgeon.tiny_models import VOCABULARY, build


def test_checkpoint(folders):
    source, out, data = folders
    before = tree(source)
    report = recover_checkpoint(source, out, data=data, device="cpu", seqlen=16, learning_rate=1e-2, **OPTIONS)
    assert report.loss_after < report.loss_before
    assert tree(source) == before
    assert not list(out.parent.glob(".out*"))
    (history,) = PruneReport.read(out / "surgeon_report.json").history
    assert history.startswith(
        "After pruning low-rank corrections were trained and merged for 12 steps on 768 tokens of"
    )
    title, section = (out / "README.md").read_text().split("## Recovered\n\n")
    assert title.endswith("# A model\n\n") and " ".join(section.split()) == history + " Pruned."
    assert f"{math.exp(report.loss_before):.2f} before the recovery, {math.exp(report.loss_after):.2f} after" in history
    assert json.loads((out / "surgeon_recovery.json").read_text())["zeros"] == report.zeros
    record = json.loads((out / "surgeon_recovery.json").read_text())["data"]["training"]
    assert record["sha256"] == hashlib.sha256(Path(data).read_bytes()).hexdigest()
    assert (record["source"], record["split"], record["seqlen"], record["field"]) == (data, "calibration", 16, None)
    assert record["tokens"] == len(Path(data).read_text().split()) + 1  # a BOS in front
    pruned, recovered = (find_decoder(AutoModelForCausalLM.from_pretrained(path)).linears for path in (source, out))
    for old, new in zip(pruned, recovered, strict=True):
        assert torch.equal(old.module.weight == 0, new.module.weight == 0)
        assert not torch.equal(old.module.weight, new.module.weight)


def test_a_recovery_that_is_refused_leaves_nothing(folders):
    source, out, data = folders
    smaller = build("llama")
    smaller.resize_token_embeddings(VOCABULARY - 8)
    options = {"data": data, "device": "cpu", "seqlen": 16, **OPTIONS}
    before = tree(source.parent)
    teacher = save_folder(source.with_name("other"), smaller)
    with pytest.raises(InputError, match="vocabulary"):
        recover_checkpoint(source, out, teacher=teacher, **options)
    shutil.rmtree(teacher)
    assert tree(source.parent) == before


def test_a_model_made_smaller_is_recovered_with_its_code(folders):
    """Coupled groups give layers of different widths; the code that loads them goes along."""
    source, out, data = folders
    save_folder(source, build("llama"))
    small = out.with_name("small")
    prune_checkpoint(
        source, small, structure="groups", sparsity=0.3, shots=1, calibration=data, samples=8, seqlen=16, device="cpu"
    )
    options = {"data": data, "device": "cpu", "seqlen": 16, "learning_rate": 1e-2, **OPTIONS}
    report = recover_checkpoint(small, out, teacher=source, trust_remote_code=True, **options)
    assert report.loss_after < report.loss_before
    before, after = (AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True) for path in (small, out))
    assert [p.shape for p in after.parameters()] == [p.shape for p in before.parameters()]
    assert sum(p.numel() for p in after.parameters()) < sum(p.numel() for p in build("llama").parameters())


def test_training_sees_nothing_of_what_is_held_out() -> None:
    windows, held_out = _split(torch.arange(200), RecoverConfig(seqlen=16, steps=500, batch_size=8))
    assert windows.shape == (4000, 16) and held_out.tolist() == [list(range(184, 200))]
    assert int(windows.min()) == 0 and int(windows.max()) == 183
    with pytest.raises(InputError, match="the text has 31 tokens: training and held-out data need 32"):
        _split(torch.arange(31), RecoverConfig(seqlen=16))


def test_a_teacher_with_another_tokenizer_is_refused(folders):
    source, out, data = folders
    other = save_folder(source.with_name("other"), build("llama"))
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"] |= {"w2": 3, "w3": 2}
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(InputError, match="other' has another tokenizer than the model"):
        recover_checkpoint(source, out, teacher=other, data=data, device="cpu", seqlen=16, **OPTIONS)
    assert not out.exists()


def test_a_recovery_is_told_with_its_losses(tmp_path):
    config, teacher = RecoverConfig(method="full"), str(tmp_path / "dense")
    report = RecoveryReport({}, {}, 2_000, 200, 819_200, 3.7206, 3.3026, [], 1.0)
    text = recovery_text(config, report, "wikitext2", teacher)
    assert text == (
        "After pruning all weights were trained for 200 steps on 819,200 tokens of `wikitext2`, distilling from "
        "`dense`; all 2,000 zeros stayed. Perplexity on held-out text of the same source: 41.29 before the recovery, "
        "27.18 after it. Other figures are of the model before that."
    )
