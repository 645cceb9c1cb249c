"""Training speed: TLinFormer beside the Transformer of equal size, in one run.

    python benchmarks train-step --json benchmarks/results/train_speed.json
    python benchmarks train-step --device cpu --smoke    # the same in tiny, in seconds

steps      tokens/s of the trainer's own step: forward, backward, clipping, AdamW; compiled, in
           bfloat16, with the recipe's dropout. Both models alternate; medians. `flops_allow` is
           the Transformer's FLOPs over TLinFormer's, `reached` the ratio's share of it.
attention  one call at the shapes of training, forward and backward: tlinformer's operator, two
           calls of each of PyTorch's kernels that takes the shape, and FlexAttention.
--profile  lists and keeps the kernels that take most of a step.

Tokens and weights are random.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import environment, free, milliseconds, show
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tlinformer.cli.train import read_recipe
from tlinformer.config import TLinFormerConfig
from tlinformer.data import TokenFile
from tlinformer.device import resolve_device
from tlinformer.metrics import training_flops
from tlinformer.ops import window_attention
from tlinformer.recipe import Corpus
from tlinformer.settings import TrainConfig
from tlinformer.state import TrainState

RECIPES = Path(__file__).resolve().parent / "recipes/paper"
SHAPES = ("1k-1k-0.5", "1k-512-0.5", "2k-512-0.5")
VOCABULARY = 50257
SMOKE = {"vocab_size": 300, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
# (query heads, head size) and (window rows, context rows) of the attention call
HEADS = ((12, 36), (8, 64))
ROWS = ((256, 256), (256, 768), (512, 512))


def settings(args: argparse.Namespace, recipe: str, architecture: str) -> TrainConfig:
    """The paper's recipe, with --tokens tokens in a step."""
    values = read_recipe(RECIPES / f"{recipe}.yaml")
    model, length = {"vocab_size": VOCABULARY} | values["model"], values["sequence_length"]
    compiled = args.device.type == "cuda"
    if args.smoke:
        shorter = {w: model[w] // 16 for w in ("history_window", "generation_window")}
        model, length, compiled = model | SMOKE | shorter, length // 16, False
    return TrainConfig(
        architecture=architecture,
        model=model,
        sequence_length=length,
        batch_size=args.tokens // length,
        micro_batch_size=max(1, args.micro_tokens // length),
        steps=10**6,
        warmup_steps=2000,
        weight_decay=values["weight_decay"],
        compile=compiled,
        device=str(args.device),
    )


def trainer(config: TrainConfig, folder: Path) -> TrainState:
    """The trainer, with a text of random tokens."""
    sizes = TLinFormerConfig.from_dict(config.model)
    count = 8 * config.batch_size * config.sequence_length
    tokens = np.random.default_rng(0).integers(sizes.vocab_size, size=count).astype("<u2")
    tokens.tofile(folder / "random.bin")
    text = TokenFile(str(folder / "random.bin"), "<u2", count, count, sizes.vocab_size, "")
    state = TrainState(config, Corpus(Tokenizer(models.BPE()), text, None, sizes))
    state.model.train()
    return state


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_a_step(state: TrainState, steps: int) -> float:
    synchronize(state.device)
    start = time.perf_counter()
    for _ in range(steps):
        loss, _ = state.train_step()
        state.step += 1
    assert loss.isfinite().item()  # waits for the device
    synchronize(state.device)
    return (time.perf_counter() - start) / steps


def steps(args: argparse.Namespace) -> dict[str, Any]:
    rows, profiles = [], {}
    for recipe in args.shapes:
        torch.compiler.reset()
        with tempfile.TemporaryDirectory() as folder:
            states, flops = {}, {}
            for name in ("transformer", "tlinformer"):
                config = settings(args, recipe, name)
                states[name] = trainer(config, Path(folder))
                sizes, length = states[name].corpus.model_config, config.sequence_length
                flops[name] = training_flops(name, sizes, length) / length
                seconds_a_step(states[name], args.warm_up)
            times = collections.defaultdict(list)
            for _ in range(args.windows):  # alternating: what disturbs one disturbs the other
                for name, state in states.items():
                    times[name].append(seconds_a_step(state, args.steps))
            if args.profile:
                profiles |= {f"{recipe} {name}": profile(s) for name, s in states.items()}
        tokens = states["tlinformer"].tokens_per_step
        speed = {name: tokens / statistics.median(t) for name, t in times.items()}
        allowed = flops["transformer"] / flops["tlinformer"]
        ratio = speed["tlinformer"] / speed["transformer"]
        rows.append(
            {
                "shape": recipe,
                "tokens_a_step": tokens,
                "transformer_tokens_per_second": round(speed["transformer"]),
                "tlinformer_tokens_per_second": round(speed["tlinformer"]),
                "tlinformer_slowest": round(tokens / max(times["tlinformer"])),
                "tlinformer_fastest": round(tokens / min(times["tlinformer"])),
                "tlinformer_tflops": speed["tlinformer"] * flops["tlinformer"] / 1e12,
                "ratio": ratio,
                "flops_allow": allowed,
                "reached": ratio / allowed,
            }
        )
        print(rows[-1], flush=True)
        states.clear()
        del state
        free(args.device)
    return {"steps": rows, **profiles}


def profile(state: TrainState, count: int = 3, shown: int = 40) -> list[dict[str, Any]]:
    """The kernels (on the CPU, operators) of a step that take most of its time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        seconds_a_step(state, count)
    where = getattr(torch.autograd.DeviceType, state.device.type.upper())
    spent: dict[str, list[float]] = collections.defaultdict(list)
    for event in profiler.events():
        if event.device_type == where:
            spent[event.name].append(event.time_range.elapsed_us())
    total = sum(map(sum, spent.values()))
    ordered = sorted(spent.items(), key=lambda item: -sum(item[1]))
    return [
        {
            "milliseconds_a_step": sum(times) / count / 1e3,
            "share": sum(times) / total,
            "calls_a_step": len(times) / count,
            "kernel": name[:110],
        }
        for name, times in [("all", [total]), *ordered[:shown]]
    ]


def two_calls(backend: SDPBackend, dropout: float, q: Tensor, k: Tensor, v: Tensor, ck, cv):  # type: ignore[no-untyped-def]
    with sdpa_kernel(backend):
        window = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return window + scaled_dot_product_attention(q, ck, cv, dropout_p=dropout)


def with_dropout(q: Tensor, k: Tensor, v: Tensor, ck: Tensor, cv: Tensor) -> Tensor:
    seed = torch.ones(1, dtype=torch.int64, device=q.device)
    return torch.ops.tlinformer.ranged_attention(q, k, v, ck, cv, [], None, 0.2, seed)[0]


def flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def both(q: Tensor, k: Tensor, v: Tensor, ck: Tensor, cv: Tensor) -> Tensor:
        m = q.size(2)
        if m not in masks:
            masks[m] = create_block_mask(lambda b, h, i, j: i >= j, None, None, m, m, device="cuda")
        return compiled(q, k, v, block_mask=masks[m]) + compiled(q, ck, cv)

    return both


def attention_ways(args: argparse.Namespace) -> dict[str, Callable[..., Tensor]]:
    ways: dict[str, Callable[..., Tensor]] = {"window_attention": window_attention}
    if args.device.type == "cpu":
        return ways | {"SDPA x 2": partial(two_calls, SDPBackend.MATH, 0.0)}
    ways["window_attention, dropout"] = with_dropout
    for name in ("FLASH", "EFFICIENT", "CUDNN"):
        backend = getattr(SDPBackend, f"{name}_ATTENTION")
        ways[f"SDPA x 2, {name.lower()}"] = partial(two_calls, backend, 0.0)
        ways[f"SDPA x 2, {name.lower()}, dropout"] = partial(two_calls, backend, 0.2)
    return ways | {"FlexAttention x 2": flex()}


def attention(args: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    rows, refused = [], []
    for (heads, d), (m, n) in itertools.product(HEADS, ROWS):
        if args.smoke:
            m, n = m // 16, n // 16
        batch = max(1, args.attention_tokens // m)
        torch.manual_seed(0)
        # Rows outside heads, as a projection leaves them.
        tensors = [
            torch.randn(batch, r, heads, d, dtype=dtype, device=args.device)
            .transpose(1, 2)
            .requires_grad_()
            for r in (m, m, m, n, n)
        ]
        grad = torch.randn_like(tensors[0])
        pairs = batch * heads * (m * (m + 1) / 2 + m * n)
        for name, way in attention_ways(args).items():
            try:
                output = way(*tensors)
                backward = partial(torch.autograd.grad, output, tensors, grad, retain_graph=True)
                backward()
            except Exception as error:  # each library has its own for "not this shape"
                words = f"{type(error).__name__}: {error}".split("\n")[0][:200]
                refused.append({"refused": name, "heads": heads, "d": d, "why": words})
                continue
            forward_ms = milliseconds(partial(way, *tensors), args.device, args.repeats)
            backward_ms = milliseconds(backward, args.device, args.repeats)
            rows.append(
                {
                    "way": name,
                    "heads": heads,
                    "d": d,
                    "window": m,
                    "context": n,
                    "batch": batch,
                    "forward_milliseconds": forward_ms,
                    "backward_milliseconds": backward_ms,
                    "forward_tflops": 4 * d * pairs / forward_ms / 1e9,
                    "backward_tflops": 10 * d * pairs / backward_ms / 1e9,
                }
            )
            del output, backward
        del tensors, grad
        free(args.device)
    return {"attention": rows} | ({"refused": refused} if refused else {})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny models, seconds on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=65536, help="of a step")
    parser.add_argument("--micro-tokens", type=int, default=65536, help="of a forward pass")
    parser.add_argument("--attention-tokens", type=int, default=65536, help="rows of queries")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before the first window")
    parser.add_argument("--windows", type=int, default=7, help="medians are over these")
    parser.add_argument("--steps", type=int, default=5, help="of a window")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of attention")
    parser.add_argument("--profile", action="store_true", help="also list the kernels of a step")
    args = parser.parse_args(arguments)
    try:
        args.device = resolve_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.smoke:
        small = {"tokens": 256, "micro_tokens": 256, "attention_tokens": 64}
        vars(args).update(small, warm_up=1, windows=2, steps=1, repeats=2)
    figures: dict[str, Any] = {}
    for part in args.parts:
        figures |= PARTS[part](args)
    command = " ".join(["python", *sys.argv])
    result = {"command": command, "environment": environment(args.device), **figures}
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


PARTS = {"steps": steps, "attention": attention}

if __name__ == "__main__":
    main()
