"""Train the small Llama that ``surgeon demo`` prunes, and cut the text slices that it ships with.

python -m bench.train_demo_model --data wikitext-2.zip --out python/llm_surgeon/demo/assets

The data is a zip archive of WikiText-2 (Merity et al., 2016) holding ``train.txt``, ``valid.txt`` and
``test.txt``. Tokenizer and weights see the train split alone; the valid split picks the epoch whose weights
are kept; the test split is only measured. Takes a few minutes on one data-center GPU.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

END_OF_TEXT = "<|endoftext|>"
SLICE_CHARACTERS = {"train": 300_000, "test": 120_000}
EVALUATION_WINDOWS = (256, 512)
CARD = """\
---
license: cc-by-sa-4.0
language: en
datasets: [Salesforce/wikitext]
pipeline_tag: text-generation
---
# Demo Llama ({parameters:.2f} M parameters)

A small Llama that `surgeon demo` prunes. It is a toy for trying out pruning, not for using what it writes.

- **Data:** the train split of WikiText-2 (Merity et al., "Pointer Sentinel Mixture Models", 2016; text from
  Wikipedia, CC BY-SA). The valid split picked the settings and the checkpoint. The test split was only measured.
- **Model:** {layers} layers, hidden size {hidden}, {heads} heads ({kv_heads} key/value heads), feed-forward
  size {ffn}, tied embeddings, context of {context} tokens. Weights in bfloat16.
- **Tokenizer:** byte-level BPE with {vocab} entries, trained on the same train split.
- **Training:** {steps} steps of {batch} windows of {context} tokens on one {device} with

  ```
  {command}
  ```
- **Licence:** the weights were trained by this project and are released under CC BY-SA 4.0, like the text.

Perplexity per token of the saved weights, computed in float32 over non-overlapping windows (the text's last,
shorter window is dropped; the first token of a window is not predicted). Valid and test have an end-of-text
token before every article, as in training; the slices are the plain text:

| text | {columns} |
|-|{rule}
{rows}
"""


def read_splits(archive: Path) -> dict[str, str]:
    """The text of the train, valid and test splits, wherever in the archive their files lie."""
    splits = {}
    with zipfile.ZipFile(archive) as data:
        for split in ("train", "valid", "test"):
            names = [name for name in data.namelist() if Path(name).name == f"{split}.txt"]
            if len(names) != 1:
                raise SystemExit(f"{archive} holds {len(names)} files called {split}.txt: expected one")
            splits[split] = data.read(names[0]).decode()
    return splits


def cut_slice(text: str, characters: int) -> str:
    """The first paragraphs of ``text`` that fit in ``characters``."""
    return text[: text.rindex("\n", 0, characters) + 1]


def articles(text: str) -> list[str]:
    """Split at the titles, lines like `` = Title = `` between two empty lines."""
    return re.split(r"(?m)(?<=\n \n)^(?= = [^=\n]+ = \n \n)", text)


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """One stream of token ids, int64 ``[tokens]``: the texts in order, each after an end-of-text token."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (tokenizer.bos_token_id, *ids)])


