"""Token ids of text are those of the whole, piece by piece."""

from __future__ import annotations

import random
from functools import cache
from importlib.resources import files
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import llm_surgeon.data.tokens
from llm_surgeon.data.tokens import tokenize

SLICE = (files("llm_surgeon.demo") / "assets" / "wikitext2-train-slice.txt").read_text(encoding="utf-8")


def word_tokenizer(bos: str | None) -> PreTrainedTokenizerFast:
    """Words a..e are 1..5; BOS is 0 and is also put in front by the tokenizer itself."""
    vocabulary = {"<s>": 0, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "<unk>": 6}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, model_max_length=4)


def test_tokenize_puts_one_bos_in_front(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tokenize("a b c d e a", word_tokenizer("<s>"))  # longer than model_max_length
    assert ids.dtype == torch.int64
    assert ids.tolist() == [0, 1, 2, 3, 4, 5, 1]
    assert not caplog.records and not capsys.readouterr().err


def test_tokenize_without_a_bos_token() -> None:
    assert tokenize("b a", word_tokenizer(None)).tolist() == [2, 1]
    assert tokenize("", word_tokenizer(None)).tolist() == []


def test_a_bos_that_is_there_already_is_the_only_one() -> None:
    assert tokenize("<s> a b", word_tokenizer("<s>")).tolist() == [0, 1, 2]


# What tokenizers differ in: what stands before a text, how it is normalised, where words begin.
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPACES = normalizers.Replace(" ", "▁")
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def trained_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Of the pipeline of a known family, with a small vocabulary of its own."""
    special, alphabet = ["<unk>", "<s>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    bpe: dict[str, Any] = {"vocab_size": 1000, "show_progress": False}
    lines: Any = SLICE[:30_000].splitlines()
    if kind in ("gpt2", "prefix-space", "llama3"):
        backend, trainer = (
            Tokenizer(models.BPE()),
            trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, **bpe),
        )
        backend.pre_tokenizer = _BYTES if kind == "gpt2" else pre_tokenizers.ByteLevel(add_prefix_space=True)
        if kind == "llama3":
            split = pre_tokenizers.Split(Regex(_LLAMA3), "isolated")
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )
    elif kind in ("llama2", "gemma"):  # merges over the whole text, in which no word is set apart
        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        trainer = trainers.BpeTrainer(special_tokens=special + _BYTE_TOKENS, max_token_length=12, **bpe)
        prefix = [normalizers.Prepend("▁")] if kind == "llama2" else []
        backend.normalizer = normalizers.Sequence([*prefix, _SPACES])
        lines = [f" {word}" for word in SLICE[:30_000].split()]
    elif kind in ("t5", "unigram"):
        backend = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            special_tokens=special, unk_token="<unk>", vocab_size=600, show_progress=False
        )
        spaces, strip = normalizers.Replace(Regex(" {2,}"), "▁"), normalizers.Strip(left=False, right=True)
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), strip, spaces])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        if kind == "unigram":
            backend.normalizer = normalizers.NFC()
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend, trainer = (
            Tokenizer(models.WordPiece(unk_token="<unk>")),
            trainers.WordPieceTrainer(special_tokens=special, **bpe),
        )
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def adversarial_text(seed: int, words: int) -> str:
    """Words among white space, scripts, numbers, marks and special tokens that tokenizers treat in their own ways."""
    draw = random.Random(seed)
    odd = ["  ", "\n", "\n\n", "\r\n", "\t", "   \n ", "1234567890123", "'s", "don't", "é", "e\u0301", "\u0301", "ﬁ"]
    odd += [
        "你好世界",
        "。",
        "🙂",
        "👨\u200d👩",
        "<s>",
        "<|im_end|>",
        "<|im_end|>\n",
        "\u2028",
        "\u00a0",
        "\u3000",
        "▁",
    ]
    odd += ["▁", "▁▁", " ▁", "\x00", "\ufeff", "a" * 27, "...", "?!", "---", "\u0e01\u0e33", "\u1112\u1161", "a" * 200]
    usual = SLICE[:20_000].split()
    parts = [
        draw.choice(odd) if draw.random() < 0.25 else draw.choice(("", " ", " ")) + draw.choice(usual)
        for _ in range(words)
    ]
    return "".join(parts)


@pytest.mark.parametrize("kind", ["gpt2", "prefix-space", "llama3", "llama2", "gemma", "t5", "unigram", "wordpiece"])
def test_pieces_give_the_ids_of_the_whole_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained_tokenizer(kind)
    for text in (*(adversarial_text(seed, 1200) for seed in range(4)), SLICE[100_000:106_000], "word " * 1600):
        whole = llm_surgeon.data.tokens._encode(text, tokenizer)
        for piece, context in ((300, 96), (1500, 400)):
            monkeypatch.setattr(llm_surgeon.data.tokens, "_PIECE", piece)
            monkeypatch.setattr(llm_surgeon.data.tokens, "_CONTEXT", context)
            pieces = llm_surgeon.data.tokens._pieces(text, tokenizer)
            if pieces is not None:
                assert len(pieces) > 2
                assert torch.equal(torch.cat(pieces), whole)
            ids = tokenize(text, tokenizer)
            assert torch.equal(ids[-len(whole) :], whole.long()) and ids[0] == tokenizer.bos_token_id
    # The last is as regular as can be; but this tokenizer has tokens of several words.
    assert pieces is not None and (len(pieces) > 5 or kind == "unigram")


def test_a_text_without_places_to_cut_is_tokenized_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_surgeon.data.tokens, "_PIECE", 100)
    monkeypatch.setattr(llm_surgeon.data.tokens, "_CONTEXT", 50)
    tokenizer = trained_tokenizer("gpt2")
    for text in ("ACGT" * 500, "你好世界" * 300, "\n" * 500, "a" * 130 + " " + "b" * 400):
        assert torch.equal(tokenize(text, tokenizer)[1:], llm_surgeon.data.tokens._encode(text, tokenizer).long())


def test_pieces_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, lengths = trained_tokenizer("gpt2"), []
    encode = llm_surgeon.data.tokens._encode
    monkeypatch.setattr(
        llm_surgeon.data.tokens, "_encode", lambda text, of: lengths.append(len(text)) or encode(text, of)
    )
    ids = tokenize(SLICE[:400_000], tokenizer)
    assert max(lengths) < 2**16 + 2**12 and len(lengths) > 5 and sum(lengths) < 1.1 * len(SLICE[:400_000])
    assert torch.equal(ids[1:], encode(SLICE[:400_000], tokenizer).long())
