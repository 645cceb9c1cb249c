"""Can it look things up? Recall of key-value pairs from a growing history.

    python benchmarks/paper/needle.py

Pairs, a token each, lie at random places among filler; the last window holds queries "? key", and
the model is trained on the value that must follow. A key may be asked for again, so that no answer
tells anything about the next one; scored is the first time. Small models of both kinds, several
history windows; trained on histories of up to 992 tokens, scored up to 4064. "-beyond" has trained
only on histories longer than its window, which cannot be seen but through the compression.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import arguments, chosen, write

from tlinformer.config import TLinFormerConfig
from tlinformer.device import resolve_device
from tlinformer.recipe import build_model
from tlinformer.state import parameter_groups

QUERY, KEYS, VALUES, FILLER = 0, 8, 8, 31  # then a token for each pair, in this order
VOCABULARY = 1 + KEYS + VALUES + FILLER + KEYS * VALUES
PAIRS, QUERIES, WINDOW = 4, 8, 32  # 8 queries of 3 tokens fit a generation window
LENGTHS = (64, 128, 256, 512, 1024)  # trained on, the shortest alone at first; multiples of WINDOW
LONGER = (2048, 4096)
MODELS = {"transformer": None, "history-16": 16, "history-64": 64, "history-256": 256}
BEYOND = "-beyond"
RUNS = [*MODELS, "history-64" + BEYOND, "history-256" + BEYOND]
LEARNING_RATE = 2e-3


def batch(
    random: np.random.Generator, count: int, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences, the positions whose next token is a value, and how far back its pair lies.

    Returns:
        (count, length) int64, (count, QUERIES) int64, (count, QUERIES) int64: 0 where the window
        has asked for the key before.
    """
    ids = 1 + KEYS + VALUES + random.integers(FILLER, size=(count, length))
    keys = random.permuted(np.tile(np.arange(KEYS), (count, 1)), axis=1)[:, :PAIRS]
    values = random.integers(VALUES, size=(count, PAIRS))
    slots = np.tile(np.arange(length - WINDOW), (count, 1))
    places = random.permuted(slots, axis=1)[:, :PAIRS]
    row = np.arange(count)[:, None]
    ids[row, places] = VOCABULARY - KEYS * VALUES + keys * VALUES + values
    which = random.integers(PAIRS, size=(count, QUERIES))
    again = (np.tril(which[:, :, None] == which[:, None, :], -1)).any(-1)
    asked = length - WINDOW + 3 * np.tile(np.arange(QUERIES), (count, 1))
    ids[row, asked], ids[row, asked + 1], ids[row, asked + 2] = (
        QUERY,
        1 + keys[row, which],
        1 + KEYS + values[row, which],
    )
    made = (ids, asked + 1, np.where(again, 0, asked + 1 - places[row, which]))
    return tuple(torch.from_numpy(a) for a in made)  # type: ignore[return-value]


def answers(model: Any, ids: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """(B, QUERIES, V): logits of the token after each position in ``asked``."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        first = ids.size(1) - WINDOW  # the queries are all in the last window
        hidden = model.hidden_states(ids[:, :-1], first)
        picked = hidden.gather(1, (asked - first)[..., None].expand(-1, -1, hidden.size(-1)))
        return F.linear(picked, model.embed_tokens.weight).float()


def new_model(name: str, width: int) -> Any:
    """Six layers, of either kind."""
    rows = MODELS[name.removesuffix(BEYOND)]
    window = {"history_window": rows, "generation_window": WINDOW}
    config = TLinFormerConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_attention_heads=4,
        block_depth=3,
        **window if rows else {},
    )
    return build_model("tlinformer" if rows else "transformer", config)


def learn(
    args: argparse.Namespace, name: str, model: Any, lengths: tuple[int, ...]
) -> list[dict[str, float]]:
    """Trains ``model``; returns its curve."""
    device, curve = next(model.parameters()).device, []
    random = np.random.default_rng([args.seed, 0])
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=LEARNING_RATE, betas=(0.9, 0.95))
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1e-2, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps - warmup),
        ],
        [warmup],
    )
    for step in range(1, args.steps + 1):
        length = int(random.choice(lengths)) if step > args.steps // 4 else lengths[0]
        # As many tokens a step whatever the length.
        ids, asked, _ = (
            t.to(device) for t in batch(random, args.tokens_per_step // length, length)
        )
        logits, target = answers(model, ids, asked), ids.gather(1, asked + 1)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, args.steps // 40) == 0:
            right = (logits.argmax(-1) == target).float().mean().item()
            curve.append({"step": step, "loss": loss.item(), "accuracy": right})
            print(
                f"{name}, step {step:,}: loss {loss.item():.3f}, accuracy {right:.1%}", flush=True
            )
    return curve


@torch.no_grad()
def score(args: argparse.Namespace, model: Any, length: int) -> list[dict[str, float]]:
    """Accuracy in quarters of the distance, over new sequences of ``length``."""
    device, random = next(model.parameters()).device, np.random.default_rng([args.seed, length])
    right, distance = [], []
    for _ in range(max(1, args.scored // 16)):
        ids, asked, back = (t.to(device) for t in batch(random, 16, length))
        right.append(answers(model, ids, asked).argmax(-1) == ids.gather(1, asked + 1))
        distance.append(back)
    back = torch.cat(distance).flatten().cpu()
    hits, back = torch.cat(right).flatten().cpu()[back > 0], back[back > 0]
    quarter = (back * 4 // length).clamp(max=3)
    return [
        {
            "length": length,
            "distance": length * (2 * q + 1) / 8,
            "queries": int((quarter == q).sum()),
            "accuracy": hits[quarter == q].double().mean().item(),
        }
        for q in range(4)
        if (quarter == q).any()
    ]


if __name__ == "__main__":
    parser = arguments(__doc__, text=False)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--tokens-per-step", type=int, default=16384)
    parser.add_argument("--scored", type=int, default=256, help="sequences scored of each length")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    width, lengths, longer = 128, LENGTHS, LONGER
    if args.smoke:
        args.steps, args.tokens_per_step, args.scored = 4, 512, 16
        width, lengths, longer = 16, LENGTHS[:2], LENGTHS[2:3]
    for name in chosen(args, RUNS):
        if (args.results / "needle" / f"{name}-seed{args.seed}.json").is_file():
            print(f"{name}: done before")
            continue
        torch.manual_seed(args.seed)
        model = new_model(name, width).to(resolve_device(args.device)).train()
        began = time.perf_counter()
        trained = lengths
        if name.endswith(BEYOND):
            rows = model.config.history_window
            trained = tuple(n for n in lengths if n - WINDOW > rows) or lengths[-1:]
        curve = learn(args, name, model, trained)
        rows = [row for n in (*lengths, *longer) for row in score(args, model.eval(), n)]
        result = {
            "run": name,
            "seed": args.seed,
            "settings": model.config.to_dict(),
            "steps": args.steps,
            "tokens_per_step": args.tokens_per_step,
            "trained_lengths": trained,
            "chance": 1 / PAIRS,  # of who knows the values but not their keys
            "seconds": time.perf_counter() - began,
            "curve": curve,
            "rows": rows,
        }
        write(args, "needle", f"{name}-seed{args.seed}", result)
