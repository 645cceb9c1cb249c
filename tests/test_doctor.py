"""Every sign of failure is built and found, and what is healthy is not flagged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_config, make_ids, make_model

from tlinformer import Engine, TLinFormerConfig, TLinFormerForCausalLM
from tlinformer.cli import main
from tlinformer.doctor import check_memory, check_reuse, check_windows, examine, with_windows
from tlinformer.plan import fit_device

pytestmark = pytest.mark.usefixtures("one_thread")
LAG = 12


def repeating(sequences: int, length: int, seed: int) -> torch.Tensor:
    """(sequences, length) ids: each is that of LAG tokens before."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(16, (sequences, LAG), generator=generator).repeat(1, length)[:, :length]


@pytest.fixture(scope="module")
def copier() -> TLinFormerForCausalLM:
    """Has learnt to copy what stood LAG tokens before, which only the compressed history knows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `one_thread`, which comes later
    torch.manual_seed(0)
    config = TLinFormerConfig(
        vocab_size=16,
        hidden_size=32,
        num_attention_heads=2,
        num_blocks=1,
        block_depth=2,
        history_window=32,
        generation_window=8,
        intermediate_size=64,
        variant="tconstformer",
    )
    model = TLinFormerForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 20)
        ids = repeating(16, 65, step)
        logits = model(ids[:, :-1])[:, LAG:]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, LAG + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss < 0.1:
            break
    assert loss < 0.5  # guessing: 2.77
    torch.set_num_threads(threads)
    return model.eval()


@pytest.fixture(scope="module")
def held_out() -> np.ndarray:
    return repeating(8, 256, 999).flatten().numpy()


def test_a_healthy_model_is_not_flagged(
    copier: TLinFormerForCausalLM, held_out: np.ndarray
) -> None:
    checks = examine(copier, tokens=held_out, max_context=64)
    names = ["reuse", "memory", "history window", "generation window"]
    assert [check.name for check in checks] == names
    assert [(check.status, check.advice) for check in checks] == [("ok", "")] * 4, checks


def test_too_little_compressed_history_is_found(
    copier: TLinFormerForCausalLM, held_out: np.ndarray
) -> None:
    broken = with_windows(copier, history_window=4)
    history, generation = check_windows(broken, held_out, 64)
    assert history.status == "problem" and generation.status == "ok"
    assert "set history_window to 16" in history.advice
    assert history.figures["larger_loss"] < history.figures["loss"] - 1
    assert " lower (" in history.evidence
    cured = check_windows(with_windows(copier, history_window=16), held_out, 64)
    assert [check.status for check in cured] == ["ok", "ok"]


def test_a_stale_context_is_found(copier: TLinFormerForCausalLM, held_out: np.ndarray) -> None:
    broken = with_windows(copier, generation_window=32)
    history, generation = check_windows(broken, held_out, 128)
    assert generation.status == "problem" and "generation_window to 16" in generation.advice
    assert generation.figures["last_quarter_loss"] > generation.figures["first_quarter_loss"] + 1
    assert " higher (" in generation.evidence
    assert history.status == "ok"


def test_windows_need_enough_text(copier: TLinFormerForCausalLM, held_out: np.ndarray) -> None:
    for count, why in ((10, "no two windows"), (33, "too few")):
        for check in check_windows(copier, held_out[:count], 64):
            assert check.status == "skipped" and why in check.evidence
    assert [c.status for c in examine(copier)] == ["ok", "ok", "skipped", "skipped"]


def test_weights_are_shared_by_models_of_other_windows(copier: TLinFormerForCausalLM) -> None:
    other = with_windows(copier, history_window=7)
    pairs = zip(copier.parameters(), other.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert (copier.config.history_window, other.config.history_window) == (32, 7)


def used(calls: Any, batch: int = 1, **changes: object) -> Engine:
    """An engine on which `calls(engine, ids)` were made; ids are (batch, 60)."""
    config = make_config(**{"generation_window": 16, **changes})
    model = make_model(config, dtype=torch.float32)
    engine = Engine(model, max_context=80, batch_size=batch)
    calls(engine, make_ids(config, batch, 60))
    return engine


def read_again_and_again(engine: Engine, ids: torch.Tensor) -> None:
    for length in range(40, 48):
        engine.prefill(ids[:, :length])


def read_short_again_and_again(engine: Engine, ids: torch.Tensor) -> None:
    for length in range(3, 9):  # nothing to slide yet
        engine.prefill(ids[:, :length])
        engine.generate(1)


def read_once(engine: Engine, ids: torch.Tensor) -> None:
    engine.prefill(ids[:, :20])
    engine.generate(50)


def serve_prompts(engine: Engine, ids: torch.Tensor) -> None:
    for first in range(6):
        engine.prefill(ids[:, first : first + 30])
        engine.generate(10)


def read_only(engine: Engine, ids: torch.Tensor) -> None:
    engine.prefill(ids)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("calls", "changes", "status", "advice"),
    [
        (read_again_and_again, {}, "problem", "prefill a text once"),
        (read_short_again_and_again, {}, "problem", "prefill a text once"),
        (read_once, {"generation_window": 1}, "problem", "generation_window is 1"),
        (read_once, {"generation_window": 2}, "problem", "generation_window is 2"),
        (read_once, {"generation_window": 4}, "warning", "generation_window is 4"),
        (read_once, {}, "ok", ""),
        (serve_prompts, {}, "ok", ""),
        (read_only, {}, "skipped", ""),
    ],
)
def test_reuse(
    calls: Any, changes: dict[str, object], status: str, advice: str, batch: int
) -> None:
    check = check_reuse(used(calls, batch, **changes))
    assert check.status == status, check
    assert check.advice.startswith(advice) and bool(check.advice) == bool(advice)


def test_memory_is_examined_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    config, sizes = make_config(), {"max_context": 4000, "batch_size": 3}
    needed = fit_device(config, **sizes).needed_bytes  # type: ignore[arg-type]
    for available, status in ((needed * 2, "ok"), (needed, "warning"), (needed - 1, "problem")):
        monkeypatch.setattr("tlinformer.plan.available_memory", lambda _, a=available: a)
        check = check_memory(config, **sizes)  # type: ignore[arg-type]
        assert check.status == status and bool(check.advice) == (status != "ok")
    longest = int(check.figures["longest_context"])
    assert f"at most {longest:,} tokens fit" in check.advice and longest < 4000
    for context, status in ((longest, "warning"), (longest + 1, "problem")):
        assert check_memory(config, max_context=context, batch_size=3).status == status
    monkeypatch.setattr("tlinformer.plan.available_memory", lambda _: 1000)
    assert "not even one token" in check_memory(config, max_context=1).advice
    monkeypatch.setattr("tlinformer.plan.available_memory", lambda _: 0)
    assert check_memory(config, max_context=1).status == "skipped"


@pytest.mark.parametrize(("window", "code"), [(16, 0), (1, 1)])
def test_the_command_ends_with_1_if_there_is_a_problem(
    window: int, code: int, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(vocab_size=270, generation_window=window)
    TLinFormerForCausalLM(config).save_pretrained(tmp_path)
    shutil.copy(text / "tokenizer.json", tmp_path)
    arguments = ["doctor", "--model", str(tmp_path), "--text", str(text / "valid.txt")]
    arguments += ["--context", "64", "--batch", "2", "--max-tokens", "640", "--device", "cpu"]
    assert main([*arguments, "--json"]) == code
    result = json.loads(capsys.readouterr().out)
    statuses = {check["name"]: check["status"] for check in result["checks"]}
    assert statuses["reuse"] == ("problem" if code else "ok")
    assert statuses["memory"] == statuses["history window"] == "ok"
    assert result["batch_size"] == 2 and result["max_context"] == 64
    assert main(arguments) == code
    assert "what to change" in capsys.readouterr().out


def test_the_command_stops_where_nothing_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    TLinFormerForCausalLM(make_config()).save_pretrained(tmp_path)
    monkeypatch.setattr("tlinformer.plan.available_memory", lambda _: 1000)
    assert main(["doctor", "--model", str(tmp_path), "--device", "cpu", "--json"]) == 1
    [check] = json.loads(capsys.readouterr().out)["checks"]
    assert (check["name"], check["status"]) == ("memory", "problem")
