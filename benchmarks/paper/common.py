"""What the experiments share: text, budget, training runs and where results go.

Every run of an experiment trains on the same tokens with the same optimizer; only its recipe in
benchmarks/recipes/paper, its seed and what the experiment varies differ.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tlinformer.cli.train import read_recipe
from tlinformer.data import (
    TokenFile,
    load_tokenizer,
    read_text,
    token_byte_lengths,
    tokenize_files,
)
from tlinformer.device import resolve_device
from tlinformer.evaluation import evaluate
from tlinformer.recipe import autocast_dtype, load_model, prepare_corpus
from tlinformer.settings import TrainConfig
from tlinformer.state import TrainState
from tlinformer.train import train

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = ROOT / "benchmarks/recipes/paper"
sys.path.append(str(ROOT / "benchmarks"))
TOKENS_PER_STEP = 32768  # the paper's 256 sequences would leave too few steps of this text
SCORED = 131072  # held-out tokens of a point of a curve; a finished run is scored on all
POINTS = 6  # of a curve
LEARNING_RATE = 1e-3  # the paper's 3e-4 goes with four times the batch and more steps
SMOKE = 16  # lengths and windows are so many times smaller with --smoke


@dataclass(frozen=True)
class Run:
    """One training run: a recipe's name, a seed, and what differs from the recipe."""

    name: str
    recipe: str
    seed: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    sequence_length: int | None = None

    @property
    def id(self) -> str:
        return f"{self.name}-seed{self.seed}"


