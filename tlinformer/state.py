"""What a step of training changes and a checkpoint holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import distributed
from .checkpoint import replace_file
from .data import PackedSequences
from .device import resolve_device
from .recipe import Corpus, autocast_dtype, build_model
from .settings import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


class TrainState:
    """Model, optimizer, data, and the few numbers that a checkpoint keeps beside them.

    No random state is kept: what a step draws follows from the seed and its place in the data. So
    a run that was killed, and one that is spread over processes, computes what one process
    without interruption would.
    """

    COUNTERS = ("step", "best", "best_step", "evaluations_since_best")

    def __init__(self, config: TrainConfig, corpus: Corpus):
        self.config, self.corpus = config, corpus
        self.output = Path(config.output)
        self.device = resolve_device(config.device)
        self.autocast = autocast_dtype(config.dtype, self.device)
        self.data = PackedSequences(corpus.train.array(), config.sequence_length, config.seed)
        processes = distributed.world_size()
        self.share, rest = divmod(config.batch_size, processes)
        if rest:
            raise ValueError(
                f"batch_size is {config.batch_size}; it must be a multiple of the {processes} "
                "processes that share it"
            )
        self.tokens_per_step = config.batch_size * config.sequence_length
        self.steps = config.steps or math.ceil(config.epochs * len(self.data) / config.batch_size)
        warmup = config.warmup_steps
        self.warmup = min(2000, self.steps // 10) if warmup is None else warmup
        if self.warmup >= self.steps:
            raise ValueError(f"warmup_steps is {warmup}; the whole run has {self.steps} steps")
        torch.manual_seed(config.seed)
        self.model = build_model(config.architecture, corpus.model_config).to(self.device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.forward = distributed.parallelize(
            self.model, config.strategy, self.device, config.compile
        )
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.step = self.best_step = self.evaluations_since_best = 0
        self.best: dict[str, Any] = {"loss": math.inf}

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to 0 at the end of the run."""
        if step < self.warmup:
            return self.config.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def train_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step: this process's part of the mean loss, and the gradient's norm.

        Both are still on the device.
        """
        config, processes = self.config, distributed.world_size()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        first = self.step * config.batch_size + distributed.rank() * self.share
        batch = self.data.batch(first, self.share)
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        batch = batch.to(self.device, non_blocking=True)
        total = torch.zeros((), device=self.device)
        parts = batch.split(config.micro_batch_size or self.share)
        for number, rows in enumerate(parts):
            distributed.synchronize_gradients(self.forward, number == len(parts) - 1)
            self.seed_dropout(first)
            first += len(rows)
            with torch.autocast(self.device.type, self.autocast, enabled=bool(self.autocast)):
                loss = self.forward(rows[:, :-1], rows[:, 1:])
            # The sum over parts and processes is the mean over the whole batch; of the processes'
            # gradients, however, backward leaves the mean.
            loss = loss * (len(rows) / config.batch_size)
            (loss * processes).backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, distributed.whole(norm)

    def seed_dropout(self, sequence: int) -> None:
        """Random numbers that belong to the part of a batch that begins with this sequence."""
        (seed,) = np.random.SeedSequence([self.config.seed, sequence]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed))

    def save(self) -> None:
        """Writes ``checkpoint.pt``; a reader never sees a half-written one."""
        state = {
            "config": self.config.to_dict(),
            "data": self.corpus.fingerprint(),
            "model": distributed.whole_state(self.model),
            "optimizer": distributed.whole_state(self.model, self.optimizer),
            **{name: getattr(self, name) for name in self.COUNTERS},
        }
        if distributed.rank() == 0:
            for abandoned in self.output.glob(".checkpoint.pt.*"):  # by a process killed in here
                abandoned.unlink()
            replace_file(self.output / "checkpoint.pt", lambda path: torch.save(state, path))

    def load(self, path: Path) -> None:
        """Continues from ``path``. Raises ValueError naming what differs from the saved run."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            config, data = state["config"], state["data"]
        except Exception as error:
            raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
        self.config.check_resumes(config)
        for name, value in self.corpus.fingerprint().items():
            if data[name] != value:
                raise ValueError(f"cannot resume with a different {name}: its content has changed")
        distributed.load_whole_state(self.model, self.optimizer, state["model"], state["optimizer"])
        for name in self.COUNTERS:
            setattr(self, name, state[name])
