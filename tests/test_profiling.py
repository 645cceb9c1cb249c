"""What profilers see of the engine, and what `tlinformer bench` says of its limits."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Place, engine_of, make_config, make_ids, make_model

from tlinformer import SamplingParams
from tlinformer.checkpoint import save
from tlinformer.cli import main
from tlinformer.roofline import KERNELS, Verb, attribute, compare, run, verbs_of_kernels

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]


def test_torchs_profiler_names_the_calls(place: Place, tmp_path: Path) -> None:
    model = place.model()
    engine = engine_of(model, 20)
    with torch.profiler.profile() as profiler:
        engine.prefill(make_ids(model.config, 1, 6))
        engine.step(torch.tensor([1]))
        engine.generate(2)
        engine.save_state(tmp_path / "state")
        engine.load_state(tmp_path / "state")
    names = {e.name for e in profiler.events() if e.name.startswith("tlinformer::")}
    named = [name for name in names if "(" not in name]  # kernels have their parameters
    calls = ("prefill", "step", "generate", "save_state", "load_state")
    assert sorted(named) == sorted(f"tlinformer::{call}" for call in calls)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    save(make_model(make_config(), dtype=torch.float32), folder)
    return folder


def bench(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["bench", "--device", "cpu", "--threads", "1", *map(str, arguments)]) == 0
    return capfd.readouterr().out


def test_bench_tells_what_bounds_each_verb(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = (saved, "--context", 403, "--batch-size", 2, "--roofline")
    result = json.loads(bench(capfd, *options, "--json"))
    config = make_config()
    assert result["history"] == 400
    assert [stage["stage"] for stage in result["stages"]] == ["prefill", "slide", "tokens"]
    assert min(result["ceilings"].values()) > 1e8
    for stage in result["stages"]:
        for verb in stage["verbs"]:
            moved = verb["bytes"] / result["ceilings"]["bytes_per_second"]
            computed = verb["flops"] / result["ceilings"]["flops_per_second"]
            if verb["bytes"]:
                limit = max(moved, computed) * 1e6
                assert verb["share"] == pytest.approx(limit / verb["microseconds"])
                assert verb["bound"] == ("memory" if moved >= computed else "arithmetic")
        spent = sum(verb["microseconds"] for verb in stage["verbs"])
        assert 0 < spent <= stage["seconds"] * 1e6
    tokens = {verb["verb"]: verb for verb in result["stages"][2]["verbs"]}
    layers, count = config.num_blocks * config.block_depth, result["stages"][2]["tokens"]
    assert count == 3 == tokens["draw"]["calls"] == tokens["head"]["calls"]
    assert tokens["finish"]["calls"] == tokens["project"]["calls"] == count * layers
    row = 4 * 2 * config.hidden_size
    window = 2 + 3 + 4  # the slide's token and those drawn
    assert tokens["attend history"]["bytes"] == 2 * 2 * row * (400 * count + window)
    table = bench(capfd, *options)
    assert all(text in table for text in ("slide", "attend history", "bound by", "GFLOP/s"))
    assert "bound by" not in bench(capfd, *options[:3])


def test_bench_refuses_what_it_cannot_time(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (("--tokens", 4), "--tokens is 4; between two slides are 1 to 3"),
        (("--context", 3), "--context is 3"),
    ):
        assert main(["bench", str(saved), *map(str, arguments)]) == 2
        assert words in capfd.readouterr().err


def test_overlapping_kernels_share_the_devices_time() -> None:
    name = "void tlinformer::cuda::(anonymous namespace)::tlin_add_step<__nv_bfloat16, 1>(AddStep)"
    events = [
        (name, 0.0, 10.0),
        ("tlin_gate_row", 4.0, 16.0),  # began early and waited
        (name, 20.0, 23.0),
        ("inside", 21.0, 22.0),
    ]
    kernels = attribute(events)
    assert {k: (v.calls, v.microseconds) for k, v in kernels.items()} == {
        "tlin_add_step": (2, 11.0), "tlin_gate_row": (1, 6.0), "inside": (1, 1.0),
    }  # fmt: skip
    counted = [Verb("finish", 3, 0, 12e3, 6e3), Verb("project", 3, 0, 1e3, 2e3)]
    verbs = {verb.verb: verb for verb in verbs_of_kernels(kernels, counted, many=False)}
    assert verbs.keys() == {"finish", "other"}  # no kernel projected
    assert (verbs["finish"].microseconds, verbs["finish"].bytes) == (17.0, 12e3)
    compare(verbs["finish"], {"bytes_per_second": 1e9, "flops_per_second": 1e12})
    assert (verbs["finish"].bound, verbs["finish"].share) == ("memory", pytest.approx(12 / 17))
    many = verbs_of_kernels(kernels, counted, many=True)[0]
    assert (many.verb, many.bytes, many.calls) == ("project, finish", 13e3, 6)


def test_every_kernel_belongs_to_a_verb() -> None:
    sources = [
        p.read_text() for p in (ROOT / "csrc/cuda").rglob("*") if p.suffix in (".cu", ".cuh")
    ]
    kernels = {name for text in sources for name in re.findall(r"\btlin_\w+", text)}
    kernels = {name for name in kernels if not name.startswith("tlin_ranged_")}  # these train
    assert len(kernels) > 10
    for kernel in kernels:
        assert any(re.search(pattern, kernel) for pattern, _ in KERNELS), kernel


@pytest.mark.parametrize(("what", "section"), [("token", "SourceCounters"), ("slide", "Roofline")])
def test_ncu_is_called_with_the_sections_that_matter(
    what: str, section: str, tmp_path: Path
) -> None:
    fake = tmp_path / "ncu"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {tmp_path}/arguments\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python"}
    subprocess.run([ROOT / "benchmarks/ncu.sh", what, "4096"], check=True, env=environment)
    arguments = (tmp_path / "arguments").read_text().split("\0")
    assert any(section in argument for argument in arguments)
    program = arguments.index("-c") + 1
    compile(arguments[program], "program", "exec")
    assert arguments[program + 1 : program + 4] == [what, "4096", "41m"]
    assert subprocess.run([ROOT / "benchmarks/ncu.sh", "nothing"], env=environment).returncode == 2


def test_roofline_of_a_gpu(gpu: Place) -> None:
    model = gpu.model(generation_window=64, history_window=64, vocab_size=5000)
    engine = engine_of(model, 700)
    stages = {s.stage: s for s in run(engine, 512, 60, SamplingParams())}
    ceilings = {"bytes_per_second": 4e12, "flops_per_second": 6e14}
    for stage in stages.values():
        spent = sum(verb.microseconds for verb in stage.verbs)
        assert 0 < spent <= stage.seconds * 1e6
    verbs: dict[str, Any] = {verb.verb: verb for verb in stages["tokens"].verbs}
    assert {"project", "attend", "finish", "head", "draw"} <= verbs.keys()
    for verb in verbs.values():
        compare(verb, ceilings)
        assert verb.kernels and (verb.share is None or 0 < verb.share < 1)
    assert "project, finish" in {verb.verb for verb in stages["prefill"].verbs}
