"""What `tlinformer plan` predicts beside what the engine then takes, on the GPU or the CPU.

    python benchmarks/planner.py --json benchmarks/results/planner_h200.json
    python benchmarks/planner.py --device cpu --threads 1 --json benchmarks/results/planner_cpu.json

For every model, of random weights: the predictions are made first, from the short runs that `plan`
makes, with no more blocks and tokens than it takes; then engines of the whole model are timed at
every history that fits. The error is predicted over measured, less one. It ends with code 1 if an
error is larger than --tolerance. Other models keep what the file has of them. On a GPU it also
makes an engine for the longest context that the plan says fits, and reads a prompt in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from measure import environment
from sizes import SIZES

from tlinformer import Engine, TLinFormerConfig
from tlinformer.plan import dtype_name, fit_device, weights_bytes
from tlinformer.predict import EVENTS, Costs, measure_costs, measure_events, random_model

CUDA_MODELS = {name: SIZES[name] for name in ("41m", "d512", "1.3b", "7b")}
CPU_MODELS = {
    "8M": {"vocab_size": 4096, "hidden_size": 256, "num_attention_heads": 4},
    "GQA": {
        "vocab_size": 4096,
        "hidden_size": 192,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_blocks": 6,
        "block_depth": 3,
    },
}
HISTORIES = {"cuda": [2**10, 2**14, 2**17, 2**20], "cpu": [2**10, 2**13, 2**15]}


def errors(costs: Costs, measured: Any, history: int) -> list[dict[str, Any]]:
    """A row for each event, and for a token with its share of a slide."""
    found = costs.at(history)
    window = costs.config.generation_window
    slide, hit = measured[1, 0], measured[2, 0]
    pairs = {
        name: (found.events[name].microseconds / 1e6, measured[i, 0])
        for i, name in enumerate(EVENTS)
    }
    pairs["token"] = (found.amortised_seconds, (slide + (window - 1) * hit) / window)
    return [
        {
            "history": history,
            "event": name,
            "predicted_milliseconds": predicted * 1e3,
            "measured_milliseconds": took * 1e3,
            "error": predicted / took - 1,
        }
        for name, (predicted, took) in pairs.items()
    ]


def longest(config: TLinFormerConfig, model: Any, device: torch.device) -> dict[str, Any]:
    """Makes an engine for the longest context that the plan allows, and uses it."""
    dtype = next(model.parameters()).dtype
    sizes: dict[str, Any] = {"dtype": dtype_name(dtype), "device": str(device), "new_weights": 0}
    fit = fit_device(config, max_context=1, **sizes)
    engine = Engine(model, max_context=fit.longest_context or 1)
    engine.prefill(torch.zeros(1, 4096, dtype=torch.int64))
    engine.generate(8)
    gib = engine.plan.total_bytes / 2**30
    return {"tokens": fit.longest_context, "gib": gib, "free_gib": fit.available_bytes / 2**30}


def check(name: str, fields: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What a file has of a model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of the model before, whose engine had all memory
    config, dtype = TLinFormerConfig(**fields), torch.bfloat16
    device, repeats = torch.device(args.device), args.repeats
    most = max(args.histories)
    costs = measure_costs(config, longest=most, dtype=dtype, device=device, repeats=repeats)
    gc.collect()
    model = random_model(config, device, dtype)
    rows = []
    for history in args.histories:
        try:
            measured = measure_events(model, history, repeats=repeats)
        except RuntimeError as error:
            print(f"{name} at {history:,}: left out, {error}", flush=True)
            continue
        rows += errors(costs, measured, history)
        for row in rows[-len(EVENTS) - 1 :]:
            print(
                f"{name:>5}",
                "{history:>9,} {event:>8} predicted {predicted_milliseconds:9.3f} ms, "
                "measured {measured_milliseconds:9.3f}, {error:+.1%}".format_map(row),
                flush=True,
            )
    return {
        "model": name,
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(args.device),
        "parameters": weights_bytes(config, dtype) // dtype.itemsize,
        "probed_histories": costs.histories,
        "ceilings": costs.ceilings,
        "longest_context": longest(config, model, device) if device.type == "cuda" else None,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=[*CUDA_MODELS, *CPU_MODELS])
    parser.add_argument("--histories", type=int, nargs="+", help="tokens, whole windows of 256")
    parser.add_argument("--repeats", type=int, default=5, help="the best of so many counts")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--tolerance", type=float, default=0.15, help="largest error")
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cuda = args.device.startswith("cuda")
    args.histories = args.histories or HISTORIES["cuda" if cuda else "cpu"]
    names = args.models or (CUDA_MODELS if cuda else CPU_MODELS)
    models = CUDA_MODELS | CPU_MODELS
    known = json.loads(args.json.read_text())["models"] if args.json and args.json.exists() else []
    found = {model["model"]: model for model in known}
    largest = 0.0
    for name in names:  # a model that fails loses nothing of the others
        found[name] = check(name, models[name], args)
        largest = max([largest, *(row["error"] for row in found[name]["rows"])], key=abs)
        if args.json:
            ordered = [found[model] for model in models if model in found]
            args.json.write_text(json.dumps({"models": ordered}, indent=1) + "\n")
    if abs(largest) > args.tolerance:
        raise SystemExit(f"an error of {largest:+.1%} is beyond {args.tolerance:.0%}")


if __name__ == "__main__":
    main()
