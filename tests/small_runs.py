"""Training runs that take a second, and what they left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tlinformer.settings import TrainConfig

MODEL = {
    "vocab_size": 270,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "block_depth": 3,
    "history_window": 6,
    "generation_window": 8,
    "intermediate_size": 24,
    "dropout": 0.2,
}


def small_run(text: Path, output: Path, **changes: Any) -> TrainConfig:
    """Eight steps on the fixture `text`."""
    settings: dict[str, Any] = {
        "output": str(output),
        "train_data": (str(text / "train.txt"),),
        "valid_data": (str(text / "valid.txt"),),
        "tokenizer": str(text / "tokenizer.json"),
        "model": MODEL,
        "sequence_length": 24,
        "batch_size": 4,
        "micro_batch_size": 3,
        "steps": 8,
        "learning_rate": 3e-3,
        "eval_interval": 4,
        "checkpoint_interval": 3,
        "log_interval": 2,
        "device": "cpu",
    }
    return TrainConfig(**settings | changes)


def checkpoint(config: TrainConfig) -> dict[str, Any]:
    """What ``checkpoint.pt`` holds."""
    return torch.load(Path(config.output) / "checkpoint.pt", weights_only=True)


def metrics(config: TrainConfig) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without what depends on the machine."""
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    measured = ("tokens_per_second", "memory_gib")
    return [{k: v for k, v in json.loads(line).items() if k not in measured} for line in lines]


def assert_same_run(
    one: TrainConfig,
    other: TrainConfig,
    *,
    tolerance: float = 0.0,
    log_tolerance: float = 0.0,
    log_after: int = 0,
) -> None:
    """Weights, optimizer and scores agree, as does what was logged after a step.

    ``tolerance``, of weights and optimizer, is absolute; ``log_tolerance``, of scores, relative.
    """
    a, b = checkpoint(one), checkpoint(other)
    assert a["model"].keys() == b["model"].keys()
    for x, y in (
        (a["model"], b["model"]),
        (a["optimizer"]["state"], b["optimizer"]["state"]),
        ({k: a[k] for k in ("step", "best_step")}, {k: b[k] for k in ("step", "best_step")}),
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)
    torch.testing.assert_close(a["best"], b["best"], rtol=log_tolerance, atol=0)
    logs = ([m for m in metrics(run) if m["step"] > log_after] for run in (one, other))
    torch.testing.assert_close(*logs, rtol=log_tolerance, atol=0)
