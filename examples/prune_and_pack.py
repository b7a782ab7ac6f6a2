"""Prune a model to 2:4, pack it, and let the packed one go on with a text.

python examples/prune_and_pack.py --model MODEL --text train.txt
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_surgeon

ASSETS = Path(llm_surgeon.__file__).parent / "demo" / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "model"), help="folder or id on the hub")
    parser.add_argument("--text", type=Path, default=ASSETS / "wikitext2-train-slice.txt", help="to calibrate on")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--out", default="packed")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    windows = ids[: options.samples * options.seqlen].view(options.samples, options.seqlen)

    print(llm_surgeon.prune(model, windows, structure="2:4").summary())
    llm_surgeon.pack_model(model)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)

    packed = AutoModelForCausalLM.from_pretrained(options.out).to(device)
    prompt = tokenizer("The town of", return_tensors="pt").to(device)
    print(tokenizer.decode(packed.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))


if __name__ == "__main__":
    main()
