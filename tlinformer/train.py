"""Training: one loop for TLinFormer, TConstFormer and the Transformer they are compared with.

An output directory holds ``config.yaml`` (the resolved settings), ``tokenizer.json``,
``metrics.jsonl``, ``checkpoint.pt`` (everything a resumed run needs) and ``best/`` (the weights
with the lowest validation loss, or the latest without validation text; see `recipe.load_model`).
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import Progress
from torch import nn

from .data import PackedSequences, token_byte_lengths
from .evaluation import evaluate
from .recipe import Corpus, autocast_dtype, build_model, prepare_corpus, resolve_device
from .settings import TrainConfig
from .terminal import Stopwatch, progress_bar, stop_signal

__all__ = ["Interrupted", "TrainConfig", "TrainingError", "evaluate", "train"]


class TrainingError(RuntimeError):
    """Training cannot go on, for the reason that the message names."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; a checkpoint was saved and the message says how to resume."""


def train(
    config: TrainConfig, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Trains as ``config`` says and returns a summary of the run.

    A resumed run continues at the saved step with the saved optimizer, random state and place in
    the data: on the CPU its parameters equal an uninterrupted run's bit for bit.

    Returns:
        steps, best_step, valid_loss, valid_perplexity and valid_bits_per_byte of the best scoring
        (None without validation text), seconds, tokens_per_second, parameters, output.

    Raises:
        ValueError: a setting or the data does not fit.
        FileNotFoundError: a file named in ``config``, or the run to resume, does not exist.
        FileExistsError: ``output`` holds a run and ``resume`` is false.
        TrainingError: the loss is no longer finite.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    saved = Path(config.output) / "checkpoint.pt"
    if resume and not saved.is_file():
        raise FileNotFoundError(f"nothing to resume: {saved} does not exist")
    if not resume and saved.exists():
        raise FileExistsError(f"{config.output} holds a run; resume it or name another output")
    console = console or Console()
    with progress_bar(console) as progress:
        run = _Run(config, prepare_corpus(config, progress), console)
        if resume:
            run.load(saved)
        return run.loop(progress)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


class _Run:
    """Model, optimizer, data, and the few numbers that a checkpoint keeps beside them."""

    COUNTERS = ("step", "best", "best_step", "evaluations_since_best")

    def __init__(self, config: TrainConfig, corpus: Corpus, console: Console):
        self.config, self.corpus, self.console = config, corpus, console
        self.output = Path(config.output)
        self.device = resolve_device(config.device)
        self.autocast = autocast_dtype(config.dtype, self.device)
        self.data = PackedSequences(corpus.train.array(), config.sequence_length, config.seed)
        self.tokens_per_step = config.batch_size * config.sequence_length
        self.steps = config.steps or math.ceil(config.epochs * len(self.data) / config.batch_size)
        warmup = config.warmup_steps
        self.warmup = min(2000, self.steps // 10) if warmup is None else warmup
        if self.warmup >= self.steps:
            raise ValueError(f"warmup_steps is {warmup}; the whole run has {self.steps} steps")
        torch.manual_seed(config.seed)
        self.model = build_model(config.architecture, corpus.model_config).to(self.device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.forward: Callable[[torch.Tensor], torch.Tensor] = self.model
        if config.compile:
            self.forward = torch.compile(self.model)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.byte_lengths = token_byte_lengths(corpus.tokenizer)
        self.step = self.best_step = self.evaluations_since_best = 0
        self.best: dict[str, Any] = {"loss": math.inf}

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to 0 at the end of the run."""
        if step < self.warmup:
            return self.config.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def finished(self) -> bool:
        patience = self.config.patience
        return self.step >= self.steps or 0 < patience <= self.evaluations_since_best

    def loop(self, progress: Progress) -> dict[str, Any]:
        config = self.config
        parameters = sum(p.numel() for p in self.model.parameters())
        self.say(
            f"{config.architecture}: {parameters:,} parameters, {len(self.data.tokens):,} tokens "
            f"({len(self.data):,} sequences of {config.sequence_length} an epoch), "
            f"{self.steps:,} steps of {config.batch_size} sequences on {self.device}"
        )
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
        self.corpus.tokenizer.save(str(self.output / "tokenizer.json"))
        self.forget_metrics_after(self.step)
        task = progress.add_task("training", total=self.steps, completed=self.step)
        began, clock, first_step = time.perf_counter(), Stopwatch(), self.step
        logged_at = clock.seconds(), self.step
        loss_sum = torch.zeros((), device=self.device)
        self.model.train()
        done = self.finished()
        with stop_signal() as stopped:
            while not done:
                loss, norm = self.train_step()
                loss_sum += loss  # stays on the device: reading it would wait for the step
                self.step += 1
                progress.update(task, completed=self.step)
                scores = self.step == self.steps or self.step % config.eval_interval == 0
                if scores or self.step % config.log_interval == 0:
                    steps = self.step - logged_at[1]
                    mean = self.finite(loss_sum.item() / steps)
                    speed = steps * self.tokens_per_step / (clock.seconds() - logged_at[0])
                    self.log(
                        loss=mean,
                        learning_rate=self.learning_rate(self.step - 1),
                        grad_norm=norm.item(),
                        tokens_per_second=round(speed),
                    )
                    progress.update(task, description=f"loss {mean:.3f}  {speed:,.0f} tokens/s")
                    logged_at = clock.seconds(), self.step
                    loss_sum.zero_()
                with clock.paused():
                    if scores:
                        self.score()
                    done, stopping = self.finished(), stopped()
                    if done or stopping or self.step % config.checkpoint_interval == 0:
                        self.save()
                if stopping and not done:
                    raise Interrupted(
                        f"stopped at step {self.step} of {self.steps}; continue with: "
                        f"tlinformer train --output {self.output} --resume"
                    )
        trained = (self.step - first_step) * self.tokens_per_step
        return {
            "steps": self.step,
            "best_step": self.best_step,
            "valid_loss": self.best["loss"] if self.corpus.valid else None,
            "valid_perplexity": self.best.get("perplexity"),
            "valid_bits_per_byte": self.best.get("bits_per_byte"),
            "seconds": time.perf_counter() - began,
            "tokens_per_second": trained / clock.seconds(),
            "parameters": parameters,
            "output": str(self.output),
        }

    def train_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; its mean loss and gradient norm, both still on the device."""
        config, size = self.config, self.config.batch_size
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        batch = self.data.batch(self.step * size, size)
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        batch = batch.to(self.device, non_blocking=True)
        total = torch.zeros((), device=self.device)
        for rows in batch.split(config.micro_batch_size or size):
            with torch.autocast(self.device.type, self.autocast, enabled=bool(self.autocast)):
                logits = self.forward(rows[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
            loss = loss * (len(rows) / size)  # so that the sum is the mean over the whole batch
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm

    def finite(self, loss: float) -> float:
        if math.isfinite(loss):
            return loss
        raise TrainingError(
            f"the loss is {loss} at step {self.step}; lower learning_rate "
            f"({self.config.learning_rate}) or lengthen warmup_steps ({self.warmup})"
        )

    def score(self) -> None:
        """Scores the validation text and keeps the weights if they are the best so far."""
        if self.corpus.valid is None:
            return self.keep_weights()
        result = evaluate(
            self.model,
            self.corpus.valid.array()[: self.config.eval_tokens],
            self.config.sequence_length,
            batch_size=self.config.micro_batch_size or self.config.batch_size,
            byte_lengths=self.byte_lengths,
            dtype=self.autocast,
        )
        better = result["loss"] < self.best["loss"]
        self.evaluations_since_best = 0 if better else self.evaluations_since_best + 1
        self.log(**{f"valid_{k}": result[k] for k in ("loss", "perplexity", "bits_per_byte")})
        self.say(
            f"step {self.step:,}: validation loss {result['loss']:.4f}, perplexity "
            f"{result['perplexity']:.2f}, {result['bits_per_byte'] or math.nan:.4f} bits per byte"
            + (" (best)" if better else "")
        )
        if better:
            self.best = result
            self.keep_weights()

    def keep_weights(self) -> None:
        self.best_step = self.step
        model = copy.deepcopy(self.model).to(getattr(torch, self.config.save_dtype))
        model.save_pretrained(self.output / "best")
        self.corpus.tokenizer.save(str(self.output / "best" / "tokenizer.json"))

    def save(self) -> None:
        """Writes ``checkpoint.pt``; a reader never sees a half-written one."""
        state = {
            "config": self.config.to_dict(),
            "data": self.corpus.fingerprint(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
            **{name: getattr(self, name) for name in self.COUNTERS},
        }
        partial = self.output / "checkpoint.pt.tmp"
        torch.save(state, partial)
        os.replace(partial, self.output / "checkpoint.pt")

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
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in self.COUNTERS:
            setattr(self, name, state[name])
        cpu, *cuda = state["random"]
        torch.set_rng_state(cpu)
        if len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def log(self, **values: float | None) -> None:
        """Appends a line to ``metrics.jsonl``."""
        epoch = round(self.step * self.config.batch_size / len(self.data), 4)
        with (self.output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, "epoch": epoch, **values}) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Steps after the checkpoint will run, and be logged, again."""
        path = self.output / "metrics.jsonl"
        with suppress(FileNotFoundError):
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
