"""Remove heads and neurons from a model, then train what is left for minutes by distillation from the model it was.

python examples/shrink_and_recover.py --model MODEL --text train.txt --minutes 5
"""

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_surgeon

ASSETS = Path(llm_surgeon.__file__).parent / "demo" / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "model"), help="folder or id on the hub")
    parser.add_argument("--text", type=Path, default=ASSETS / "wikitext2-train-slice.txt", help="to learn from")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=1.0)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // options.seqlen * options.seqlen].view(-1, options.seqlen)
    training, held_out = windows[:-16], windows[-16:]

    model = copy.deepcopy(teacher)
    calibration = training[:128]
    print(llm_surgeon.prune(model, calibration, structure="groups", sparsity=options.sparsity).summary())
    pruned = llm_surgeon.perplexity(model, held_out)
    llm_surgeon.recover(
        model,
        training,
        held_out,
        teacher=teacher,
        method="full",
        learning_rate=3e-4,
        seqlen=options.seqlen,
        minutes=options.minutes,
    )
    found = llm_surgeon.perplexity(teacher, held_out), pruned, llm_surgeon.perplexity(model, held_out)
    print("held-out perplexity: dense {:.2f}, pruned {:.2f}, recovered {:.2f}".format(*found))


if __name__ == "__main__":
    main()