def arguments(
    description: str | None, *, text: bool = True, epochs: float | None = None
) -> argparse.ArgumentParser:
    """The options that all experiments have, those that need text, and those that train on it.

    ``epochs`` is a default.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    # What --smoke leaves must not pass for results, nor its checkpoints for stopped runs.
    runs, results = ROOT / "runs/paper", ROOT / "benchmarks/results/paper"
    if "--smoke" in sys.argv:
        runs, results = ROOT / "runs/smoke", ROOT / "runs/smoke/results"
    parser.add_argument("--results", type=Path, default=results, help="figures go here")
    parser.add_argument("--runs", type=Path, default=runs, help="weights go here")
    parser.add_argument("--only", nargs="+", help="runs to do, by id; finished ones are skipped")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="tiny models, seconds on a CPU")
    if text:
        parser.add_argument(
            "--data",
            type=Path,
            default=ROOT / "data",
            help="directory with {prose,docs}.{train,valid}.txt.xz and gpt2/",
        )
        parser.add_argument(
            "--tokens",
            type=Path,
            help="instead of --data: what an earlier call left in RUNS/tokens",
        )
    if epochs is not None:
        parser.add_argument("--epochs", type=float, default=epochs, help="passes over the text")
        parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    return parser


def chosen(args: argparse.Namespace, ids: Sequence[str]) -> list[str]:
    """The ids of --only, or all. Exits naming one that does not exist."""
    if unknown := set(args.only or ()) - set(ids):
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: the runs are {' '.join(ids)}")
    return list(args.only or ids)


def write(args: argparse.Namespace, experiment: str, name: str, result: dict[str, Any]) -> None:
    """Writes the raw figures of one run, with how and where they were made."""
    device = resolve_device(args.device)
    where = importlib.import_module("measure").environment(device)
    path = args.results / experiment / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": " ".join(["python", *sys.argv]), "environment": where, "smoke": args.smoke}
    path.write_text(json.dumps(about | result, indent=1) + "\n")
    print(f"wrote {path}", flush=True)


@contextmanager
def alone(runs: Path) -> Iterator[None]:
    """Waits while another process that does other runs is in here."""
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / "turn").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def text(args: argparse.Namespace) -> dict[str, Any]:
    """The token files of all runs, made once, and their tokenizer: settings of TrainConfig."""
    folder = args.tokens or args.runs / "tokens"
    if not args.tokens:
        with alone(args.runs):
            tokenize(args, folder)
    made = {f"{split}_data": (str(folder / f"{split}.bin"),) for split in ("train", "valid")}
    return {"tokenizer": str(folder / "tokenizer.json"), **made}


def tokenize(args: argparse.Namespace, folder: Path) -> None:
    """Writes what ``text`` finds in ``folder``, which works on other machines, too."""
    if args.smoke:
        tokenizer = ROOT / "models/tlinformer-prose-8m/tokenizer.json"
        source = args.runs / "smoke.txt"
        whole = next(read_text(ROOT / "examples/new-testament.txt.xz"))
        source.write_text(whole[:30000])
        files = {"train": [source], "valid": [source]}
    else:
        tokenizer = args.data / "gpt2"
        files = {
            split: [args.data / f"{kind}.{split}.txt.xz" for kind in ("prose", "docs")]
            for split in ("train", "valid")
        }
    vocabulary = load_tokenizer(tokenizer)
    for split, paths in files.items():
        tokenize_files(vocabulary, paths, folder / f"{split}.bin")
    vocabulary.save(str(folder / "tokenizer.json"))


def settings(
    args: argparse.Namespace, experiment: str, run: Run, data: dict[str, Any]
) -> TrainConfig:
    """The recipe of ``run`` on the text ``data`` and our budget, every run for as many steps."""
    tokens = TokenFile.load(data["train_data"][0]).tokens
    values = read_recipe(RECIPES / f"{run.recipe}.yaml")
    for name in ("dataset", "dataset_config", "dataset_separator", "epochs", "warmup_steps"):
        values.pop(name)
    length = run.sequence_length or values["sequence_length"]
    model = values["model"] | run.model
    steps, batch = round(args.epochs * tokens / TOKENS_PER_STEP), TOKENS_PER_STEP // length
    values |= {"learning_rate": args.learning_rate, "micro_batch_size": batch}
    values["eval_tokens"] = SCORED
    if args.smoke:
        length //= SMOKE
        windows = ("history_window", "generation_window")
        model |= {name: model[name] // SMOKE for name in windows if name in model}
        model |= {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
        steps, batch = 6, 4
        values |= {"micro_batch_size": 2, "compile": False, "eval_tokens": 300}
    values |= {
        "model": model,
        "sequence_length": length,
        "batch_size": batch,
        "steps": steps,
        "eval_interval": max(1, steps // POINTS),
        "seed": run.seed,
        "device": args.device,
        "output": str(args.runs / experiment / run.id),
    }
    return TrainConfig.from_dict(values | data)


def compile_ahead(config: TrainConfig) -> None:
    """One step of a model that nobody keeps; `train` will find its code compiled."""
    state = TrainState(config, prepare_corpus(config))
    state.model.train()
    state.train_step()
    del state
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def score(config: TrainConfig) -> dict[str, Any]:
    """The weights that a run kept, on all of the held-out text."""
    device = resolve_device(config.device)
    assert config.micro_batch_size
    found = evaluate(
        load_model(f"{config.output}/best", device=device),
        TokenFile.load(config.valid_data[0]).array(),
        config.sequence_length,
        batch_size=config.micro_batch_size,
        byte_lengths=token_byte_lengths(load_tokenizer(str(config.tokenizer))),
        dtype=autocast_dtype(config.dtype, device),
    )
    return {f"valid_{k}": found[k] for k in ("loss", "perplexity", "bits_per_byte", "tokens")}


def result_of(run: Run, config: TrainConfig, summary: dict[str, Any]) -> dict[str, Any]:
    """What is written of a finished run."""
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    curve = [json.loads(line) for line in lines]
    speeds = sorted(line["tokens_per_second"] for line in curve if "loss" in line)
    hidden = ("output", "device", "tokenizer", "train_data", "valid_data")
    return {
        "run": run.name,
        "recipe": run.recipe,
        "seed": config.seed,
        "settings": {k: v for k, v in config.to_dict().items() if k not in hidden},
        "training_tokens": config.steps * config.batch_size * config.sequence_length,
        "final": {"step": summary["best_step"], **score(config)},
        # The median leaves out what compiling and scoring cost.
        "tokens_per_second": speeds[len(speeds) // 2],
        "seconds": summary["seconds"],
        "parameters": summary["parameters"],
        "curve": curve,
    }


def train_runs(args: argparse.Namespace, experiment: str, runs: Sequence[Run]) -> None:
    """Trains what has no results yet; a run that was stopped goes on where it was.

    Processes that do different runs compile at the same time and train in turn.
    """
    by_id, data, compiled = {run.id: run for run in runs}, text(args), None
    for name in chosen(args, list(by_id)):
        if (args.results / experiment / f"{name}.json").is_file():
            print(f"{name}: done before")
            continue
        run = by_id[name]
        config = settings(args, experiment, run, data)
        # Code is kept for a few shapes only, then nothing more is compiled.
        shape = run.recipe, run.model, run.sequence_length
        if shape != compiled:
            torch.compiler.reset()
        compiled = shape
        compile_ahead(config)
        with alone(args.runs):  # so that speeds are of a device alone
            print(f"{name}: {config.steps:,} steps", flush=True)
            saved = Path(config.output) / "checkpoint.pt"
            summary = train(config, resume=saved.is_file(), console=Console(stderr=True))
            result = result_of(run, config, summary)
        final, speed = result["final"]["valid_perplexity"], result["tokens_per_second"]
        print(f"{name}: perplexity {final:.2f}, {speed:,} tokens/s", flush=True)
        write(args, experiment, name, result)
