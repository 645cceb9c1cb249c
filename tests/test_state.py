"""Saved sequences: restored, forked and extracted ones go on exactly; misfits are refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from conftest import Place, engine_of, make_ids, poison
from safetensors import safe_open

from tlinformer import SamplingParams
from tlinformer.engine import state_lengths

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.3, seed=3)


@pytest.mark.parametrize("changes", [{}, {"num_blocks": 3, "history_window": "auto"}], ids=str)
def test_a_restored_sequence_goes_on_exactly(
    changes: dict[str, Any], every_place: Place, tmp_path: Path
) -> None:
    model = every_place.model(**changes)
    ids = make_ids(model.config, 1, 14)
    original = engine_of(model, 60)
    # On a GPU one sequence has kernels of its own, which round differently.
    restored = engine_of(model, 80, batch_size=2 if every_place.exact else 1)
    for length in (1, 3, 4, 5, 8, 11, 14):  # within windows, and where the next token slides
        original.prefill(ids[:, : (length + 1) // 2])
        logits = original.prefill(ids[:, :length]) if length % 2 else None
        for i in range((length + 1) // 2, length) if logits is None else ():
            logits = original.step(ids[:, i])
        original.save_state(tmp_path / "state")
        assert state_lengths(tmp_path / "state") == [length]
        poison(restored)
        assert torch.equal(restored.load_state(tmp_path / "state"), logits)
        for sampling in (SamplingParams(), SAMPLED):
            want = original.generate(12, sampling)
            assert torch.equal(restored.generate(12, sampling), want)
        token = torch.tensor([3])
        assert torch.equal(restored.step(token), original.step(token))


def test_batches_are_taken_apart_and_forked(place: Place, tmp_path: Path) -> None:
    model = place.model()
    prompts = [make_ids(model.config, 1, n, seed=n)[0] for n in (5, 16, 3)]
    batch = engine_of(model, 60, batch_size=3)
    single = engine_of(model, 60)
    logits = torch.stack(batch.prefill(prompts))
    batch.save_state(tmp_path / "all")
    together = batch.generate(20)
    for i in range(3):
        assert torch.equal(single.load_state(tmp_path / "all", sequences=[i])[0], logits[i])
        alone = single.generate(20)[0]
        place.check_greedy(model, torch.cat([prompts[i], alone])[None], len(prompts[i]))
        if place.exact:
            assert torch.equal(alone, together[i])
    batch.load_state(tmp_path / "all")
    batch.save_state(tmp_path / "one", sequences=[1])
    assert state_lengths(tmp_path / "all") == [5, 16, 3]
    assert state_lengths(tmp_path / "one") == [16]
    forked = batch.load_state(tmp_path / "one", sequences=[0] * 3)
    assert torch.equal(forked, logits[[1, 1, 1]])
    greedy = batch.generate(20)
    assert torch.equal(greedy[0], greedy[1]) and torch.equal(greedy[0], greedy[2])
    batch.load_state(tmp_path / "one", sequences=[0] * 3)
    drawn = batch.generate(20, SAMPLED)
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_the_file_holds_the_rows_in_use_and_opens_elsewhere(place: Place, tmp_path: Path) -> None:
    model = place.model()
    config = model.config
    path = tmp_path / "state"
    ids = make_ids(config, 1, 11)  # a history of 8, a window of 3
    engine = engine_of(model, 5000)
    logits = engine.prefill(ids)
    engine.save_state(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert json.loads(metadata["config"])["hidden_size"] == config.hidden_size
    assert metadata["dtype"] == str(place.dtype).removeprefix("torch.")
    assert torch.equal(tensors["sequences.0.tokens"], ids[0].int())
    assert torch.equal(tensors["sequences.0.logits"], logits[0].cpu())
    rows = {name.split(".", 2)[2]: t.shape[1] for name, t in tensors.items() if "keys" in name}
    assert rows == {
        "history.0.0.keys": 11, "history.1.0.keys": 8, "window.1.0.keys": 3,
        **{f"context.{b}.{layer}.keys": 5 for b in (0, 1) for layer in (1, 2)},
        **{f"window.{b}.{layer}.keys": 3 for b in (0, 1) for layer in (1, 2)},
    }  # fmt: skip
    raw = path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert metadata["checksum"] == xxhash.xxh64_hexdigest(data)
    assert len(data) == sum(t.numel() * t.itemsize for t in tensors.values())


def test_no_second_copy_of_the_cache_exists(place: Place, tmp_path: Path) -> None:
    if place.device.type == "cuda":
        pytest.skip("the host's memory is what is counted")

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    model = place.model(generation_window=512)
    engine = engine_of(model, 100_000)
    engine.prefill(make_ids(model.config, 1, 100_000))
    size = engine.stats.cache_bytes
    for call in (engine.save_state, engine.load_state):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak()
        call(tmp_path / "state")
        assert (tmp_path / "state").stat().st_size > 0.9 * size > 30e6
        assert (peak() - before) * 1024 < 0.4 * size


def test_misfits_are_refused_and_change_nothing(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "state"
    model = place.model()
    engine, twin = engine_of(model, 40), engine_of(model, 40)
    with pytest.raises(ValueError, match="save_state needs a prefill"):
        engine.save_state(path)
    engine.prefill(make_ids(model.config, 1, 11))
    engine.save_state(path)
    good = path.read_bytes()
    for each in (engine, twin):
        each.prefill(make_ids(model.config, 1, 7, seed=5))

    def refused(text: str, by: Any = engine, **options: Any) -> None:
        with pytest.raises(ValueError, match=text):
            by.load_state(path, **options)

    refused("sequence 1 is not there", sequences=[1])
    refused("2 of its sequences are to be loaded", sequences=[0, 0])
    refused("sequences is empty", sequences=[])
    refused("must be a list of integers", sequences=5)
    refused("max_context = 10", by=engine_of(model, 10))
    refused("by a model with other weights", by=engine_of(place.model(seed=1), 40))
    refused(
        "history_window = 5; this engine's has 6", by=engine_of(place.model(history_window=6), 40)
    )
    for size in (0, 7, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        refused("cut off")
    path.write_bytes(good + b"\0")
    refused("bytes of data; its sequences need")
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 4]) + good[-8:])
    refused("damaged")
    path.write_text("no state")
    refused("no saved state")
    with pytest.raises(OSError, match="missing: No such file"):
        engine.load_state(tmp_path / "missing")
    with pytest.raises(OSError, match="cannot be written"):
        engine.save_state(tmp_path / "no" / "folder")
    with pytest.raises(RuntimeError, match="interrupted"):
        engine.save_state(path, progress=lambda share: share < 0.5)
    assert path.read_text() == "no state" and list(tmp_path.iterdir()) == [path]
    assert torch.equal(engine.generate(10, SAMPLED), twin.generate(10, SAMPLED))


def test_another_dtype_is_refused(tmp_path: Path, every_place: Place) -> None:
    model = every_place.model()
    engine = engine_of(model, 20)
    engine.prefill(torch.tensor([[1, 2, 3]]))
    engine.save_state(tmp_path / "state")
    dtypes = {torch.float32: torch.bfloat16, torch.float16: torch.bfloat16}
    other = dtypes.get(every_place.dtype)
    other = other or (torch.float32 if every_place.device.type == "cpu" else torch.float16)
    with pytest.raises(ValueError, match="this engine computes in"):
        engine_of(model, 20, dtype=other).load_state(tmp_path / "state")


def test_what_a_gpu_read_a_cpu_goes_on_with(gpu: Place, tmp_path: Path) -> None:
    model = gpu.model()
    ids = make_ids(model.config, 1, 23)
    engine = engine_of(model, 60)
    logits = engine.prefill(ids)
    engine.save_state(tmp_path / "state")
    there = engine_of(model.cpu(), 60)
    assert torch.equal(there.load_state(tmp_path / "state"), logits.cpu())
    assert there.generate(1) == logits.argmax(1).cpu()


def test_other_threads_run_while_a_state_is_written(place: Place, tmp_path: Path) -> None:
    model = place.model()
    engine = engine_of(model, 20)
    engine.prefill(torch.tensor([[1, 2, 3]]))
    shares: list[float] = []
    seen = threading.Event()

    def progress(share: float) -> None:
        shares.append(share)
        thread = threading.Thread(target=seen.set)
        thread.start()
        thread.join()

    call: Callable[..., Any]
    for call in (engine.save_state, engine.load_state):
        shares.clear()
        call(tmp_path / "state", progress=progress)
        assert shares == sorted(shares) and shares[-1] == 1 and seen.is_set()