def build_model(vocab_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            intermediate_size=512,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def add_dropout(model: LlamaForCausalLM, p: float) -> None:
    """Dropout on the embeddings and on what every attention and feed-forward block adds to the residual.

    Llama has none of its own, and WikiText-2 is small. Hooks keep it out of the saved model.
    """

    def drop(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return F.dropout(output, p, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def batches(stream: Tensor, length: int, batch_size: int) -> Iterator[Tensor]:
    """Endless shuffled batches ``[batch_size, length]``; every pass cuts the stream at a new offset."""
    while True:
        offset = int(torch.randint(length, ()))
        count = (len(stream) - offset) // length
        windows = stream[offset : offset + count * length].view(count, length)
        for chosen in torch.randperm(count).split(batch_size):
            if len(chosen) == batch_size:
                yield windows[chosen.to(stream.device)]


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    logits = model(windows, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, stream: Tensor, length: int, batch_size: int = 32) -> float:
    """Mean cross-entropy in nats per token over non-overlapping windows, the tail dropped."""
    windows = stream[: len(stream) // length * length].view(-1, length)
    total = sum(next_token_loss(model, batch).item() * len(batch) for batch in windows.split(batch_size))
    return total / len(windows)


def train(
    model: LlamaForCausalLM, streams: dict[str, Tensor], args: argparse.Namespace, steps: int, save_to: Path
) -> None:
    """AdamW with warm-up and cosine decay; ``save_to`` keeps the weights with the lowest valid loss."""
    device = streams["train"].device
    length = model.config.max_position_embeddings
    steps_per_epoch = max(1, len(streams["train"]) // (length * args.batch_size))
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(steps / 50), steps)
    compute_loss = torch.compile(next_token_loss) if device.type == "cuda" else next_token_loss
    best = math.inf
    for step, windows in enumerate(batches(streams["train"], length, args.batch_size), start=1):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = compute_loss(model, windows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % steps_per_epoch == 0 or step == steps:
            model.eval()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                valid = evaluate(model, streams["valid"], length)
            model.train()
            print(f"step {step}/{steps}: train loss {loss.item():.4f}, valid loss {valid:.4f}", flush=True)
            if valid < best:
                best = valid
                copy.deepcopy(model).to(torch.bfloat16).save_pretrained(save_to)
        if step == steps:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="zip archive of WikiText-2")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the text slices")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--steps", type=int, help="train for this many steps instead of --epochs")
    parser.add_argument("--batch-size", type=int, default=32, help="windows per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.monotonic()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = read_splits(args.data)
    folder = args.out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    slices = {split: cut_slice(splits[split], size) for split, size in SLICE_CHARACTERS.items()}
    for split, text in slices.items():
        (args.out / f"wikitext2-{split}-slice.txt").write_bytes(text.encode())

    tokenizer = train_tokenizer(splits["train"], args.vocab_size)
    tokenizer.save_pretrained(folder)
    streams = {name: tokenize(tokenizer, articles(text)).to(device) for name, text in splits.items()}
    print({name: len(stream) for name, stream in streams.items()}, "tokens")

    model = build_model(args.vocab_size).to(device)
    length = model.config.max_position_embeddings
    steps = args.steps or args.epochs * (len(streams["train"]) // (length * args.batch_size))
    add_dropout(model, args.dropout)
    train(model.train(), streams, args, steps, folder)

    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    measured = {
        "train slice": torch.tensor(tokenizer(slices["train"])["input_ids"]),
        "valid": streams["valid"],
        "test": streams["test"],
        "test slice": torch.tensor(tokenizer(slices["test"])["input_ids"]),
    }
    rows = []
    for name, stream in measured.items():
        losses = {window: evaluate(saved, stream.to(device), window) for window in EVALUATION_WINDOWS}
        for window, loss in losses.items():
            print(f"{name}, windows of {window}: loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
        rows.append(f"| {name} | " + " | ".join(f"{math.exp(loss):.2f}" for loss in losses.values()) + " |")

    config = saved.config
    command = "python -m bench.train_demo_model --data wikitext-2.zip --out python/llm_surgeon/demo/assets"
    for option, value in vars(args).items():
        if option not in ("data", "out") and value != parser.get_default(option):
            command += f" --{option.replace('_', '-')} {value}"
    card = CARD.format(
        parameters=saved.num_parameters() / 1e6,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        ffn=config.intermediate_size,
        context=length,
        vocab=config.vocab_size,
        steps=steps,
        batch=args.batch_size,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        command=command,
        columns=" | ".join(f"windows of {window}" for window in EVALUATION_WINDOWS),
        rule="-|" * len(EVALUATION_WINDOWS),
        rows="\n".join(rows),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
