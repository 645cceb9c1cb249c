"""Training, evaluation and their commands."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from small_runs import MODEL, assert_same_run, checkpoint, metrics, small_run

from tlinformer import data, recipe
from tlinformer import train as training
from tlinformer.cli import main
from tlinformer.config import TLinFormerConfig
from tlinformer.evaluation import evaluate
from tlinformer.recipe import build_model, load_model
from tlinformer.settings import ARCHITECTURES, TrainConfig
from tlinformer.state import parameter_groups
from tlinformer.train import Interrupted, TrainingError, history_hint, train


@pytest.fixture(autouse=True)
def _one_thread():
    """Small matrices: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(text, tmp_path):
    return small_run(text, tmp_path / "run")


def interrupt_at(monkeypatch, step, how):
    """Lets `how` happen after the computation of `step`."""
    whole = training._Run.train_step

    def train_step(self):
        result = whole(self)
        if self.step + 1 == step:
            how()
        return result

    monkeypatch.setattr(training._Run, "train_step", train_step)


def crash():
    raise OSError("power failure")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("how", ["signal", "crash"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    config, tmp_path, monkeypatch, architecture, how
):
    config = replace(config, architecture=architecture)
    whole = replace(config, output=str(tmp_path / "whole"))
    train(whole)
    with monkeypatch.context() as patch:
        if how == "signal":
            interrupt_at(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
            with pytest.raises(Interrupted, match=r"stopped at step 5 of 8.*--resume"):
                train(config)
            assert checkpoint(config)["step"] == 5
        else:
            interrupt_at(patch, 5, crash)
            with pytest.raises(OSError, match="power failure"):
                train(config)
            assert checkpoint(config)["step"] == 3  # the last checkpoint; steps 4 and 5 run again
    torch.manual_seed(99)
    summary = train(config, resume=True)
    assert summary["steps"] == 8
    # The log has the mean loss of both steps before 4, 6 and 8; a resumed run begins another mean.
    assert_same_run(config, whole, log_after={"signal": 6, "crash": 4}[how])
    steps = [line["step"] for line in metrics(config) if "valid_loss" in line]
    assert steps == [4, 8]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from tlinformer.cli import main
from tlinformer.config import TLinFormerConfig
torch.set_num_threads(1)
whole = torch.save
def save(state, path):
    if state["step"] == 6:  # the second checkpoint: dies with half of it written
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    whole(state, path)
torch.save = save
main(["train", "--config", sys.argv[1]])
"""


def test_a_run_killed_while_it_writes_a_checkpoint_resumes_exactly(config, tmp_path):
    whole = replace(config, output=str(tmp_path / "whole"))
    train(whole)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config.to_dict()))
    root = str(Path(training.__file__).parent.parent)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml")],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint(config)["step"] == 3
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # the kill may cut a line short
    train(config, resume=True)
    assert_same_run(config, whole, log_after=4)
    assert not list((tmp_path / "run").glob(".checkpoint*"))


def test_dropout_takes_part_in_the_exact_resume(config, tmp_path):
    """Guards the test above: dropout draws numbers that a resumed run has to draw again."""
    other = replace(config, output=str(tmp_path / "other"), model=MODEL | {"dropout": 0.0})
    train(config)
    train(other)
    names = checkpoint(config)["model"]
    assert any(not torch.equal(names[k], checkpoint(other)["model"][k]) for k in names)


def test_gradient_accumulation_equals_the_whole_batch(config, tmp_path):
    model = MODEL | {"dropout": 0.0}
    runs = [
        replace(config, model=model, micro_batch_size=size, output=str(tmp_path / str(size)))
        for size in (1, 3, None)
    ]
    for run in runs:
        train(run)
    one, three, whole = (checkpoint(run)["model"] for run in runs)
    torch.testing.assert_close(one, whole, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(three, whole, rtol=2e-4, atol=2e-5)


def test_training_learns_and_keeps_the_best_weights(config, text):
    summary = train(
        replace(config, steps=60, eval_interval=20, batch_size=8, save_dtype="bfloat16")
    )
    # Ten equally likely words: a uniform guess among the tokens would be at 270.
    assert summary["valid_perplexity"] < 60
    assert summary["valid_perplexity"] == pytest.approx(math.exp(summary["valid_loss"]))
    best = load_model(os.path.join(config.output, "best"))
    assert best.embed_tokens.weight.dtype == torch.bfloat16
    tokens = data.TokenFile.load(os.path.join(config.output, "tokens", "valid.bin"))
    again = evaluate(best.float(), tokens.array(), 24)
    assert again["loss"] == pytest.approx(summary["valid_loss"], abs=0.02)
    assert data.load_tokenizer(os.path.join(config.output, "best")).get_vocab_size() == 270


def test_early_stopping_waits_for_patience(config, capsys):
    config = replace(config, steps=60, eval_interval=1, patience=3, learning_rate=1e-12)
    config = replace(config, warmup_steps=0, model=MODEL | {"dropout": 0.0})
    losses = iter([3.0, 2.0, 2.5, 2.0, 2.1, 1.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training,
            "evaluate",
            lambda *a, **k: {"loss": next(losses), "perplexity": 1.0, "bits_per_byte": 1.0},
        )
        summary = train(config)
    assert (summary["steps"], summary["best_step"], summary["valid_loss"]) == (5, 2, 2.0)
    assert train(config, resume=True)["steps"] == 5
    assert "finished at step 5: 3 scorings without improvement" in capsys.readouterr().out


def test_schedule_warms_up_and_falls_to_zero(config):
    run = training._Run(
        replace(config, steps=100, warmup_steps=10),
        recipe.prepare_corpus(config),
        training.Console(),
    )
    rates = [run.learning_rate(step) / config.learning_rate for step in range(101)]
    assert rates[:11] == pytest.approx([(s + 1) / 10 for s in range(10)] + [1.0])
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_only_matrices_decay(config):
    model = build_model("tlinformer", recipe.prepare_corpus(config).model_config)
    decayed, rest = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in rest["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_a_diverging_run_stops_with_words(config, monkeypatch):
    monkeypatch.setattr(F, "cross_entropy", lambda logits, _: logits.sum() * float("nan"))
    with pytest.raises(TrainingError, match=r"loss is nan at step 2; lower learning_rate"):
        train(config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("count", "batch"), [(49, 2), (60, 4), (24, 3), (2, 1)])
def test_evaluation_equals_a_direct_computation(config, architecture, count, batch):
    corpus = recipe.prepare_corpus(config)
    torch.manual_seed(1)
    model = build_model(architecture, corpus.model_config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = corpus.valid.array()[:count]
    lengths = data.token_byte_lengths(corpus.tokenizer)
    random, seen = torch.get_rng_state(), []
    result = evaluate(
        model, tokens, 24, batch_size=batch, byte_lengths=lengths, on_progress=seen.append
    )
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    ids, losses = torch.tensor(tokens.astype(np.int64)), []
    model.eval()
    for target in range(1, count):  # each target alone, after the tokens of its chunk
        start = (target - 1) // 24 * 24
        logits = model(ids[None, start:target])[0, -1]
        losses.append(F.cross_entropy(logits.float(), ids[target]).item())
    assert result["tokens"] == count - 1 == sum(seen)
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    text_bytes = len(corpus.tokenizer.decode(tokens[1:].tolist()).encode())
    assert result["bytes"] == text_bytes
    assert result["bits_per_byte"] == pytest.approx(
        sum(losses) / math.log(2) / text_bytes, rel=1e-5
    )


def test_evaluation_of_a_part_takes_chunks_from_all_over_the_text(config):
    corpus = recipe.prepare_corpus(config)
    model = build_model("transformer", corpus.model_config).eval()
    tokens = corpus.valid.array()[: 10 * 24 + 5]
    result = evaluate(model, tokens, 24, batch_size=2, max_tokens=50)
    assert result["tokens"] == 3 * 24
    chunks = [tokens[24 * n : 24 * n + 25] for n in (0, 3, 7)]
    alone = [evaluate(model, chunk, 24)["loss"] for chunk in chunks]
    assert result["loss"] == pytest.approx(np.mean(alone), rel=1e-6)
    whole = evaluate(model, tokens, 24)
    assert evaluate(model, tokens, 24, max_tokens=len(tokens))["loss"] == whole["loss"]


def test_evaluation_refuses_what_it_cannot_score(config):
    model = build_model("transformer", recipe.prepare_corpus(config).model_config)
    with pytest.raises(ValueError, match="cannot score 1 tokens"):
        evaluate(model, np.array([1]), 8)
    with pytest.raises(ValueError, match="token 270 is outside the model's vocabulary of 270"):
        evaluate(model, np.array([1, 270]), 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"architecture": "rnn"}, "architecture is 'rnn'; it must be one of"),
        ({"warmup_steps": 8}, "warmup_steps is 8; the whole run has 8 steps"),
        ({"sequence_length": 10**6}, "too few for one sequence of 1000000"),
        ({"train_data": ()}, "train_data is empty"),
        ({"model": MODEL | {"vocab_size": 269}}, "vocab_size is 269; the tokenizer has 270"),
        ({"model": MODEL | {"variant": "tlinformer"}}, "set architecture instead"),
        ({"model": MODEL | {"width": 3}}, r"unknown config fields \['width'\]"),
        (
            {"tokenizer": None, "model": {}},
            "neither tokenizer nor model.vocab_size is given; name one with --tokenizer",
        ),
        ({"device": "abacus"}, "device is 'abacus'"),
    ],
)
def test_settings_that_do_not_fit_are_named(config, change, words):
    with pytest.raises(ValueError, match=words):
        train(replace(config, **change))


def test_an_output_that_cannot_be_written_is_named_before_anything_is_made(config, tmp_path):
    (tmp_path / "file").touch()
    for output, cause in {tmp_path / "file" / "run": "Not a dir", "/proc/x/run": "No such"}.items():
        with pytest.raises(ValueError, match=f"--output is '{output}', .*: {cause}.*; name a dir"):
            train(replace(config, output=str(output), train_data=("nowhere.txt",)))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(replace(config, train_data=("nowhere.txt",)))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_resuming_something_else_names_the_difference(config, text, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(config, resume=True)
    train(config)
    with pytest.raises(FileExistsError, match="holds a run"):
        train(config)
    with pytest.raises(ValueError, match=r"different learning_rate \(saved 0.003, now 0.1\);"):
        train(replace(config, learning_rate=0.1), resume=True)
    (tmp_path / "other.txt").write_text((text / "train.txt").read_text()[5:])
    with pytest.raises(ValueError, match="different train_data"):
        train(replace(config, train_data=(str(tmp_path / "other.txt"),)), resume=True)
    assert train(replace(config, log_interval=5), resume=True)["steps"] == 8
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        train(config, resume=True)


def test_settings_survive_yaml(config):
    assert TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert TrainConfig.from_dict({"learning_rate": "1e-3"}).learning_rate == 1e-3
    with pytest.raises(ValueError, match=r"unknown setting 'batchsize'; did you mean batch_size"):
        TrainConfig.from_dict({"batchsize": 3})
    with pytest.raises(ValueError, match="steps is 'many'; it must be of type int"):
        TrainConfig.from_dict({"steps": "many"})


def test_commands_train_resume_and_score(config, text, tmp_path, capsys):
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(config.to_dict() | {"steps": 500, "tokenizer": None}))
    arguments = ["--steps", "4", "--dropout", "0.1", "--history-window", "auto"]
    assert main(["train", "--config", str(file), *arguments]) == 0  # options win over the recipe
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["steps"], saved["model"]["dropout"], saved["batch_size"]) == (4, 0.1, 4)
    assert saved["model"]["history_window"] == "auto"
    capsys.readouterr()
    assert main(["train", "--output", str(run), "--resume"]) == 0
    out = capsys.readouterr().out
    way = f"finished: the learning rate has fallen to 0 at step 4; .*--config {run}/config.yaml"
    assert re.search(way, out) and "│ - " in out
    longer = ["--config", f"{run}/config.yaml", "--steps", "5", "--output", f"{run}-longer"]
    assert main(["train", *longer]) == 0
    capsys.readouterr()
    scoring = ["eval", str(run / "best"), str(text / "valid.txt"), "--sequence-length", "24"]
    assert main([*scoring, "--json", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["loss"] == pytest.approx(checkpoint(config)["best"]["loss"], rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(
        checkpoint(config)["best"]["bits_per_byte"], rel=1e-5
    )
    named = ["eval", "--model", *scoring[1:]]
    assert main([*named, "--device", "cpu"]) == 0
    assert f"{result['perplexity']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--steps", "few"], "--steps"),
        (["train", "--steps", "0"], "steps is 0; it must be above 0"),
        (["train", "--config", "/nowhere.yaml"], "/nowhere.yaml: no such recipe"),
        (["train", "--train-data", "/nowhere.txt", "--vocab-size", "300"], "/nowhere.txt: no such"),
        (["eval", "--model", "/nowhere", __file__], "/nowhere/config.json is missing"),
        (["eval", "/nowhere", "x.txt", "--dtype", "int8"], "--dtype is 'int8'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_text_given_beside_a_recipe_wins_over_its_data_set(config, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    recipe = config.to_dict() | {"dataset": "/nowhere", "train_data": [], "steps": 2}
    file.write_text(yaml.safe_dump(recipe))
    assert main(["train", "--config", str(file), "--train-data", *config.train_data]) == 0
    both = ["--dataset", "/nowhere", "--train-data", *config.train_data]
    assert main(["train", "--output", str(tmp_path / "both"), *both]) == 2
    assert "dataset is '/nowhere' and train_data" in capsys.readouterr().err


def test_failures_and_interrupts_have_exit_codes_of_their_own(
    config, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    arguments = ["train", "--config", str(file)]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        assert main(arguments) == 130
        assert f"tlinformer train --output {config.output} --resume" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, crash)
        assert main([*arguments, "--resume"]) == 1
        assert "error: OSError: power failure" in capsys.readouterr().err
        with pytest.raises(OSError, match="power failure"):
            main([*arguments, "--resume", "--debug"])


def test_sequences_that_never_outgrow_the_history_window_are_named():
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 1}
    model = TLinFormerConfig(**sizes, history_window=64, generation_window=32)
    assert history_hint(model, 97) is None  # 96 tokens before the last one
    found = history_hint(model, 96)
    assert "96 tokens has more than 64 tokens of history" in found
    assert "sequence_length = 288" in found
    assert history_hint(model, 288) is None
