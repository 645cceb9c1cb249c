"""Does a model use its history? Perplexity of the same tokens, given more and more of it.

    python benchmarks/history.py --model models/tlinformer-prose-8m \\
        --text examples/new-testament.txt.xz --json benchmarks/results/prose_8m_history.json

Generation windows are taken at even distances through the text; each is scored token by token
through the engine after a prefill of the last H tokens before it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import environment

from tlinformer import Engine, TLinFormerForCausalLM
from tlinformer.data import load_tokenizer, read_text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--histories", type=int, nargs="+", default=[0, 256, 768, 4096, 32768])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    args = parser.parse_args()

    model = TLinFormerForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    window = model.config.generation_window
    ids = torch.tensor(load_tokenizer(args.model).encode("".join(read_text(args.text))).ids)
    first, last = max(args.histories), len(ids) - window - 1
    if first >= last:
        raise SystemExit(f"{args.text} has {len(ids)} tokens; a history of {first} needs more")
    starts = [first + (last - first) * i // args.windows for i in range(args.windows)]
    rows = []
    for history in args.histories:
        engine = Engine(model, max_context=history + window)
        losses = []
        for start in starts:
            logits = [engine.prefill(ids[None, start - history : start + 1])]
            logits += [engine.step(t[None]) for t in ids[start + 1 : start + window]]
            target = ids[start + 1 : start + window + 1]
            losses.append(F.cross_entropy(torch.cat(logits), target).item())
        loss = sum(losses) / len(losses)
        rows.append({"history": history, "perplexity": math.exp(loss), "loss": loss})
        print(f"history {history:>7,}  perplexity {math.exp(loss):.2f}", flush=True)
    if args.json:
        result = {
            "command": " ".join(["python", *sys.argv]),
            "environment": environment(),
            "windows": len(starts),
            "tokens": len(starts) * window,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
