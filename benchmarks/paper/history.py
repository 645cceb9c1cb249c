"""Does it use its history? Perplexity of the same tokens, given more and more of it.

    python benchmarks/paper/history.py --data data        # after parity.py

Windows of tokens are taken at even distances through those held-out documents that are longer than
the longest history; each is scored with the H tokens of its document before it and nothing earlier,
by models that parity.py trained. The second figure is the
loss by position inside a generation window, beside the Transformer's on the same tokens: whether
a context that was compressed at the window's beginning is staler at its end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from common import SMOKE, arguments, chosen, text, write
from parity import RUNS as PARITY

from tlinformer.data import END_OF_TEXT, TokenFile, load_tokenizer
from tlinformer.device import resolve_device
from tlinformer.recipe import load_model

# Those of 2K saw up to 1,792 tokens of history in training, those of 1K 512 or 768.
MODELS = tuple(f"{run}-seed0" for run in PARITY if run not in ("base-512", "512-512-0.5"))
HISTORIES = (0, 256, 1024, 4096, 16384)
SCORED = 256  # tokens scored of every window
POSITION_HISTORY = 512  # a multiple of every model's generation window, and seen in training
BINS = 8


@torch.no_grad()
def losses(
    model: Any, tokens: torch.Tensor, starts: list[int], history: int, window: int
) -> torch.Tensor:
    """(windows, window) float64: nats of each token, given ``history`` tokens before the window."""
    found = []
    for start in starts:
        ids = tokens[start - history : start + window + 1]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            hidden = model.hidden_states(ids[None, :-1], history)[0]
            logits = F.linear(hidden, model.embed_tokens.weight)
        found.append(F.cross_entropy(logits.float(), ids[-window:], reduction="none"))
    return torch.stack(found).double().cpu()


def even_starts(
    count: int, tokens: torch.Tensor, separator: int, before: int, after: int
) -> list[int]:
    """``count`` positions with so many tokens of their document before and after them.

    Exits if no document is that long.
    """
    ends = [*(tokens == separator).nonzero().flatten().tolist(), len(tokens)]
    begins = [0, *(end + 1 for end in ends[:-1])]
    fits = [
        torch.arange(begin + before, end - after)
        for begin, end in zip(begins, ends, strict=True)
        if end - after > begin + before
    ]
    if not fits:
        raise SystemExit(f"no held-out document has {before + after} tokens")
    places = torch.cat(fits)
    return places[torch.arange(count) * len(places) // count].tolist()


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--windows", type=int, default=128, help="windows that are scored")
    args = parser.parse_args()
    device, shrink = resolve_device(args.device), SMOKE if args.smoke else 1
    scored, windows = SCORED // shrink, min(args.windows, 4 if args.smoke else args.windows)
    data = text(args)
    file = TokenFile.load(data["valid_data"][0])
    separator = load_tokenizer(data["tokenizer"]).token_to_id(END_OF_TEXT)
    tokens = torch.from_numpy(file.array().astype("int64")).to(device)
    histories = [history // shrink for history in HISTORIES]
    for name in chosen(args, MODELS):
        folder = args.runs / "parity" / name / "best"
        if not folder.is_dir():
            raise SystemExit(f"{folder} is missing; train it: parity.py --only {name}")
        model = load_model(str(folder), device=device).float()
        starts = even_starts(windows, tokens, separator, max(histories), scored + 1)
        rows = []
        for history in histories:
            each = losses(model, tokens, starts, history, scored).mean(1)
            rows.append(
                {
                    "history": history,
                    "loss": each.mean().item(),
                    "standard_error": (each.std() / math.sqrt(len(each))).item(),
                    "perplexity": math.exp(each.mean().item()),
                }
            )
            found = f"perplexity {rows[-1]['perplexity']:.2f}"
            print(f"{name} history {history:>6,} {found}", flush=True)
        length, history = 512 // shrink, POSITION_HISTORY // shrink
        starts = even_starts(windows, tokens, separator, history, length + 1)
        by_position = losses(model, tokens, starts, history, length).mean(0)
        result = {
            "model": name,
            "generation_window": model.config.generation_window,
            "windows": windows,
            "rows": rows,
            "position_history": history,
            "loss_by_position": by_position.unflatten(0, (BINS, -1)).mean(1).tolist(),
        }
        write(args, "history", name, result)
