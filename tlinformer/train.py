"""Training: one loop for TLinFormer, TConstFormer and the Transformer they are compared with.

An output directory holds ``config.yaml`` (the resolved settings), ``tokenizer.json``,
``metrics.jsonl``, ``tensorboard/`` if asked for, ``checkpoint.pt`` (everything a resumed run needs)
and ``best/`` (the weights with the lowest validation loss, or the latest without validation text;
see `recipe.load_model`).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import Progress

from . import distributed
from .config import TLinFormerConfig
from .data import token_byte_lengths
from .device import resolve_device
from .evaluation import evaluate
from .metrics import MetricsLog, check_tensorboard, peak_flops, peak_memory_gib, training_flops
from .recipe import Corpus, build_model, prepare_corpus
from .settings import TrainConfig
from .state import TrainState
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

    A resumed run continues at the saved step with the saved optimizer, and with the random numbers
    and the place in the data that belong to this step: on the CPU its parameters equal an
    uninterrupted run's bit for bit. Under torchrun the processes share the work of every step.

    Returns:
        steps, best_step, valid_loss, valid_perplexity and valid_bits_per_byte of the best scoring
        (None without validation text), seconds, tokens_per_second, parameters, output.

    Raises:
        ValueError: a setting or the data does not fit.
        ImportError: the optional package that a setting needs is missing.
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
    if config.tensorboard:
        check_tensorboard()
    console = console or Console()
    with distributed.process_group(resolve_device(config.device)):
        console.quiet = distributed.rank() > 0  # the first process speaks for all
        with progress_bar(console) as progress:
            corpus = distributed.first_alone(lambda: prepare_corpus(config, progress))
            run = _Run(config, corpus, console)
            if resume:
                run.load(saved)
            return run.loop(progress)


def history_hint(model: TLinFormerConfig, sequence_length: int) -> str | None:
    """What to change if no sequence has more history than the history window holds.

    Models that begin so look at rows instead of what compression keeps of them, and later fail
    beyond the window (benchmarks/paper, needle).
    """
    longest = (sequence_length - 1) // model.generation_window * model.generation_window
    rows = model.history_window_at(longest)
    if longest > rows:
        return None
    return (
        f"no sequence of {sequence_length} tokens has more than {longest} tokens of history, which "
        f"the history window of {rows} holds whole, so the model learns nothing of longer ones; "
        f"with sequence_length = {4 * rows + model.generation_window} it would"
    )


class _Run(TrainState):
    """The loop around the steps: scoring, logs, when to save and when to stop."""

    def __init__(self, config: TrainConfig, corpus: Corpus, console: Console):
        super().__init__(config, corpus)
        self.console = console
        self.byte_lengths = token_byte_lengths(corpus.tokenizer)
        self.metrics: MetricsLog | None = None  # of the first process
        self.mfu: float | None = None  # model FLOPs utilisation at one token a second
        if peak := peak_flops(self.device, self.autocast, config.peak_tflops):
            length = config.sequence_length
            flops = training_flops(config.architecture, corpus.model_config, length)
            self.mfu = flops / length / (peak * distributed.world_size())

    def finished(self) -> bool:
        patience = self.config.patience
        return self.step >= self.steps or 0 < patience <= self.evaluations_since_best

    def way_on(self) -> str:
        """How to train on after the end."""
        if self.step < self.steps:
            return (
                f"finished at step {self.step:,}: {self.evaluations_since_best} scorings without "
                "improvement; a larger --patience goes on, 0 to the end"
            )
        return (
            f"finished: the learning rate has fallen to 0 at step {self.step:,}; to train longer, "
            f"begin another run: tlinformer train --config {self.output / 'config.yaml'} --steps N "
            "--output DIR"
        )

    def loop(self, progress: Progress) -> dict[str, Any]:
        config = self.config
        parameters = sum(p.numel() for p in self.model.parameters())
        self.say(
            f"{config.architecture}: {parameters:,} parameters, {len(self.data.tokens):,} tokens "
            f"({len(self.data):,} sequences of {config.sequence_length} an epoch), "
            f"{self.steps:,} steps of {config.batch_size} sequences on {self.device}"
            + (f" x {distributed.world_size()}" if distributed.world_size() > 1 else "")
        )
        if config.architecture == "tlinformer" and (
            hint := history_hint(self.corpus.model_config, config.sequence_length)
        ):
            self.say(hint)
        if distributed.rank() == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            settings = yaml.safe_dump(config.to_dict(), sort_keys=False)
            (self.output / "config.yaml").write_text(settings)
            self.corpus.tokenizer.save(str(self.output / "tokenizer.json"))
            self.metrics = MetricsLog(self.output, self.step, config.tensorboard)
        self.progress = progress
        task = progress.add_task("training", total=self.steps, completed=self.step)
        began, clock, first_step = time.perf_counter(), Stopwatch(), self.step
        logged_at = clock.seconds(), self.step
        loss_sum = torch.zeros((), device=self.device)
        self.model.train()
        done = self.finished()
        if done:
            self.say(self.way_on())
        with stop_signal() as stopped:
            while not done:
                loss, norm = self.train_step()
                loss_sum += loss  # stays on the device: reading it would wait for the step
                self.step += 1
                progress.update(task, completed=self.step)
                scores = self.step == self.steps or self.step % config.eval_interval == 0
                if scores or self.step % config.log_interval == 0:
                    steps = self.step - logged_at[1]
                    mean = self.finite(distributed.total(loss_sum).item() / steps)
                    speed = steps * self.tokens_per_step / (clock.seconds() - logged_at[0])
                    self.log(
                        loss=mean,
                        perplexity=math.exp(min(mean, 700)),
                        learning_rate=self.learning_rate(self.step - 1),
                        grad_norm=norm.item(),
                        tokens_per_second=round(speed),
                        mfu=self.mfu and speed * self.mfu,
                        memory_gib=peak_memory_gib(self.device),
                    )
                    progress.update(task, description=f"loss {mean:.3f}  {speed:,.0f} tokens/s")
                    logged_at = clock.seconds(), self.step
                    loss_sum.zero_()
                with clock.paused():
                    if scores:
                        self.score()
                    done, stopping = self.finished(), distributed.any_process(stopped())
                    if done or stopping or self.step % config.checkpoint_interval == 0:
                        self.save()
                if stopping and not done:
                    launch, processes = "tlinformer", distributed.world_size()
                    if processes > 1:
                        launch = f"torchrun --nproc-per-node {processes} -m tlinformer"
                    raise Interrupted(
                        f"stopped at step {self.step} of {self.steps}; continue with: "
                        f"{launch} train --output {self.output} --resume"
                    )
        if self.metrics:
            self.metrics.close()
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

    def finite(self, loss: float) -> float:
        if math.isfinite(loss):
            return loss
        raise TrainingError(
            f"the loss is {loss} at step {self.step}; lower learning_rate "
            f"({self.config.learning_rate}) or lengthen warmup_steps ({self.warmup})"
        )

    def score(self) -> None:
        """Scores the validation text and keeps the weights if they are the best so far.

        Every process scores all of it, so that all agree to the last bit on when to stop.
        """
        if self.corpus.valid is None:
            return self.keep_weights()
        tokens, limit = self.corpus.valid.array(), self.config.eval_tokens
        task = self.progress.add_task("scoring", total=min(limit or math.inf, len(tokens) - 1))
        result = evaluate(
            self.model,
            tokens,
            self.config.sequence_length,
            batch_size=self.config.micro_batch_size or self.share,
            max_tokens=limit,
            byte_lengths=self.byte_lengths,
            dtype=self.autocast,
            on_progress=lambda count: self.progress.advance(task, count),
        )
        self.progress.remove_task(task)
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
        weights = distributed.whole_state(self.model)
        if distributed.rank() > 0:
            return
        with torch.device("meta"):
            model = build_model(self.config.architecture, self.corpus.model_config)
        model.load_state_dict(weights, assign=True)
        model.to(getattr(torch, self.config.save_dtype)).save_pretrained(self.output / "best")
        self.corpus.tokenizer.save(str(self.output / "best" / "tokenizer.json"))

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def log(self, **values: float | None) -> None:
        if self.metrics:
            epoch = round(self.step * self.config.batch_size / len(self.data), 4)
            self.metrics.add(self.step, epoch, values)
